"""Renewal information: taken by one worker at a time, written for one certificate only, and what may be replaced."""

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, insert, select, update

from certworker.core.certificate import Validity
from certworker.core.issuance import CLOSED, State
from certworker.core.renewal import RenewalInfo, Window
from certworker.store import accounts, issuances, renewal_info
from certworker.store.database import Database
from certworker.store.renewal_info import Advice, Trouble, Watched
from certworker.store.rows import new_id
from certworker.store.tables import issuances as issuance_rows
from certworker.store.tables import lineages as lineage_rows

from .conftest import ISSUER, NOW, add_lineage
from .plans import explain

DAY, HOUR, MINUTE = timedelta(days=1), timedelta(hours=1), timedelta(minutes=1)
HOLD = 10 * MINUTE
PLANNED = NOW + 55 * DAY
SAID = RenewalInfo(Window(NOW + 30 * DAY, NOW + 32 * DAY), "https://ca.test/why", 6 * HOUR)
CHOSEN = NOW + 31 * DAY
"""A moment of that window."""


def serve(db: Database, name: str = "a.test", **columns: Any) -> str:
    """Let a lineage have a certificate of 90 days since NOW, wanted and to be asked about now; return its id."""
    serving = {
        "certificate_id": new_id(), "issuance_id": new_id(), "not_before": NOW, "not_after": NOW + 90 * DAY,
        "renew_at": PLANNED, "next_check_at": PLANNED, "renewal_id": f"id.{name}", "ari_check_at": NOW,
    }  # fmt: skip

    def write(tx: Connection) -> str:
        lineage_id = add_lineage(tx, [name])
        tx.execute(update(lineage_rows).where(lineage_rows.c.id == lineage_id).values(**{**serving, **columns}))
        return lineage_id

    return db.write(write)


def take(db: Database, limit: int = 100, at: timedelta = timedelta(0)) -> list[Watched] | None:
    return db.write(lambda tx: renewal_info.due(tx, ISSUER.directory_url, NOW + at, limit, HOLD))


def take_one(db: Database) -> Watched:
    taken = take(db)
    assert taken is not None
    (watched,) = taken
    return watched


def row_of(db: Database, lineage_id: str) -> Any:
    return db.read(lambda tx: tx.execute(select(lineage_rows).where(lineage_rows.c.id == lineage_id)).one())


def change(db: Database, lineage_id: str, **columns: Any) -> None:
    db.write(lambda tx: tx.execute(update(lineage_rows).where(lineage_rows.c.id == lineage_id).values(**columns)))


def record(db: Database, watched: Watched, said: RenewalInfo = SAID, planned_at: Any = CHOSEN) -> None:
    answers = [Advice(watched, said, planned_at, NOW + 6 * HOUR, NOW)]
    db.write(lambda tx: renewal_info.record(tx, answers))


def fail(db: Database, watched: Watched, error: dict[str, Any]) -> None:
    db.write(lambda tx: renewal_info.record_trouble(tx, [Trouble(watched, error, NOW + MINUTE, NOW)]))


# -- what is due ----------------------------------------------------------------------------------------


def test_what_is_due_is_taken_once(db: Database, twin: Database) -> None:
    """Whoever comes second finds nothing, until the hold is over."""
    lineage_id = serve(db)
    assert db.read(lambda tx: renewal_info.any_due(tx, ISSUER.directory_url, NOW))

    assert take_one(db) == Watched(
        lineage_id, ["a.test"], "id.a.test", Validity(NOW, NOW + 90 * DAY), None, PLANNED, 0, NOW + HOLD
    )
    assert take(twin) is None
    assert not db.read(lambda tx: renewal_info.any_due(tx, ISSUER.directory_url, NOW))
    assert take(twin, at=HOLD - timedelta(microseconds=1)) is None
    assert len(take(twin, at=HOLD) or []) == 1


def test_two_workers_that_take_at_once_take_different_ones(postgresql_db: Database) -> None:
    """What one has locked, the other passes over."""
    for number in range(4):
        serve(postgresql_db, f"{number}.test")

    def both(tx: Connection) -> list[Watched]:
        ours = renewal_info.due(tx, ISSUER.directory_url, NOW, 2, HOLD)
        theirs = take(postgresql_db)
        return [*(ours or []), *(theirs or [])]

    assert sorted(watched.dns_names[0] for watched in postgresql_db.write(both)) == [f"{n}.test" for n in range(4)]


def test_the_longest_due_come_first(db: Database) -> None:
    """In pages, each once."""
    for number in range(5):
        serve(db, f"{number}.test", ari_check_at=NOW - number * MINUTE)

    pages = [{watched.dns_names[0] for watched in take(db, 2) or []} for _ in range(3)]
    assert pages == [{"4.test", "3.test"}, {"2.test", "1.test"}, {"0.test"}]
    assert take(db, 2) is None


@pytest.mark.parametrize(
    ("columns", "next_look"),
    [
        ({"not_after": NOW}, None),
        ({"not_after": NOW - DAY}, None),
        ({"renewal_id": None}, None),
        ({"not_after": None, "not_before": None}, None),
        ({"next_check_at": None}, NOW + 6 * HOUR),
        ({"next_check_at": None, "not_after": NOW}, None),
    ],
)
def test_a_certificate_that_nobody_renews_is_not_asked_about(
    db: Database, columns: dict[str, Any], next_look: Any
) -> None:
    """One that has ended never again (RFC 9773 §4.3); an unwanted one may be wanted again."""
    lineage_id = serve(db, **columns)
    serve(db, "b.test", ari_check_at=NOW - DAY)
    taken = take(db)

    assert taken is not None
    assert [watched.dns_names for watched in taken] == [["b.test"]]
    assert row_of(db, lineage_id).ari_check_at == next_look


def test_a_page_of_nothing_to_ask_is_not_the_end(db: Database) -> None:
    """Others may be due behind it."""
    serve(db, not_after=NOW, ari_check_at=NOW - DAY)
    serve(db, "b.test")

    assert take(db, 1) == []
    assert [watched.dns_names for watched in take(db, 1) or []] == [["b.test"]]
    assert take(db, 1) is None


def test_each_ca_is_asked_about_its_own(db: Database) -> None:
    """Those of a CA that was used before wait for nobody, and cost nothing."""
    serve(db)

    assert db.write(lambda tx: renewal_info.due(tx, "https://other.test/dir", NOW, 10, HOLD)) is None
    assert take_one(db).dns_names == ["a.test"]


def test_what_is_due_is_found_by_its_index(db: Database) -> None:
    """Whatever the number of lineages."""
    for look in (
        lambda tx: renewal_info.any_due(tx, ISSUER.directory_url, NOW),
        lambda tx: renewal_info.due(tx, ISSUER.directory_url, NOW, 10, HOLD),
    ):
        assert "ix_lineages_ari" in explain(db, look)


# -- what is written ------------------------------------------------------------------------------------


def test_an_answer_is_kept(db: Database) -> None:
    """Window, link, the moment that was drawn, and the scan's next look; earlier trouble is over."""
    lineage_id = serve(db, ari_failures=3, ari_error={"class": "transient"}, error={"class": "validation"})
    record(db, take_one(db))
    row = row_of(db, lineage_id)

    assert Window(row.window_start, row.window_end) == SAID.window
    assert (row.window_url, row.renew_at, row.next_check_at) == (SAID.explanation_url, CHOSEN, CHOSEN)
    assert (row.ari_check_at, row.ari_failures, row.ari_error) == (NOW + 6 * HOUR, 0, None)
    assert row.error == {"class": "validation"}

    (again,) = take(db, at=6 * HOUR) or []
    assert (again.window, again.planned_at) == (SAID.window, CHOSEN)


def test_a_failure_is_kept_beside_the_last_answer(db: Database) -> None:
    """The window and its moment stay; the lineage's own error is not touched."""
    lineage_id = serve(db, window_start=NOW, window_end=NOW + DAY, ari_failures=1, failures=2, error={"class": "caa"})
    watched = take_one(db)
    fail(db, watched, {"class": "transient"})
    row = row_of(db, lineage_id)

    assert (row.ari_check_at, row.ari_failures, row.ari_error) == (NOW + MINUTE, 2, {"class": "transient"})
    assert (row.window_start, row.renew_at, row.next_check_at) == (NOW, PLANNED, PLANNED)
    assert (row.failures, row.error) == (2, {"class": "caa"})


@pytest.mark.parametrize("meanwhile", [{"renewal_id": "id.next", "ari_check_at": NOW + HOLD}, {"ari_check_at": NOW}])
def test_an_answer_that_comes_too_late_changes_nothing(db: Database, meanwhile: dict[str, Any]) -> None:
    """It is about a certificate that was replaced, or somebody else has asked since."""
    lineage_id = serve(db)
    watched = take_one(db)
    change(db, lineage_id, **meanwhile)
    before = row_of(db, lineage_id)
    record(db, watched)
    fail(db, watched, {})

    assert row_of(db, lineage_id) == before


@pytest.mark.parametrize(
    ("columns", "next_check_at"),
    [
        pytest.param({}, CHOSEN, id="a plan is waited for"),
        pytest.param({"next_check_at": NOW + 40 * DAY}, CHOSEN, id="something later is waited for"),
        pytest.param({"next_check_at": NOW + DAY}, NOW + DAY, id="something sooner is waited for"),
        pytest.param({"next_check_at": NOW - DAY, "renew_at": NOW - DAY}, NOW - DAY, id="the scan is about to look"),
        pytest.param({"failures": 2, "next_check_at": NOW + 32 * DAY}, NOW + 32 * DAY, id="a failure is waited out"),
        pytest.param({"failures": 2}, CHOSEN, id="after a failure, a plan is waited for"),
        pytest.param({"failures": 2, "renew_at": None, "next_check_at": NOW + 60 * DAY}, CHOSEN, id="the last resort"),
    ],
)
def test_the_scan_looks_sooner_if_that_is_the_plan(db: Database, columns: dict[str, Any], next_check_at: Any) -> None:
    """Never later: it finds by itself that it came too soon. And what a failure has scheduled stands."""
    lineage_id = serve(db, **columns)
    record(db, take_one(db))
    row = row_of(db, lineage_id)

    assert (row.renew_at, row.next_check_at) == (CHOSEN, next_check_at)


def test_a_window_past_the_last_resort_changes_no_look(db: Database) -> None:
    """The scan looks when the certificate has to be renewed, whatever the CA says."""
    lineage_id = serve(db, renew_at=None, next_check_at=NOW + 60 * DAY)
    record(db, take_one(db), RenewalInfo(Window(NOW + 80 * DAY, NOW + 85 * DAY)), NOW + 84 * DAY)

    assert row_of(db, lineage_id).next_check_at == NOW + 60 * DAY


def test_an_unwanted_lineage_stays_out_of_the_scan(db: Database) -> None:
    """It was paused while the CA was asked."""
    lineage_id = serve(db)
    watched = take_one(db)
    change(db, lineage_id, next_check_at=None)
    record(db, watched)

    assert row_of(db, lineage_id).next_check_at is None


@pytest.mark.parametrize("state", [State.QUEUED, State.DONE])
def test_an_issuance_under_way_is_not_looked_for(db: Database, state: State) -> None:
    """The scan has queued it already; once it is closed, nothing holds the plan back."""
    lineage_id = serve(db, next_check_at=NOW + 35 * DAY)
    issuance_id = db.write(lambda tx: issuances.queue(tx, lineage_id, "forced", NOW))
    closed_at = NOW if state in CLOSED else None
    closed = {"state": state, "closed_at": closed_at, "key_pem": "k", "csr_der": b"c", "chain_pem": "c"}
    db.write(lambda tx: tx.execute(update(issuance_rows).where(issuance_rows.c.id == issuance_id).values(**closed)))
    record(db, take_one(db))

    assert row_of(db, lineage_id).next_check_at == (CHOSEN if state is State.DONE else NOW + 35 * DAY)


# -- what an order replaces -----------------------------------------------------------------------------


def add_account(db: Database) -> str:
    account_id = new_id()
    row = {"id": account_id, "directory_url": ISSUER.directory_url, "credentials_json": {}}
    db.write(lambda tx: tx.execute(insert(accounts.acme_accounts), [row]))
    return account_id


def add_issuance(db: Database, lineage_id: str, **columns: Any) -> str:
    issuance_id = new_id()
    row = {
        "id": issuance_id, "lineage_id": lineage_id, "reason": "first", "state": State.DONE, "state_at": NOW,
        "attempt_at": NOW, "created_at": NOW, "key_pem": "k", "csr_der": b"c", "chain_pem": "c", **columns,
    }  # fmt: skip
    row["closed_at"] = NOW if row["state"] in CLOSED else None
    db.write(lambda tx: tx.execute(insert(issuance_rows).values(row)))
    return issuance_id


def replaceable(db: Database, lineage_id: str, account_id: str, at: timedelta = DAY) -> str | None:
    return db.read(lambda tx: renewal_info.find_replaceable(tx, lineage_id, account_id, NOW + at))


def test_an_order_replaces_what_its_account_ordered(db: Database) -> None:
    """Until the certificate's end; not what another account has ordered, and not what nobody remembers."""
    ours, other = add_account(db), add_account(db)
    lineage_id = serve(db)
    assert replaceable(db, lineage_id, ours) is None

    change(db, lineage_id, issuance_id=add_issuance(db, lineage_id, account_id=ours))
    assert replaceable(db, lineage_id, ours) == "id.a.test"
    assert replaceable(db, lineage_id, other) is None
    assert replaceable(db, lineage_id, ours, 90 * DAY) is None
    change(db, lineage_id, renewal_id=None)
    assert replaceable(db, lineage_id, ours) is None


@pytest.mark.parametrize(
    ("state", "free"),
    [(State.ORDER_INTENT, False), (State.DONE, False), (State.FAILED, True), (State.CANCELLED, True)],
)
def test_a_certificate_is_replaced_once(db: Database, state: State, free: bool) -> None:
    """By an order that is under way or has led to a certificate; one that was given up leaves it free."""
    account_id, lineage_id = add_account(db), serve(db)
    change(db, lineage_id, issuance_id=add_issuance(db, lineage_id, account_id=account_id))
    add_issuance(db, lineage_id, account_id=account_id, replaces="id.a.test", state=state)

    assert (replaceable(db, lineage_id, account_id) is not None) is free


def test_what_was_replaced_is_found_by_its_index(db: Database) -> None:
    """Whatever the length of the history."""
    account_id, lineage_id = add_account(db), serve(db)
    change(db, lineage_id, issuance_id=add_issuance(db, lineage_id, account_id=account_id))
    plan = explain(db, lambda tx: renewal_info._is_replaced(tx, "id.a.test"))

    assert "ix_issuances_replaces" in plan
