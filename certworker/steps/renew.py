"""A person asks for renewals: requests are issuances, whoever then works on them.

`request` queues, `Progress` tells how far they are. Nothing here talks to a CA, so a command may ask the
running service by rows and wait.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from certworker.clock import Clock
from certworker.core.issuance import State
from certworker.core.names import check_name
from certworker.core.renewal import Decision, Reason, Renew
from certworker.errors import UnknownName
from certworker.steps import scan
from certworker.store import issuances, lineages, policies
from certworker.store.database import Database
from certworker.store.issuances import Issuance, Result
from certworker.store.lineages import LeftOut, Lineage, Planned

_PAGE = 500


_CANCELLED = {
    "class": "cancelled",
    "type": "certworker:cancelled",
    "detail": "no policy wants it any more",
    "hint": "see `certworker policy list`",
}


@dataclass(frozen=True, slots=True)
class Ticket:
    """One lineage that is being renewed."""

    lineage_id: str
    dns_names: tuple[str, ...]
    issuance_id: str

    @property
    def name(self) -> str:
        return self.dns_names[0]


@dataclass(slots=True)
class Request:
    """What was asked for."""

    tickets: list[Ticket] = field(default_factory=list)
    would_renew: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason), for a dry run."""
    unchanged: int = 0
    """Named, but not due."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one ticket stands."""

    ticket: Ticket
    result: str
    """`renewed`, `failed` or `waiting`."""
    error: dict[str, Any] | None = None
    serial: str | None = None
    fingerprint: str | None = None
    expires_at: datetime | None = None
    served: bool | None = None
    """True when every live node proved it; None without nodes, or when there is nothing to serve."""
    attempt_at: datetime | None = None
    """When a waiting one is tried again."""
    state: str = ""
    """The state of its issuance."""
    left_out: tuple[str, ...] = ()
    """Names that the CA refused, and that the new certificate does not have."""

    def document(self) -> dict[str, Any]:
        """Return it as `renew --json` shows it."""
        shown: dict[str, Any] = {"name": self.ticket.name, "lineage_id": self.ticket.lineage_id, "served": self.served}
        if self.result == "renewed":
            expires_at = None if self.expires_at is None else self.expires_at.isoformat()
            shown |= {"serial": self.serial, "expires_at": expires_at, "fingerprint_sha256": self.fingerprint}
            shown |= {"left_out": list(self.left_out)} if self.left_out else {}
        else:
            shown["error"] = {key: self._error().get(key) for key in ("class", "type", "detail", "retry_at", "hint")}
        return shown

    def _error(self) -> dict[str, Any]:
        if self.error is not None:
            return self.error
        again = None if self.attempt_at is None else self.attempt_at.isoformat()
        return {
            "class": "waiting", "type": f"certworker:{self.state}", "detail": "it is under way and nothing has failed",
            "retry_at": again, "hint": "ask again later, or give it more time with --timeout",
        }  # fmt: skip


def request(
    db: Database, clock: Clock, names: Sequence[str], *, force: bool, dry_run: bool, private_ca: bool,
    directory_url: str | None = None,
) -> Request:  # fmt: skip
    """Queue what is due, or of `names` what is due (all of them with `force`).

    Without names it is everything open at `directory_url`: what was begun at another CA nobody goes on with.

    Raises UnknownName, before anything is queued, for a name that no policy wants.
    """
    if not names:
        return _request_due(db, clock, directory_url, force=force, dry_run=dry_run)
    wanted = [check_name(name, private_ca=private_ca) for name in names]
    found = db.read(lambda tx: _find(tx, wanted))
    return _request(db, clock, found, force=force, dry_run=dry_run, named=True)


def outcomes(tx: Connection, tickets: Sequence[Ticket], to_serve: Collection[str]) -> list[Outcome]:
    """Return how tickets stand now, in their order; `to_serve` has the lineages that nodes are to serve."""
    found = issuances.results(tx, [ticket.issuance_id for ticket in tickets])
    served = lineages.served_among(tx, to_serve)
    proved = {lineage_id: lineage_id in served for lineage_id in to_serve}
    return [_judge(ticket, found.get(ticket.issuance_id), proved.get(ticket.lineage_id)) for ticket in tickets]


def _judge(ticket: Ticket, issuance: Result | None, served: bool | None) -> Outcome:
    if issuance is None:
        return Outcome(ticket, "failed", error=_CANCELLED)
    match State(issuance.state):
        case State.DONE:
            ordered = issuance.dns_names or ticket.dns_names
            return Outcome(
                ticket, "renewed", serial=issuance.serial, fingerprint=issuance.fingerprint,
                expires_at=issuance.not_after, served=served,
                left_out=tuple(name for name in ticket.dns_names if name not in ordered),
            )  # fmt: skip
        case State.FAILED:
            return Outcome(ticket, "failed", error=issuance.error)
        case State.CANCELLED:
            return Outcome(ticket, "failed", error=_CANCELLED)
        case _:
            return Outcome(
                ticket, "waiting", error=issuance.error, attempt_at=issuance.attempt_at, state=issuance.state
            )


def _find(tx: Connection, names: list[str]) -> list[Lineage]:
    found: dict[str, Lineage] = {}
    for name in names:
        wanted = [lineage for lineage in lineages.naming(tx, name) if lineages.is_wanted(tx, lineage.id)]
        if not wanted and any(policy.paused_at for policy in policies.wanting(tx, name)):
            raise UnknownName(f"name {name!r}: its policy is paused; see `certworker policy resume`")
        if not wanted:
            raise UnknownName(
                f"name {name!r}: no policy wants a certificate for it; add it with `certworker policy add`"
            )
        found |= {lineage.id: lineage for lineage in wanted}
    return sorted(found.values(), key=lambda lineage: lineage.id)  # as everybody locks them


def _request_due(db: Database, clock: Clock, directory_url: str | None, *, force: bool, dry_run: bool) -> Request:
    asked = Request()
    if force:
        after = ""
        while page := db.read(lambda tx: lineages.list_wanted(tx, after=after, limit=_PAGE)):  # noqa: B023
            _merge(asked, _request(db, clock, page, force=True, dry_run=dry_run))
            after = page[-1].id
        return asked
    now = clock()
    if dry_run:
        return _request(db, clock, db.read(lambda tx: lineages.peek_due(tx, now)), force=False, dry_run=True)
    scan.scan(db, clock)
    open_ones = db.read(lambda tx: issuances.list_open(tx, directory_url))
    for issuance, names in open_ones:
        asked.tickets.append(Ticket(issuance.lineage_id, tuple(names), issuance.id))
    return asked


def _request(
    db: Database, clock: Clock, found: Sequence[Planned], *, force: bool, dry_run: bool, named: bool = False
) -> Request:
    now = clock()
    ids = [lineage.id for lineage in found]

    def look(tx: Connection) -> _Look:
        left_out = scan.names_left_out(tx, found)
        decisions = {one.id: _decide(one, left_out.get(one.id, []), now, force=force, named=named) for one in found}
        return _Look(decisions, issuances.find_open_all(tx, ids), list(left_out) if force or named else [])

    def preview(tx: Connection) -> Request:
        seen = look(tx)
        due = [one for one in found if seen.is_due(one.id)]
        would_renew: list[tuple[str, str]] = [(one.dns_names[0], seen.reason(one.id)) for one in due]
        return Request(would_renew=would_renew, unchanged=len(found) - len(due))

    def queue(tx: Connection) -> Request:
        lineages.lock_all(tx, ids)  # the service's scan may be about to queue them
        seen = look(tx)
        for lineage_id in seen.lacking:
            lineages.probe_now(tx, lineage_id, now)
        for issuance in seen.open_ones.values():
            _hurry(tx, issuance, now)
        due = [one for one in found if seen.is_due(one.id)]
        fresh = [one for one in due if one.id not in seen.open_ones]
        queued = scan.queue(tx, fresh, {one.id: seen.reason(one.id) for one in fresh}, now)
        queued |= {lineage_id: issuance.id for lineage_id, issuance in seen.open_ones.items()}
        tickets = [Ticket(one.id, tuple(one.dns_names), queued[one.id]) for one in due]
        return Request(tickets, unchanged=len(found) - len(due))

    return db.read(preview) if dry_run else db.write(queue)


@dataclass(frozen=True, slots=True)
class _Look:
    """What is found of lineages that a person asks for, by lineage id."""

    decisions: dict[str, Decision]
    open_ones: dict[str, Issuance]
    lacking: list[str]
    """Those whose next order is to have the names too that were left out."""

    def is_due(self, lineage_id: str) -> bool:
        return lineage_id in self.open_ones or isinstance(self.decisions[lineage_id], Renew)

    def reason(self, lineage_id: str) -> Reason:
        decision = self.decisions[lineage_id]
        return decision.reason if isinstance(decision, Renew) else Reason.FORCED


def _decide(lineage: Planned, left_out: list[LeftOut], now: datetime, *, force: bool, named: bool) -> Decision:
    """Decide as the scan does, but for what a person asked: all, or every name of a certificate that lacks some."""
    decision = scan.decide(lineage, left_out, now)
    if isinstance(decision, Renew):
        return decision
    if (force or named) and left_out:
        return Renew(Reason.NAMES_MISSING)
    return Renew(Reason.FORCED) if force else decision


def _hurry(tx: Connection, issuance: Issuance, now: datetime) -> None:
    """A person asked: do not wait out our own back-off. The CA's wish to wait and the rate ledger stand."""
    if issuance.attempt_at > now and (issuance.error is None or issuance.error.get("asked_by") is None):
        issuances.bring_forward(tx, issuance.id, now)


def _merge(into: Request, more: Request) -> None:
    into.tickets += more.tickets
    into.would_renew += more.would_renew
    into.unchanged += more.unchanged
