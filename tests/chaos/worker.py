"""A worker as an operator has it: `certworker run` in a process of its own, to be killed and started again.

A `Rig` is one such worker in one place, its database, and the fault proxy between it and Pebble. There is no
proxy of a gateway: the responder listens where Pebble looks.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Row, insert, select, text

from certworker import wiring
from certworker.cli.pebble import Issued, Pebble
from certworker.settings import Settings, load
from certworker.store import schema
from certworker.store.database import Database, open_database
from certworker.store.rows import new_id
from certworker.store.seal import Sealer
from certworker.store.tables import certificates, issuances, lineage_names, lineages, tls_policies
from tests.flow.box import Box, until
from tests.flow.test_takeover import masters

from .pgproxy import PostgresProxy
from .proxy import FaultProxy

_STOP_LIMIT = 30


@dataclass
class Worker:
    """The process that runs the service on a box."""

    box: Box
    log_path: Path
    """What all of its lives said."""
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    """By the monotonic clock."""
    under: tuple[str, ...] = ()
    """A program, with its arguments, that it is started by: prlimit(1), setpriv(1)."""

    def start(self) -> None:
        """Start it, in the same place with the same settings as before."""
        assert self.process is None, "it runs"
        self.started_at = time.monotonic()
        with self.log_path.open("ab") as out:
            self.process = subprocess.Popen(
                [*self.under, sys.executable, "-m", "certworker", "run"], env=self.box.environ, cwd=self.box.folder,
                stdout=out, stderr=out, process_group=0,
            )  # fmt: skip

    def kill(self) -> None:
        """kill -9, and wait until the kernel has cleaned up behind it."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM: it drains and ends with 0."""
        assert self._end(signal.SIGTERM) == 0, self.said()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, and wait for nothing."""
        self._running().send_signal(number)

    def wait(self, within: float = _STOP_LIMIT) -> int:
        """Wait until it has ended, and return its exit code."""
        code = self._running().wait(within)
        self.process = None
        return code

    def freeze(self) -> None:
        """SIGSTOP, and wait until every thread stands still: it holds all that it has, and does nothing."""
        self.send(signal.SIGSTOP)
        until(lambda: _thread_states(self.pid) == {"T"})

    def thaw(self) -> None:
        """SIGCONT: it goes on as if nothing had been."""
        self.send(signal.SIGCONT)

    def said(self) -> str:
        """Return the log of all its lives."""
        return self.log_path.read_text() if self.log_path.exists() else ""

    def command_line(self) -> str:
        """Return what everybody on the machine can read of it."""
        return Path(f"/proc/{self.pid}/cmdline").read_text()

    @property
    def pid(self) -> int:
        return self._running().pid

    def _running(self) -> subprocess.Popen[bytes]:
        assert self.process is not None, "it does not run"
        return self.process

    def _end(self, number: signal.Signals) -> int:
        self.send(number)
        return self.wait()


def _thread_states(pid: int) -> set[str]:
    """Return the states of a process's threads as proc(5) has them; "T" is stopped."""
    states = set()
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            states.add(path.read_text().rpartition(")")[2].split()[0])
    return states


@dataclass
class Rig:
    """One worker, its database, and the CA behind a proxy that breaks what it is told to."""

    ca: Pebble
    proxy: FaultProxy
    box: Box
    worker: Worker
    db: Database
    """The test's own connections."""
    url: str
    """Of the database, past any proxy."""
    sealer: Sealer
    _guard: PostgresProxy | None
    _issued_before: int
    """How many certificates the CA had issued to others."""

    @property
    def guard(self) -> PostgresProxy:
        """The proxy between the worker and PostgreSQL."""
        assert self._guard is not None, "this rig has none"
        return self._guard

    @property
    def database(self) -> str:
        """`sqlite` or `postgresql`."""
        return self.db.engine.dialect.name

    # -- what is wanted -------------------------------------------------------------------------------

    def want(self, *names: str) -> None:
        """Write a policy as any program of the gateway does."""
        policy = insert(tls_policies).values(id=new_id(), mode="auto", domains=list(names), status="pending")
        self.db.write(lambda tx: tx.execute(policy))

    def want_renewal(self) -> None:
        """Let every certificate be due now, as its plan would one day, once the CA's window has made the plan."""
        unplanned = select(lineages.c.id).where(
            lineages.c.certificate_id.is_not(None), lineages.c.window_start.is_(None)
        )
        until(lambda: not self.db.read(lambda tx: tx.execute(unplanned).all()))
        self.execute("UPDATE lineages SET renew_at = created_at")
        self.look_again()

    def look_again(self) -> None:
        """Let the next scan look at every lineage, whatever was to be waited for."""
        self.execute("UPDATE lineages SET next_check_at = created_at")

    def end_leases(self) -> None:
        """Let every lease end as if its time were over."""
        self.execute("UPDATE issuances SET lease_until = created_at WHERE lease_until IS NOT NULL")

    def end_waits(self) -> None:
        """Let what waits after a failure be tried again now, as `certworker renew` does."""
        self.execute("UPDATE issuances SET attempt_at = created_at WHERE lease_until IS NULL AND closed_at IS NULL")

    def execute(self, statement: str) -> None:
        """Run plain SQL."""
        self.db.write(lambda tx: tx.execute(text(statement)))

    # -- what there is --------------------------------------------------------------------------------

    def issuances(self, dns_name: str) -> list[Row[Any]]:
        """Return the rows of all issuances for a name, oldest first."""
        of_name = select(issuances).join(lineage_names, lineage_names.c.lineage_id == issuances.c.lineage_id)
        query = of_name.where(lineage_names.c.dns_name == dns_name).order_by(issuances.c.created_at)
        return list(self.db.read(lambda tx: tx.execute(query).all()))

    def issuance(self, dns_name: str) -> Row[Any]:
        """Return the row of the newest issuance for a name."""
        return self.issuances(dns_name)[-1]

    def serial(self, dns_name: str) -> str | None:
        """Return the serial of the active certificate for a name."""
        serving = (certificates.c.domain == dns_name, certificates.c.status == "active")
        return self.db.read(lambda tx: tx.execute(select(certificates.c.serial).where(*serving)).scalar())

    def is_served(self, dns_name: str) -> bool:
        """Say whether every live node has proved that it serves the certificate for a name."""
        of_name = select(lineages.c.served_at).join(lineage_names).where(lineage_names.c.dns_name == dns_name)
        return self.db.read(lambda tx: tx.execute(of_name).scalar()) is not None

    def ledger(self) -> list[Issued]:
        """Return what the CA issued since this rig was made."""
        return self.ca.ledger()[self._issued_before :]

    def accounts(self) -> int:
        """Count the accounts that the CA made."""
        return len(self.proxy.seen("newAccount", status=201))

    def orders(self) -> int:
        """Count the orders that the CA made."""
        return len(self.proxy.seen("newOrder", status=201))


@contextmanager
def rigged(
    ca: Pebble, proxy: FaultProxy, folder: Path, url: str, guard: PostgresProxy | None = None, **settings: str
) -> Iterator[Rig]:
    """Make a rig on the migrated database at `url`; at the end nothing of it runs any more."""
    box = _make_box(ca, proxy, folder, **{"DATABASE_URL": url, "KEK_FILE": str(folder / "kek"), **settings})
    asked = settings_of(box)
    wiring.initialise(asked, schema.upgrade)
    db = open_database(url)
    worker = Worker(box, folder / "run.log")
    try:
        yield Rig(ca, proxy, box, worker, db, url, wiring.make_sealer(asked), guard, len(ca.ledger()))
    finally:
        _end(worker)
        db.close()


@contextmanager
def successor_of(rig: Rig, folder: Path, **settings: str) -> Iterator[Worker]:
    """Make another worker for the same database, in a place of its own."""
    shared = {"DATABASE_URL": rig.url, "KEK_FILE": str(kek_path(rig))}
    worker = Worker(_make_box(rig.ca, rig.proxy, folder, **{**shared, **settings}), folder / "successor.log")
    try:
        yield worker
    finally:
        _end(worker)


def _make_box(ca: Pebble, proxy: FaultProxy, folder: Path, **settings: str) -> Box:
    ours = {
        "ACME_DIRECTORY_URL": proxy.directory_url, "ACME_CA_BUNDLE": str(proxy.ca_bundle),
        "RESPONDER_LISTEN": f"127.0.0.1:{ca.http_port}", "SCAN_INTERVAL_SECS": "1",
    }  # fmt: skip
    return Box.make(folder, ca, node="none", **{**ours, **settings})


def _end(worker: Worker) -> None:
    if worker.process is not None:
        worker.kill()
    for master in masters(worker.box):
        os.kill(master, signal.SIGTERM)  # it would outlive the test, as it outlives the worker
    print(worker.said())  # shown when the test has failed


def kek_path(rig: Rig) -> Path:
    """Return where the key-encryption key is."""
    return Path(rig.box.environ["CERTWORKER_KEK_FILE"])


def settings_of(box: Box) -> Settings:
    """Return the settings as the worker reads them."""
    return load({name: value for name, value in box.environ.items() if name.startswith("CERTWORKER_")})


def copy_sqlite(template: Path, folder: Path) -> str:
    """Return the URL of a copy of an empty, migrated database."""
    path = folder / "data" / "certworker.db"
    path.parent.mkdir(mode=0o700, parents=True)
    shutil.copy(template, path)
    return f"sqlite:///{path}"
