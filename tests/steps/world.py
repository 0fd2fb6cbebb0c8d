"""A small world for steps: a real database, a CA in memory, a clock that tests move."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import text

from certworker.ca.client import Client
from certworker.ca.transport import Http
from certworker.core.budget import Limits
from certworker.steps import barrier
from certworker.steps.gate import Gate
from certworker.steps.issue import advance
from certworker.steps.pace import Pace, Paces
from certworker.steps.reconcile import Wanted, reconcile
from certworker.steps.register import Accounts, Registration
from certworker.steps.scan import scan
from certworker.steps.session import Bench, Session, open_sessions
from certworker.store import challenges, issuances, lineages, policies
from certworker.store.database import Database, Transaction
from certworker.store.issuances import Issuance
from certworker.store.journal import Journal
from certworker.store.lineages import Issuer, Lineage
from certworker.store.rows import new_id
from certworker.store.seal import Sealer
from tests.ca.fake import FakeCa

START = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
KEK = bytes(range(32))
NODE_SILENT = timedelta(seconds=60)


@dataclass
class Clock:
    """A clock that stands still until it is moved."""

    now: datetime = START

    def __call__(self) -> datetime:
        return self.now

    def move(self, by: timedelta) -> None:
        self.now += by


class World:
    """Everything a step is handed, and short words for what tests do with it."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.clock = Clock()
        self.ca = FakeCa(self.clock, validate=self.answer)
        self.sealer = Sealer(KEK)
        self.wanted = Wanted(Issuer(self.ca.directory_url, "", "ecdsa-p256"), private_ca=True)
        self.registration = Registration(self.ca.directory_url, ("mailto:ops@example.com",), terms_agreed=True)
        self.limits = Limits()
        self.draw = 0.5
        self.moves: list[str] = []
        self.looked_up: list[str] = []
        self.closed_names: set[str] = set()
        """Names whose port 80 nobody listens on."""
        self.worker = new_id()

    def answer(self, token: str, dns_name: str) -> str | None:
        if dns_name in self.closed_names:
            return None
        return self.db.read(lambda tx: challenges.find_key_authorization(tx, token))

    def bench(self, http: Http | None = None) -> Bench:
        """Return a bench as a new process would have it: nothing remembered."""
        client = Client(self.ca.directory_url, http or self.ca.http, self.clock)
        accounts = Accounts(self.db, client, self.sealer, self.clock, self.registration)
        gate = Gate(self.db, self.ca.directory_url, self.clock, lambda: self.draw, self.worker, "as in tests")
        return Bench(
            self.db, Journal(self.db), client, accounts, gate, self.limits, self.sealer, self.clock,
            Paces(Pace(), Pace()), lambda: self.draw, self._look_up,
            lambda dns_name: f'CAA records of {dns_name}: 0 issue "other.example"', self._unready,
            self._moved,
        )  # fmt: skip

    def _look_up(self, dns_name: str) -> str:
        self.looked_up.append(dns_name)
        return "A 127.0.0.1, no AAAA record"

    def _unready(self, dns_names: Sequence[str], thumbprint: str) -> str | None:
        return self.db.read(lambda tx: barrier.why_not(tx, dns_names, thumbprint, NODE_SILENT))

    def _moved(self, session: Session) -> None:
        self.moves.append(session.issuance.state)

    # -- what is wanted -------------------------------------------------------------------------------

    def add_policy(self, *names: str, shared: bool = False, mode: str = "auto") -> str:
        now = self.clock()
        return self.db.write(lambda tx: policies.add(tx, list(names), now, mode=mode, shared=shared))

    def take_over(self) -> None:
        """Reconcile and scan."""
        reconcile(self.db, self.clock, self.wanted, self.sealer, thumbprint=self.bench().accounts.thumbprint)
        scan(self.db, self.clock)

    # -- work -----------------------------------------------------------------------------------------

    def claim(self, limit: int = 100) -> list[Session]:
        now = self.clock()
        return self.db.write(lambda tx: open_sessions(tx, issuances.claim(tx, self.worker, now, limit)))

    def work(self, patience: int = 200) -> None:
        """Move everything that is due until nothing is, letting time pass while the CA is busy."""
        bench = self.bench()
        for session in self.claim():
            for _ in range(patience):
                if not session.issuance.is_open or session.issuance.lease_owner is None:
                    break
                advance(bench, session)
                if session.wait_until is not None and session.issuance.lease_owner is not None:
                    self.clock.now = max(self.clock.now, session.wait_until)

    def issue(self, *names: str) -> Lineage:
        """Add a policy and take it all the way."""
        self.add_policy(*names)
        self.take_over()
        self.work()
        return self.lineage(names[0])

    def crash(self) -> None:
        """Let every lease end, as if the worker had died long ago."""
        self.db.write(issuances.free_dead_leases)

    def add_orphan(self, dns_name: str) -> str:
        """Leave an issuance that this worker has claimed and does not know of; return its id."""
        self.add_policy(dns_name)
        reconcile(self.db, self.clock, self.wanted, self.sealer)
        lineage, now = self.lineage(dns_name), self.clock()
        later = now + timedelta(days=1)

        def leave(tx: Transaction) -> str:
            issuance_id = issuances.queue(tx, lineage.id, "first", later)
            assert issuance_id is not None
            issuances.claim(tx, self.worker, later, 1, [issuance_id])
            return issuance_id

        return self.db.write(leave)

    # -- what there is --------------------------------------------------------------------------------

    def lineage(self, dns_name: str) -> Lineage:
        (found,) = self.db.read(lambda tx: lineages.naming(tx, dns_name))
        return found

    def last_issuance(self, dns_name: str) -> Issuance:
        lineage = self.lineage(dns_name)
        return self.db.read(lambda tx: issuances.history(tx, lineage.id))[0]

    def policy_status(self, policy_id: str) -> str:
        found = self.db.read(lambda tx: policies.find(tx, policy_id))
        assert found is not None
        return found.status

    def rows(self, query: str, **values: Any) -> list[tuple[Any, ...]]:
        """Return what a plain SQL query finds."""
        return [tuple(row) for row in self.db.read(lambda tx: tx.execute(text(query), values).all())]

    def execute(self, statement: str, **values: Any) -> None:
        """Run plain SQL, as another program would."""
        self.db.write(lambda tx: tx.execute(text(statement), values))

    def count(self, table: str) -> int:
        return int(self.rows(f"SELECT count(*) FROM {table}")[0][0])
