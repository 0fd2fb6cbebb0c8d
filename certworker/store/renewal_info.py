"""What CAs say of renewals (RFC 9773): columns of `lineages`, written only for the certificate they are about.

Every write names the certificate and the look that it comes from. A look that took so long that the
certificate was replaced meanwhile, or that another worker asked too, changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, Update, and_, bindparam, case, exists, null, or_, select, text, update

from certworker.core.certificate import Validity
from certworker.core.issuance import State
from certworker.core.renewal import Predecessor, RenewalInfo, Window, due_at, may_replace
from certworker.store.rows import among
from certworker.store.tables import OPEN, issuances, lineages
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


@dataclass(frozen=True, slots=True)
class Advice:
    """What the CA said of a certificate at `at`, the moment that was drawn from it, and when to ask again."""

    watched: Watched
    said: RenewalInfo
    planned_at: datetime
    check_at: datetime
    at: datetime


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why the CA could not be asked at `at`, and when to try again."""

    watched: Watched
    error: dict[str, Any]
    check_at: datetime
    at: datetime


_DUE = (lineages.c.directory_url == bindparam("ca"), lineages.c.ari_check_at <= bindparam("now"))
_ANY_DUE = select(1).where(*_DUE).limit(1)
_LONGEST_DUE = (
    select(lineages.c.id)
    .where(*_DUE)
    .order_by(lineages.c.ari_check_at)
    .limit(bindparam("most"))
    .with_for_update(skip_locked=True)
)
_VALID = and_(lineages.c.renewal_id.is_not(None), lineages.c.not_after > bindparam("now"))
_WANTED = lineages.c.next_check_at.is_not(None)
_NEXT_LOOK = case(
    (and_(_VALID, _WANTED), bindparam("held_until", type_=UtcTime)),
    (_VALID, bindparam("looked_at_again", type_=UtcTime)),
    else_=null(),
)
_TAKE = (
    update(lineages)
    .where(among(lineages.c.id, "ids"))
    .values(ari_check_at=_NEXT_LOOK)
    .returning(
        lineages.c.id, lineages.c.dns_names, lineages.c.renewal_id, lineages.c.not_before, lineages.c.not_after,
        lineages.c.window_start, lineages.c.window_end, lineages.c.renew_at, lineages.c.ari_failures,
        lineages.c.ari_check_at, lineages.c.next_check_at,
    )
)  # fmt: skip


def any_due(tx: Connection, directory_url: str, now: datetime) -> bool:
    """Say whether there is a certificate that this CA is to be asked about by `now`."""
    return tx.execute(_ANY_DUE, {"ca": directory_url, "now": now}).first() is not None


def due(tx: Connection, directory_url: str, now: datetime, limit: int, hold: timedelta) -> list[Watched] | None:
    """Take up to `limit` certificates that this CA is to be asked about by `now`; None when there are no more.

    They are not due again before `hold` is over, so that two workers do not ask twice. A certificate that has
    ended is never asked about again, one that nobody wants not while that is so: neither is returned.
    """
    ids = list(tx.execute(_LONGEST_DUE, {"ca": directory_url, "now": now, "most": limit}).scalars())
    if not ids:
        return None
    held_until = now + hold
    looks = {"now": now, "held_until": held_until, "looked_at_again": now + _UNWANTED}
    rows = tx.execute(_TAKE, {"ids": ids, **looks}).all()
    return [_watched(row, held_until) for row in rows if row.ari_check_at is not None and row.next_check_at is not None]


def _watched(row: Row[Any], held_until: datetime) -> Watched:
    return Watched(
        row.id, row.dns_names, row.renewal_id, Validity(row.not_before, row.not_after),
        None if row.window_start is None else Window(row.window_start, row.window_end),
        row.renew_at, row.ari_failures, held_until,
    )  # fmt: skip


# -- what is written, of any number in one statement ----------------------------------------------------

_STILL_HELD = (
    lineages.c.id == bindparam("lineage"),
    lineages.c.renewal_id == bindparam("asked_about"),
    lineages.c.ari_check_at == bindparam("held_until"),
)
_OPEN_ONE = exists(select(1).where(issuances.c.lineage_id == lineages.c.id, text(f"issuances.{OPEN}")))
_SOONER = bindparam("sooner", type_=UtcTime)
_AWAITS_PLAN = or_(lineages.c.failures == 0, lineages.c.next_check_at == bindparam("planned_before", type_=UtcTime))
# The scan looks sooner if the new plan is, and if it is a plan that it waits for. What a failure has scheduled, or
# an issuance under way, is not brought forward: the scan obeys the new plan when it comes to that. Nor is anything
# put off: the scan finds by itself that it came too soon.
_NEXT_SCAN = case(
    (and_(lineages.c.next_check_at > _SOONER, _AWAITS_PLAN, ~_OPEN_ONE), _SOONER), else_=lineages.c.next_check_at
)
_RECORD = (
    update(lineages)
    .where(*_STILL_HELD)
    .values(
        window_start=bindparam("start"), window_end=bindparam("end"), window_url=bindparam("explained_at"),
        renew_at=bindparam("planned"), next_check_at=_NEXT_SCAN, ari_check_at=bindparam("again"), ari_failures=0,
        ari_error=None, updated_at=bindparam("at"),
    )
)  # fmt: skip
_RECORD_TROUBLE = (
    update(lineages)
    .where(*_STILL_HELD)
    .values(
        ari_check_at=bindparam("again"), ari_failures=bindparam("failed"), ari_error=bindparam("said"),
        updated_at=bindparam("at"),
    )
)  # fmt: skip


def record(tx: Connection, answers: Sequence[Advice]) -> None:
    """Note what the CA said of each of these."""
    _write(tx, _RECORD, [
        {
            **_held(one.watched), "start": one.said.window.start, "end": one.said.window.end,
            "explained_at": one.said.explanation_url, "planned": one.planned_at, "again": one.check_at, "at": one.at,
            "sooner": due_at(one.watched.validity, one.planned_at),
            "planned_before": due_at(one.watched.validity, one.watched.planned_at),
        }
        for one in answers
    ])  # fmt: skip


def record_trouble(tx: Connection, troubles: Sequence[Trouble]) -> None:
    """Note why the CA could not be asked about each of these; the last window and its moment stay."""
    _write(tx, _RECORD_TROUBLE, [
        {
            **_held(one.watched), "again": one.check_at, "failed": one.watched.failures + 1, "said": one.error,
            "at": one.at,
        }
        for one in troubles
    ])  # fmt: skip


def _held(watched: Watched) -> dict[str, Any]:
    return {"lineage": watched.lineage_id, "asked_about": watched.renewal_id, "held_until": watched.held_until}


def _write(tx: Connection, statement: Update, rows: list[dict[str, Any]]) -> None:
    if rows:
        tx.execute(statement, sorted(rows, key=lambda row: row["lineage"]))  # as everybody locks lineages


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
