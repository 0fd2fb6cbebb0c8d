"""When to renew, as CAs have it: asked in time, drawn once, obeyed inside the window, and never relied upon."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from itertools import count
from threading import Barrier, Event
from threading import enumerate as enumerate_threads
from typing import Any

import pytest
from sqlalchemy import Connection, bindparam, event, select, update

from certworker.ca.client import Client
from certworker.ca.transport import ANSWER_LIMIT, Response
from certworker.core.certificate import Validity
from certworker.core.renewal import plan_renewal
from certworker.core.retry import Endpoint, Failure
from certworker.errors import StoreError, StoreRefused, TransportFault
from certworker.steps.reconcile import reconcile
from certworker.steps.refresh_ari import refresh_ari
from certworker.steps.scan import scan
from certworker.store import renewal_info
from certworker.store.database import Database, open_database
from certworker.store.renewal_info import Advice
from certworker.store.rows import new_id
from certworker.store.tables import issuances, lineages
from tests.store.given import url_of

from .world import START, World

DAY, HOUR, MINUTE, SECOND = timedelta(days=1), timedelta(hours=1), timedelta(minutes=1), timedelta(seconds=1)
WINDOW = (START + 30 * DAY, START + 40 * DAY)


def client_of(world: World) -> Client:
    return Client(world.ca.directory_url, world.ca.http, world.clock)


def refresh(world: World, client: Client | None = None, **more: Any) -> int:
    return refresh_ari(world.db, client or client_of(world), world.clock, lambda: world.draw, **more)


def add_fleet(world: World, size: int, lifetime: timedelta = 90 * DAY) -> list[str]:
    """Import lineages whose certificates all came just now; return their renewal ids."""
    world.add_policy(*[f"{number}.test" for number in range(size)])
    reconcile(world.db, world.clock, world.wanted, world.sealer)
    now = world.clock()
    validity = Validity(now, now + lifetime)

    def write(tx: Connection) -> list[str]:
        found = tx.execute(select(lineages.c.id, lineages.c.dns_names)).all()
        rows = [
            {"row_id": row.id, "plan": plan_renewal(validity, row.id), "name": f"id.{row.dns_names[0]}"}
            for row in found
        ]
        tx.execute(
            update(lineages).where(lineages.c.id == bindparam("row_id")).values(
                certificate_id=new_id(), not_before=validity.not_before, not_after=validity.not_after,
                renew_at=bindparam("plan"), next_check_at=bindparam("plan"), renewal_id=bindparam("name"),
                ari_check_at=now, status="active",
            ),
            rows,
        )  # fmt: skip
        return [str(row["name"]) for row in rows]

    return world.db.write(write)


def add_one(world: World, window: tuple[datetime, datetime] | None = WINDOW) -> str:
    """Import one, with a window at its CA; return its renewal id."""
    (renewal_id,) = add_fleet(world, 1)
    if window is not None:
        world.ca.renewal_windows[renewal_id] = window
    return renewal_id


def row_of(world: World, name: str = "0.test") -> Any:
    lineage_id = world.lineage(name).id
    return world.db.read(lambda tx: tx.execute(select(lineages).where(lineages.c.id == lineage_id)).one())


def change(world: World, **columns: Any) -> None:
    world.db.write(lambda tx: tx.execute(update(lineages).values(**columns)))


def asked(world: World) -> int:
    return world.ca.count("GET", "/renewal-info/*")


# -- one certificate ------------------------------------------------------------------------------------


def test_the_ca_knows_the_certificate_by_its_renewal_id(world: World) -> None:
    """It is asked as soon as the certificate is there."""
    world.issue("a.test")

    assert refresh(world) == 1
    assert row_of(world, "a.test").window_start == world.ca.issued[0].certificate.not_valid_after_utc - 30 * DAY
    assert [seen.path for seen in world.ca.requests if seen.path.startswith("/renewal-info/")] == [
        f"/renewal-info/{world.ca.issued[0].renewal_id}"
    ]


def test_a_moment_of_the_window_is_drawn_and_kept(world: World) -> None:
    """Asked when the CA says, and the same window keeps its moment, whatever would be drawn now."""
    add_one(world)
    assert refresh(world) == 1
    first = row_of(world)
    assert (first.window_start, first.window_end) == WINDOW
    assert START + 34 * DAY < first.renew_at < START + 36 * DAY
    assert first.next_check_at == first.renew_at

    for draw, passed in ((0.0, 6 * HOUR), (0.9, 6 * HOUR)):
        world.draw = draw
        assert refresh(world) == 0
        world.clock.move(passed)
        assert refresh(world) == 1
    later = row_of(world)
    assert (later.renew_at, later.next_check_at) == (first.renew_at, first.renew_at)
    assert later.ari_check_at == world.clock() + 6 * HOUR


def test_a_moved_window_is_drawn_from_once_and_told(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """With the link for a person; the scan looks when the new plan says."""
    renewal_id = add_one(world)
    refresh(world)
    assert "ari.window_moved" not in caplog.text
    moved = (START + 10 * DAY, START + 12 * DAY)
    world.ca.renewal_windows[renewal_id], world.ca.explanation_url = moved, "https://ca.test/incident"
    for draw in (0.25, 0.75):
        world.draw = draw
        world.clock.move(6 * HOUR)
        refresh(world)
    row = row_of(world)
    (told,) = [record for record in caplog.records if record.message == "ari.window_moved"]

    assert START + 10.4 * DAY < row.renew_at < START + 10.6 * DAY
    assert row.next_check_at == row.renew_at
    assert row.window_url == told.explanation == "https://ca.test/incident"  # type: ignore[attr-defined]
    assert told.levelno == logging.WARNING
    assert told.names == ["0.test"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("header", "wait"),
    [
        (None, 6 * HOUR),
        ("1", MINUTE),
        ("-5", 6 * HOUR),
        ("soon", 6 * HOUR),
        ("7200", 2 * HOUR),
        ("315360000", DAY),
        ("9" * 30, DAY),
        ("Sun, 22 Nov 2026 15:00:00 GMT", 3 * HOUR),
    ],
)
def test_the_ca_says_when_it_wants_to_be_asked_again(world: World, header: str | None, wait: timedelta) -> None:
    """Within a minute and a day; six hours if it says nothing, or nonsense."""
    world.ca.renewal_retry_after = header
    add_one(world)
    refresh(world)

    assert row_of(world).ari_check_at == START + wait


def test_a_window_of_the_past_is_obeyed_at_once(world: World) -> None:
    """What the CA has to revoke, it shows like this."""
    renewal_id = add_one(world)
    refresh(world)
    world.ca.renewal_windows[renewal_id] = (START - HOUR, START - HOUR / 2)
    world.clock.move(6 * HOUR)
    refresh(world)
    scan(world.db, world.clock)

    queued = world.last_issuance("0.test")
    assert (queued.state, queued.reason) == ("queued", "ca_suggested")


def test_a_renewal_says_what_it_replaces(world: World) -> None:
    """To a CA that offers to be told, once; refused, it is ordered without, and that is no failure."""
    world.issue("a.test")

    def renew() -> bool:
        old = world.ca.issued[-1]
        world.ca.renewal_windows[old.renewal_id] = (START - HOUR, START - HOUR / 2)
        refresh(world)
        world.take_over()
        world.work()
        assert world.ca.issued[-1] is not old
        assert world.lineage("a.test").error is None
        return world.ca.issued[-1].replaces == old.renewal_id

    assert renew()
    assert renew()
    world.ca.fail_next("POST", "/new-order", problem="alreadyReplaced", status=409)
    assert not renew()
    orders = world.ca.count("POST", "/new-order")
    world.ca.informs = False
    change(world, renew_at=START, next_check_at=START)
    world.take_over()
    world.work()

    assert (orders, world.ca.count("POST", "/new-order")) == (5, 6)
    assert world.ca.issued[-1].replaces is None


def test_an_order_lost_on_the_way_is_made_without(world: World) -> None:
    """Boulder holds the first order for the replacement; ours comes again, is refused, and then says nothing."""
    world.issue("a.test")
    world.ca.replaced_by = "order"
    world.ca.renewal_windows[world.ca.issued[0].renewal_id] = (START - HOUR, START - HOUR / 2)
    world.ca.fail_next("POST", "/new-order", raises=no_answer("reset"), after=True)
    refresh(world)
    world.take_over()
    world.work()
    world.clock.move(MINUTE)
    world.work()

    assert [line.replaces for line in world.ca.issued] == [None, None]
    assert len(world.ca.orders) == 3
    assert world.last_issuance("a.test").state == "done"


def test_a_certificate_that_has_ended_is_never_asked_about(world: World) -> None:
    """RFC 9773 §4.3; nor does it cost anything from then on."""
    add_one(world)
    world.clock.move(90 * DAY)

    assert refresh(world) == asked(world) == 0
    assert row_of(world).ari_check_at is None


class Meanwhile:
    """A CA during whose answers about renewals something else happens."""

    def __init__(self, world: World, act: Callable[[], object]) -> None:
        self._world = world
        self._act = act

    def request(
        self,
        method: str,
        url: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        max_bytes: int = ANSWER_LIMIT,
        repeatable: bool = False,
    ) -> Response:
        answer = self._world.ca.http.request(method, url, body, headers, max_bytes=max_bytes, repeatable=repeatable)
        if "/renewal-info/" in url:
            self._act()
        return answer


def test_the_window_of_a_replaced_certificate_is_not_its_successors(world: World) -> None:
    """Or a window of the past, late by a moment, would have the new certificate renewed at once."""
    add_one(world, (START - HOUR, START - MINUTE))
    fresh = {"renewal_id": "id.next", "renew_at": START + 60 * DAY, "next_check_at": START + 60 * DAY}
    http = Meanwhile(world, lambda: change(world, **fresh))
    refresh(world, Client(world.ca.directory_url, http, world.clock))
    row = row_of(world)

    assert (row.window_start, row.renew_at, row.next_check_at) == (None, START + 60 * DAY, START + 60 * DAY)


# -- trouble --------------------------------------------------------------------------------------------


def no_answer(kind: str = "timeout") -> TransportFault:
    return TransportFault(kind, "https://ca.test/x", "scripted")


@pytest.mark.parametrize(
    ("fault", "wait", "kind"),
    [
        ({"raises": no_answer()}, MINUTE, "certworker:ca-timeout"),
        ({"raises": no_answer("reset")}, MINUTE, "certworker:ca-reset"),
        ({"raises": no_answer("dns")}, 6 * HOUR, "certworker:ca-dns"),
        ({"raises": no_answer("connect")}, 6 * HOUR, "certworker:ca-connect"),
        ({"problem": "serverInternal", "status": 500}, MINUTE, "urn:ietf:params:acme:error:serverInternal"),
        ({"status": 503, "body": b"<html>"}, MINUTE, "about:blank"),
        ({"status": 503, "body": b"", "headers": {"retry-after": "1800"}}, 30 * MINUTE, "about:blank"),
        ({"problem": "rateLimited", "status": 429}, 6 * HOUR, "urn:ietf:params:acme:error:rateLimited"),
        ({"problem": "malformed", "status": 404}, 6 * HOUR, "urn:ietf:params:acme:error:malformed"),
        ({"status": 200, "body": b"<html>log in</html>"}, 6 * HOUR, "certworker:ca-answer"),
        ({"status": 200, "body": b"{}"}, 6 * HOUR, "certworker:ca-answer"),
        ({"status": 302, "body": b"", "headers": {"location": "http://x/"}}, 6 * HOUR, "certworker:ca-answer"),
    ],
)
def test_trouble_costs_the_advice_only(world: World, fault: dict[str, Any], wait: timedelta, kind: str) -> None:
    """The lineage keeps its plan, its error and its failures; the CA is asked again soon, or in six hours."""
    add_one(world)
    before = row_of(world)
    world.ca.fail_next("GET", "/renewal-info/*", **fault)
    refresh(world)
    row = row_of(world)

    assert (row.ari_check_at, row.ari_failures) == (START + wait, 1)
    assert (row.ari_error["type"], row.ari_error["class"]) == (kind, row.ari_error["class"])
    assert (row.renew_at, row.next_check_at, row.status) == (before.renew_at, before.next_check_at, "active")
    assert (row.error, row.failures) == (None, 0)

    world.clock.move(wait)
    refresh(world)
    assert (row_of(world).ari_failures, row_of(world).ari_error, row_of(world).window_start) == (0, None, WINDOW[0])


def test_five_tries_soon_and_then_every_six_hours(world: World) -> None:
    """As long as the CA does not answer; nobody else hears of it."""
    add_one(world)
    world.ca.fail_next("GET", "/renewal-info/*", raises=no_answer(), times=100)
    waits = []
    for _ in range(7):
        refresh(world)
        waits.append((row_of(world).ari_check_at - world.clock()) / MINUTE)
        world.clock.now = row_of(world).ari_check_at

    assert waits == [1, 2, 4, 8, 16, 360, 360]
    assert asked(world) == 7


def test_a_ca_that_does_not_answer_is_left_alone(world: World) -> None:
    """About as many questions as are asked at once, then the rest waits for another pass."""
    add_fleet(world, 200)
    world.ca.fail_next("GET", "/renewal-info/*", raises=no_answer(), times=1000)

    assert refresh(world) <= 5 + 8
    assert asked(world) <= 5 + 8


def test_trouble_now_and_then_does_not_end_a_pass(world: World) -> None:
    """Only silence in a row does."""
    for name in add_fleet(world, 60):
        world.ca.renewal_windows[name] = WINDOW
    for skip in range(0, 60, 3):
        world.ca.fail_next("GET", "/renewal-info/*", raises=no_answer(), skip=skip)

    assert refresh(world) == 60


def test_the_gate_hears_of_what_everybody_would_meet(world: World) -> None:
    """A directory that cannot be read, but no trouble with this question alone: orders may go well."""
    told: list[Failure] = []
    add_one(world)
    world.ca.fail_next("GET", "/directory", raises=no_answer())
    assert refresh(world, trouble=told.append) == 0
    world.ca.fail_next("GET", "/renewal-info/*", raises=no_answer())
    assert refresh(world, trouble=told.append) == 1

    assert [(failure.type, failure.endpoint) for failure in told] == [("certworker:ca-timeout", Endpoint.DIRECTORY)]


def test_a_directory_that_is_lost_on_the_way_is_told_too(world: World) -> None:
    """It is read anew every hour, also in the middle of a pass."""
    told: list[Failure] = []
    for name in add_fleet(world, 40):
        world.ca.renewal_windows[name] = WINDOW
    world.ca.fail_next("GET", "/directory", raises=no_answer(), skip=1, times=100)
    an_hour_passes = Meanwhile(world, lambda: setattr(world.clock, "now", START + HOUR))
    refresh(world, Client(world.ca.directory_url, an_hour_passes, world.clock), trouble=told.append)

    assert {failure.endpoint for failure in told} == {Endpoint.DIRECTORY}


def test_nothing_is_asked_while_the_ca_is_closed_to_us(world: World) -> None:
    """Before the first question, and from the moment on when it closes."""
    add_fleet(world, 50)
    assert refresh(world, closed=lambda: True) == 0
    assert not world.ca.requests

    assert refresh(world, closed=lambda: asked(world) >= 10) < 10 + 8
    assert asked(world) < 10 + 8


def test_a_ca_that_does_not_inform_is_not_asked(world: World) -> None:
    """Nor is a row written; with no certificate to ask about, not even the directory is read."""
    assert refresh(world) == len(world.ca.requests) == 0
    add_one(world)
    world.ca.informs = False
    before = row_of(world)

    assert refresh(world) == asked(world) == 0
    assert row_of(world) == before


def test_a_stop_waits_for_no_ca(world: World) -> None:
    """Questions under way are left behind; they may still end, and harm nobody."""
    add_fleet(world, 20)
    hanging, let_go = Event(), Event()

    def hang() -> None:
        hanging.set()
        let_go.wait(30)

    client = Client(world.ca.directory_url, Meanwhile(world, hang), world.clock)
    refresh(world, client, going=lambda: not hanging.is_set())
    left = [thread for thread in enumerate_threads() if thread.name == "ari"]
    let_go.set()
    for thread in left:
        thread.join(30)

    assert 1 <= len(left) <= asked(world) <= 8


def test_a_database_that_is_lost_is_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass ends with the page under way, and whoever asked for it hears why."""

    def fail(*_: object) -> None:
        raise StoreError("the database is gone")

    fleet = add_fleet(world, 150)
    monkeypatch.setattr(renewal_info, "record", fail)
    for name in fleet:
        world.ca.renewal_windows[name] = WINDOW

    with pytest.raises(StoreError, match="gone"):
        refresh(world)
    assert asked(world) == 100


def test_a_page_that_a_crash_loses_is_asked_about_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the hold is over, and not before: another worker may still be at it."""

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    for name in add_fleet(world, 20):
        world.ca.renewal_windows[name] = WINDOW
    with monkeypatch.context() as crash:
        crash.setattr(renewal_info, "record", die)
        with pytest.raises(KeyboardInterrupt):
            refresh(world)
    assert refresh(world) == 0

    world.clock.move(10 * MINUTE)
    assert refresh(world) == 20
    assert row_of(world).window_start == WINDOW[0]


def test_an_answer_that_the_database_refuses_holds_up_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told, the others of its page are kept, and its certificate keeps the plan it had."""
    for name in add_fleet(world, 20):
        world.ca.renewal_windows[name] = WINDOW
    keep, strange, before = renewal_info.record, world.lineage("7.test").id, row_of(world, "7.test")

    def refuse(tx: Connection, answers: Sequence[Advice]) -> None:
        keep(tx, answers)
        if strange in {one.watched.lineage_id for one in answers}:
            raise StoreRefused("cannot write to the database: CHECK constraint failed")

    monkeypatch.setattr(renewal_info, "record", refuse)
    assert refresh(world) == 20
    assert world.rows("SELECT count(*) FROM lineages WHERE window_start IS NOT NULL") == [(19,)]
    assert row_of(world, "7.test").renew_at == before.renew_at
    assert row_of(world, "7.test").ari_check_at == START + 10 * MINUTE
    assert [record.__dict__["names"] for record in caplog.records if record.msg == "ari.refused"] == [["7.test"]]


def test_a_page_costs_as_many_statements_as_one(world: World) -> None:
    """Two to take it and one for all answers; besides, a pass looks whether there is one before and after."""
    for name in add_fleet(world, 100):
        world.ca.renewal_windows[name] = WINDOW
    sent: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, _values: Any, _context: Any, _many: bool) -> None:
        if not statement.startswith("BEGIN"):
            sent.append(statement.split()[0])

    event.listen(world.db.engine, "before_cursor_execute", note)
    assert refresh(world) == 100
    event.remove(world.db.engine, "before_cursor_execute", note)

    assert sent == ["SELECT", "SELECT", "UPDATE", "UPDATE", "SELECT"]


def test_workers_share_the_questions(db: Database) -> None:
    """Two at once ask the CA once about each certificate."""
    world, twin = World(db), open_database(url_of(db))
    for name in add_fleet(world, 150):
        world.ca.renewal_windows[name] = WINDOW
    both = Barrier(2)

    def work(database: Database) -> int:
        client = client_of(world)
        both.wait(10)
        return refresh_ari(database, client, world.clock, lambda: 0.5)

    with ThreadPoolExecutor(2) as threads:
        counts = list(threads.map(work, (db, twin)))
    twin.close()

    assert sum(counts) == asked(world) == 150
    assert db.read(lambda tx: renewal_info.any_due(tx, world.ca.directory_url, world.clock())) is False


# -- fleets ---------------------------------------------------------------------------------------------


def test_a_mass_revocation_is_due_within_one_pass(world: World) -> None:
    """500 of 1,500 get a window of the past: they are queued, the others are not even looked at."""
    fleet = add_fleet(world, 1500)
    revoked = set(fleet[::3])
    for name in fleet:
        world.ca.renewal_windows[name] = (START - HOUR, START - HOUR / 2) if name in revoked else WINDOW
    world.db.write(
        lambda tx: tx.execute(
            update(lineages).where(lineages.c.renewal_id.not_in(revoked)).values(ari_check_at=START + HOUR)
        )
    )

    assert refresh(world) == asked(world) == 500
    report = scan(world.db, world.clock)
    assert (report.looked_at, report.queued) == (500, 500)


def simulate(world: World, since: timedelta, until: timedelta, step: timedelta) -> list[tuple[timedelta, str]]:
    """Let time pass and the scan look; return at what ages which certificates were ordered anew."""
    served_anew = update(lineages).where(lineages.c.id.in_(select(issuances.c.lineage_id))).values(next_check_at=None)
    world.clock.now = START + since
    while world.clock.now <= START + until:
        if scan(world.db, world.clock).queued:
            world.db.write(lambda tx: tx.execute(served_anew))
        world.clock.move(step)
    query = select(issuances.c.created_at, lineages.c.renewal_id).join_from(issuances, lineages)
    return [(row[0] - START, row[1]) for row in world.db.read(lambda tx: tx.execute(query).all())]


def test_a_bulk_import_without_advice_is_spread(world: World) -> None:
    """1,000 certificates of one minute are renewed evenly over the nine days before day 60."""
    add_fleet(world, 1000)
    ages = [age for age, _ in simulate(world, 50 * DAY, 60 * DAY, HOUR)]
    per_day = Counter(age.days for age in ages)

    assert len(ages) == 1000
    assert set(per_day) <= set(range(51, 61))
    assert max(per_day.values()) < 1000 / 9 * 1.5


def test_a_bulk_import_is_ordered_inside_its_windows(world: World) -> None:
    """Each of 1,000 in what its window has before the last resort, and never many in one hour."""
    for number, name in enumerate(add_fleet(world, 1000)):
        start = START + 58 * DAY + number % 24 * HOUR
        world.ca.renewal_windows[name] = (start, start + 43 * HOUR)
    draws = count()
    refresh_ari(world.db, client_of(world), world.clock, lambda: next(draws) * 0.618034 % 1)
    ordered = simulate(world, 57 * DAY, 61 * DAY, 10 * MINUTE)
    per_hour = Counter(age // HOUR for age, _ in ordered)

    assert len(ordered) == 1000
    assert [name for age, name in ordered if not _inside(START + age, world.ca.renewal_windows[name])] == []
    assert max(per_hour.values()) < 1000 / 48 * 3


def _inside(at: datetime, window: tuple[datetime, datetime]) -> bool:
    return window[0] <= at < window[1]
