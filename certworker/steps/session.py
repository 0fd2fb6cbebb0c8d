"""One claimed issuance in work, and what it is worked on with.

Shared by `issue`, which moves it forward, `trouble`, which says what a failure leads to, and `crew`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import IntEnum, auto

from sqlalchemy import Connection

from certworker.ca.client import Account, Client
from certworker.clock import Clock
from certworker.core.budget import Limits
from certworker.core.issuance import State
from certworker.core.order import Authorization, Order
from certworker.core.renewal import is_urgent
from certworker.steps.gate import Gate
from certworker.steps.pace import Paces
from certworker.steps.register import Accounts
from certworker.store import challenges, issuances, lineages
from certworker.store.database import Database
from certworker.store.issuances import Issuance
from certworker.store.journal import Journal, Kind
from certworker.store.lineages import Lineage
from certworker.store.seal import Sealer


@dataclass(frozen=True, slots=True)
class Bench:
    """What an issuance is made with."""

    db: Database
    journal: Journal
    """Where the moves of issuances are written, those of several threads together."""
    client: Client
    accounts: Accounts
    gate: Gate
    """Whether the CA may be asked at all."""
    limits: Limits
    """What we allow ourselves at this CA."""
    sealer: Sealer
    clock: Clock
    paces: Paces
    """How soon the CA is done."""
    draw: Callable[[], float]
    """Uniform in [0, 1): spreads retries."""
    look_up: Callable[[str], object]
    """What DNS says of a name, as text: for the hint after a failed validation."""
    look_up_caa: Callable[[str], object]
    """Who may issue for it, as DNS says."""
    unready: Callable[[Sequence[str], str], str | None]
    """Why not every proxy answers challenges for these names with this thumbprint; None if all do."""
    moved: Callable[["Session"], None]
    """Told after every commit, for logs and progress; must not raise."""


@dataclass(slots=True)
class Session:
    """A claimed issuance in work: the committed row, and what the CA said since it was claimed."""

    issuance: Issuance
    lineage: Lineage
    order: Order | None = None
    """None: look first."""
    authorizations: tuple[Authorization, ...] | None = None
    intended: bool = False
    """Its order was intended in this session, so that it was asked a moment ago whether anybody wants it."""
    looks: int = 0
    """How often it was looked whether the CA is done with what it is at, since it showed that it is at it."""
    first_wait: timedelta = timedelta()
    """How long it was waited before the first of these looks."""
    answers: Mapping[str, str] = field(default_factory=dict)
    """What the CA fetches while this issuance is proved: key authorizations by token, committed."""
    expected: tuple[str, ...] = ()
    """Tokens that the crew knows it by."""
    told: bool = False
    """The CA is told to look, or was."""
    fetched: bool = False
    """The CA has fetched one of them."""
    wait_until: datetime | None = None
    """Set by `advance`: nothing to do before."""
    account: Account | None = None
    """What the last request was signed with."""
    kept_at: float = 0.0
    """When its lease was last known to be held, by this process's monotonic clock; set by the crew."""
    recovered: bool = False
    """The account was found again since it last moved; if that did not help, trying at once will not either."""
    unsure: bool = False
    """The database failed in the middle of it: what is committed has to be read before anything is sent."""

    @property
    def dns_names(self) -> list[str]:
        """What is ordered."""
        return self.issuance.dns_names or self.lineage.dns_names

    def is_urgent(self, now: datetime) -> bool:
        """Say whether the certificate that serves is about to end."""
        return is_urgent(now, self.lineage.validity)

    def order_has_expired(self, now: datetime) -> bool:
        """Say whether the CA may forget the order by now."""
        expires_at = self.issuance.order_expires_at
        return expires_at is not None and expires_at <= now

    def look_anew(self) -> None:
        """Forget what the CA said."""
        self.order, self.authorizations, self.told = None, None, False


def open_sessions(tx: Connection, claimed: Sequence[Issuance]) -> list[Session]:
    """Return claimed issuances ready for `advance`."""
    found = lineages.find_all(tx, [issuance.lineage_id for issuance in claimed])
    return [Session(issuance, found[issuance.lineage_id]) for issuance in claimed]


class Turn(IntEnum):
    """In which order the moves of one commit are written, the same in every worker: by what they lock first."""

    INTEND = auto()  # rate buckets, before anything else (`budget.Ledger`)
    ACTIVATE = auto()  # lineages, issuances, policies, the counter of revisions
    FINALIZE = auto()  # issuances
    RECORD = auto()  # issuances
    PUBLISH = auto()  # accounts, which any number may hold, and issuances


RECORD = Kind(Turn.RECORD, issuances.record_all)


def record(bench: Bench, session: Session, state: State, **values: object) -> None:
    """Commit that the CA, or we, have taken the issuance to `state`; what failed before is forgotten."""
    change = issuances.change(session.issuance, bench.clock(), state=state, failures=0, error=None, **values)
    session.issuance = bench.journal.write(RECORD, change)


def account_of(bench: Bench, session: Session) -> Account:
    """Return the account the order is made with; AccountGone if another program has deleted it."""
    session.account = bench.accounts.get(session.issuance.account_id or "")
    return session.account


def cancel(tx: Connection, session: Session, now: datetime, **values: object) -> Issuance:
    """Close an issuance that nobody wants any more, and keep `values` of it."""
    challenges.withdraw(tx, [session.issuance.id])
    # The scan takes it out, or queues it anew if somebody wants it again.
    lineages.set_next_check(tx, session.lineage.id, now, now)
    return issuances.close(tx, session.issuance, State.CANCELLED, now, **values)


def cancel_unlinked(tx: Connection, session: Session, now: datetime, **values: object) -> Issuance:
    """The same for one that was not written because no policy names it; LeaseLost if that was not why."""
    if lineages.is_linked(tx, session.lineage.id):
        raise issuances.lease_lost(session.issuance)
    return cancel(tx, session, now, **values)


def read_again(bench: Bench, session: Session) -> None:
    """Take up what is committed, whatever became of the last write; LeaseLost if it is not ours any more."""
    session.issuance = bench.db.read(lambda tx: issuances.read_again(tx, session.issuance))
    session.look_anew()
    session.unsure = False


def give_back(bench: Bench, session: Session, attempt_at: datetime, *, worked_on: bool = False) -> None:
    """Release an issuance that waits; whoever claims it next looks first. One that was `worked_on` kills nobody."""
    now, known = bench.clock(), {"crashes": 0} if worked_on else {}
    session.issuance = bench.db.write(lambda tx: issuances.release(tx, session.issuance, attempt_at, now, **known))
