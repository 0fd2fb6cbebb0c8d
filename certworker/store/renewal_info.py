"""What CAs say of renewals (RFC 9773): columns of `lineages`, written only for the certificate they are about.

Every write names the certificate and the look that it comes from. A look that took so long that the
certificate was replaced meanwhile, or that another worker asked too, changes nothing.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, and_, case, exists, literal, null, or_, select, text, update

from certworker.core.certificate import Validity
from certworker.core.issuance import State
from certworker.core.renewal import Predecessor, RenewalInfo, Window, due_at, may_replace
from certworker.store.tables import OPEN_STATE, issuances, lineages
from certworker.store.types import UtcTime

_UNWANTED = timedelta(hours=6)
"""How often it is looked whether somebody wants a lineage again whose certificate only serves until its end."""


@dataclass(frozen=True, slots=True)
class Watched:
    """A certificate that its CA is to be asked about, until `held_until` by one worker only."""

    lineage_id: str
    dns_names: list[str]
    renewal_id: str
    validity: Validity
    window: Window | None
    """What the CA said last."""
    planned_at: datetime | None
    failures: int
    held_until: datetime


def any_due(tx: Connection, directory_url: str, now: datetime) -> bool:
    """Say whether there is a certificate that this CA is to be asked about by `now`."""
    return tx.execute(select(1).where(*_due(directory_url, now)).limit(1)).first() is not None


def due(tx: Connection, directory_url: str, now: datetime, limit: int, hold: timedelta) -> list[Watched] | None:
    """Take up to `limit` certificates that this CA is to be asked about by `now`; None when there are no more.

    They are not due again before `hold` is over, so that two workers do not ask twice. A certificate that has
    ended is never asked about again, one that nobody wants not while that is so: neither is returned.
    """
    query = select(lineages.c.id).where(*_due(directory_url, now)).order_by(lineages.c.ari_check_at).limit(limit)
    ids = list(tx.execute(query.with_for_update(skip_locked=True)).scalars())
    if not ids:
        return None
    held_until = now + hold
    valid = and_(lineages.c.renewal_id.is_not(None), lineages.c.not_after > now)
    wanted = lineages.c.next_check_at.is_not(None)
    next_look = case(
        (and_(valid, wanted), literal(held_until, UtcTime)), (valid, literal(now + _UNWANTED, UtcTime)), else_=null()
    )
    taken = update(lineages).where(lineages.c.id.in_(ids)).values(ari_check_at=next_look)
    rows = tx.execute(taken.returning(*lineages.c)).all()
    return [_watched(row, held_until) for row in rows if row.ari_check_at is not None and row.next_check_at is not None]


def _watched(row: Row[Any], held_until: datetime) -> Watched:
    return Watched(
        row.id, row.dns_names, row.renewal_id, Validity(row.not_before, row.not_after),
        None if row.window_start is None else Window(row.window_start, row.window_end),
        row.renew_at, row.ari_failures, held_until,
    )  # fmt: skip


def _due(directory_url: str, now: datetime) -> tuple[Any, ...]:
    return lineages.c.directory_url == directory_url, lineages.c.ari_check_at <= now


def record(
    tx: Connection, watched: Watched, said: RenewalInfo, planned_at: datetime, check_at: datetime, now: datetime
) -> None:
    """Note what the CA said, the moment that was drawn from it, and when to ask again."""
    _write(
        tx, watched, now, window_start=said.window.start, window_end=said.window.end,
        window_url=said.explanation_url, renew_at=planned_at, next_check_at=_next_check(watched, planned_at),
        ari_check_at=check_at, ari_failures=0, ari_error=None,
    )  # fmt: skip


def _next_check(watched: Watched, planned_at: datetime) -> Any:
    """Return when the scan looks next: sooner if the new plan is, and if it is a plan that the scan waits for.

    What a failure has scheduled, or an issuance under way, is not brought forward: the scan obeys the new plan
    when it comes to that. Nor is anything put off: the scan finds by itself that it came too soon.
    """
    at, sooner = lineages.c.next_check_at, due_at(watched.validity, planned_at)
    open_one = exists(select(1).where(issuances.c.lineage_id == lineages.c.id, text(f"issuances.{OPEN_STATE}")))
    awaits_plan = or_(lineages.c.failures == 0, at == due_at(watched.validity, watched.planned_at))
    return case((and_(at > sooner, awaits_plan, ~open_one), literal(sooner, UtcTime)), else_=at)


def record_failure(tx: Connection, watched: Watched, error: dict[str, Any], check_at: datetime, now: datetime) -> None:
    """Note why the CA could not be asked, and when to try again; the last window and its moment stay."""
    _write(tx, watched, now, ari_check_at=check_at, ari_failures=watched.failures + 1, ari_error=error)


def _write(tx: Connection, watched: Watched, now: datetime, **values: Any) -> None:
    same = (lineages.c.renewal_id == watched.renewal_id, lineages.c.ari_check_at == watched.held_until)
    row = update(lineages).where(lineages.c.id == watched.lineage_id, *same)
    tx.execute(row.values(**values, updated_at=now))


def find_replaceable(tx: Connection, lineage_id: str, account_id: str, now: datetime) -> str | None:
    """Return what an order of this account may say that it `replaces`; None to say nothing (RFC 9773 §5).

    The CA's directory has to offer renewalInfo, else it does not know the word.
    """
    query = (
        select(lineages.c.renewal_id, lineages.c.not_after, issuances.c.account_id)
        .join_from(lineages, issuances, issuances.c.id == lineages.c.issuance_id)
        .where(lineages.c.id == lineage_id, lineages.c.renewal_id.is_not(None), lineages.c.not_after.is_not(None))
    )
    row = tx.execute(query).first()
    if row is None:
        return None
    predecessor = Predecessor(row.not_after, row.account_id, _is_replaced(tx, row.renewal_id))
    return row.renewal_id if may_replace(predecessor, account_id, now) else None


def _is_replaced(tx: Connection, renewal_id: str) -> bool:
    given_up = issuances.c.state.in_([State.FAILED, State.CANCELLED])
    query = select(1).where(issuances.c.replaces == renewal_id, ~given_up)
    return tx.execute(query.limit(1)).first() is not None
