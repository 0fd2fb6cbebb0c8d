"""Several workers on one database, each in a place of its own, behind one front for the CA's looks.

Each is a `Rig` of the chaos tests, so that everything there that takes a rig can be asked of each of them.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import func, insert, select, update

from certworker import wiring
from certworker.cli.pebble import Issued, Pebble, free_ports
from certworker.store import schema, workers
from certworker.store.database import Database, open_database
from certworker.store.rows import new_id
from certworker.store.tables import ca_breakers, certificates, issuances, lineages, tls_policies
from tests.chaos.proxy import FaultProxy
from tests.chaos.worker import Rig, Worker, settings_of
from tests.flow.box import Box

from .servers import run_front

BUSY = "busy"
"""What names begin with whose certificates are renewed all the time."""


@dataclass
class Fleet:
    """Workers on one database, and the CA behind a proxy that breaks what it is told to."""

    ca: Pebble
    proxy: FaultProxy
    db: Database
    """The test's own connections."""
    url: str
    rigs: list[Rig]
    """One for each worker."""

    @property
    def first(self) -> Rig:
        """Where it does not matter which: what is common to all."""
        return self.rigs[0]

    @property
    def workers(self) -> list[Worker]:
        return [rig.worker for rig in self.rigs]

    def start(self) -> None:
        """Start all of them."""
        for worker in self.workers:
            worker.start()

    def want(self, *policies: list[str], shared: bool = False) -> None:
        """Write policies as any program of the gateway does, each with these names."""
        rows = [
            {"id": new_id(), "mode": "auto", "domains": names, "status": "pending", "shared": shared}
            for names in policies
        ]
        self.db.write(lambda tx: tx.execute(insert(tls_policies), rows))

    def renew(self, count: int, draw: random.Random) -> None:
        """Let some certificates of names that begin with `busy` be due now, as their plan would one day."""
        query = select(lineages.c.id, lineages.c.dns_names).where(lineages.c.not_after.is_not(None))
        rows = self.db.read(lambda tx: tx.execute(query.order_by(lineages.c.id)).all())
        ids = [row.id for row in rows if row.dns_names[0].startswith(BUSY)]
        chosen = draw.sample(ids, min(count, len(ids)))
        due = {"renew_at": lineages.c.created_at, "next_check_at": lineages.c.created_at}
        self.db.write(lambda tx: tx.execute(update(lineages).where(lineages.c.id.in_(chosen)).values(due)))

    def id_of(self, worker: Worker) -> str | None:
        """Return the id that a worker has in the database; None before it has signed on."""
        pid = worker.process.pid if worker.process is not None else None
        return next((one.id for one in self.db.read(workers.alive) if one.pid == pid), None)

    def held_by(self, worker: Worker) -> dict[str, int]:
        """Return the issuances that a worker holds, with their fencing tokens."""
        owner = self.id_of(worker)
        query = select(issuances.c.id, issuances.c.lease_token).where(
            issuances.c.lease_owner == owner, issuances.c.closed_at.is_(None)
        )
        return {row[0]: row[1] for row in self.db.read(lambda tx: tx.execute(query).all())}

    def end_leases_of(self, worker: Worker) -> None:
        """Let a worker's leases end as if their time were over."""
        owner = self.id_of(worker)
        held = update(issuances).where(issuances.c.lease_owner == owner, issuances.c.lease_until.is_not(None))
        self.db.write(lambda tx: tx.execute(held.values(lease_until=issuances.c.created_at)))

    def end_waits(self) -> None:
        """Let everything that waits after a failure be tried now, as if its time had come."""
        for statement in (
            "UPDATE issuances SET attempt_at = created_at WHERE lease_until IS NULL AND closed_at IS NULL",
            "UPDATE lineages SET next_check_at = created_at WHERE next_check_at IS NOT NULL",
            "UPDATE lineage_names SET probe_at = left_out_at WHERE left_out_at IS NOT NULL",
        ):
            self.first.execute(statement)
        self.end_outage()

    def end_outage(self) -> None:
        """Let a CA that is in trouble be tried now."""
        self.first.execute("UPDATE ca_breakers SET probe_at = state_at, trial_until = NULL WHERE state <> 'closed'")

    def end_trial_of(self, worker_id: str) -> None:
        """Let somebody else try whether the CA is there again."""
        held = update(ca_breakers).where(ca_breakers.c.trial_owner == worker_id)
        self.db.write(lambda tx: tx.execute(held.values(trial_owner=None, trial_until=None)))

    def ledger(self) -> list[Issued]:
        """Return what the CA issued to this fleet."""
        return self.first.ledger()

    def done(self) -> int:
        """Count the issuances that have ended well."""
        query = select(func.count()).where(issuances.c.state == "done")
        return self.db.read(lambda tx: tx.execute(query).scalar_one())

    def served(self) -> int:
        """Count the lineages with an active certificate."""
        query = select(func.count(certificates.c.lineage_id.distinct())).where(certificates.c.status == "active")
        return self.db.read(lambda tx: tx.execute(query).scalar_one())

    def wanted(self) -> int:
        """Count the lineages."""
        return self.db.read(lambda tx: tx.execute(select(func.count()).select_from(lineages)).scalar_one())

    def open(self) -> int:
        """Count the issuances under way."""
        query = select(func.count()).where(issuances.c.closed_at.is_(None))
        return self.db.read(lambda tx: tx.execute(query).scalar_one())


@contextmanager
def fleet_of(count: int, ca: Pebble, proxy: FaultProxy, folder: Path, url: str, **settings: str) -> Iterator[Fleet]:
    """Make a fleet on the migrated database at `url`; at the end nothing of it runs any more."""
    ports = free_ports(count)
    kek = str(folder / "kek")
    boxes = []
    for number, port in enumerate(ports):
        place = folder / f"worker-{number}"
        place.mkdir()
        ours = {
            "DATABASE_URL": url, "KEK_FILE": kek, "ACME_DIRECTORY_URL": proxy.directory_url,
            "ACME_CA_BUNDLE": str(proxy.ca_bundle), "RESPONDER_LISTEN": f"127.0.0.1:{port}", "SCAN_INTERVAL_SECS": "1",
        }  # fmt: skip
        boxes.append(Box.make(place, ca, node="none", **{**ours, **settings}))
        wiring.initialise(settings_of(boxes[-1]), schema.upgrade)
    sealer, issued_before = wiring.make_sealer(settings_of(boxes[0])), len(ca.ledger())
    db = open_database(url)
    crew = [Worker(box, box.folder / "run.log") for box in boxes]
    rigs = [
        Rig(ca, proxy, box, worker, db, url, sealer, None, issued_before)
        for box, worker in zip(boxes, crew, strict=True)
    ]
    try:
        with run_front(folder, ca.http_port, ports):
            yield Fleet(ca, proxy, db, url, rigs)
    finally:
        for worker in crew:
            if worker.process is not None:
                worker.kill()
        db.close()
