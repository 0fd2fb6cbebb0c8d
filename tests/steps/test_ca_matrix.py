"""What a CA, or the way to it, can say to an issuance: every error at every resource, and what must follow.

Every error type of RFC 8555 §6.7 and RFC 9773 §7.4, every fault of the transport and every kind of nonsense. What
follows is written down here once more, by hand, from docs/decisions/errors.md. Faults that take more than one
answer are in `test_ca_faults`.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta

import pytest

from certworker.core.issuance import State
from certworker.core.retry import ErrorClass, Scope
from certworker.errors import TransportFault
from certworker.store.database import Database
from tests.ca.fake_state import URN

from .life import (
    ACCOUNT,
    CA,
    DAY,
    FIRST,
    HOUR,
    MINUTE,
    NAME,
    ONE,
    PLACES,
    SECOND,
    TIMES,
    P,
    R,
    T,
    V,
    X,
    certificate,
    fail,
    policy_statuses,
    serving,
    unsynced,
)
from .world import START, World


@pytest.fixture
def world(sqlite_db: Database) -> World:
    """What is proved here does not hang on the database."""
    return unsynced(sqlite_db)


@pytest.fixture
def both(db: Database) -> World:
    """The world on either database, for what is counted there."""
    return World(db)


# -- one fault, anywhere ------------------------------------------------------------------------------

SIGNED = [place for place, (method, _, _) in PLACES.items() if method == "POST"]
ASKING = ("newAccount", "newOrder", "finalize")
"""What a CA can refuse; the others only look, or tell it to look."""

MEANS = {
    "accountDoesNotExist": (X, ACCOUNT), "alreadyReplaced": (T, ONE), "alreadyRevoked": (P, ONE), "badCSR": (P, ONE),
    "badNonce": (T, CA), "badPublicKey": (P, ONE), "badRevocationReason": (P, ONE),
    "badSignatureAlgorithm": (P, ACCOUNT), "caa": (V, ONE), "conflict": (T, ONE), "connection": (V, ONE),
    "dns": (V, ONE), "dnssec": (V, ONE), "externalAccountRequired": (X, ACCOUNT), "incorrectResponse": (V, ONE),
    "invalidContact": (X, ACCOUNT), "invalidProfile": (P, ONE), "orderNotReady": (T, ONE), "rateLimited": (R, ONE),
    "rejectedIdentifier": (P, ONE), "serverInternal": (T, CA), "tls": (V, ONE), "unsupportedContact": (X, ACCOUNT),
    "unsupportedIdentifier": (P, ONE), "userActionRequired": (X, ACCOUNT),
}  # fmt: skip
BY_PLACE = {
    ("unauthorized", "newAccount"): (X, ACCOUNT), ("unauthorized", "newOrder"): (X, ACCOUNT),
    ("unauthorized", "order"): (X, ONE), ("unauthorized", "authorization"): (X, ONE),
    ("unauthorized", "challenge"): (X, ONE), ("unauthorized", "certificate"): (X, ONE),
    ("malformed", "newOrder"): (P, ONE), ("malformed", "challenge"): (T, ONE), ("rateLimited", "newAccount"): (R, CA),
}  # fmt: skip
CODES = [*MEANS, "unauthorized", "malformed", "compound", "fromTheFuture"]


def meaning(code: str, place: str) -> tuple[ErrorClass, Scope]:
    """Return class and scope of an error, as docs/decisions/errors.md has them."""
    error_class, scope = BY_PLACE.get((code, place)) or MEANS.get(code) or ((P if place in ASKING else T), ONE)
    if place == "newAccount" and error_class in (P, X):
        scope = ACCOUNT  # without an account nobody orders
    return error_class, scope


@pytest.mark.parametrize("code", CODES)
def test_every_error_at_every_resource(world: World, code: str) -> None:
    """Its class says what becomes of the issuance and when it goes on; before then nothing at all is sent."""
    for place in SIGNED:
        times = 1 if (code, place) == ("accountDoesNotExist", "newAccount") else TIMES.get(code, 1)
        fail(world, place, problem=code, times=times)
        error_class, scope = meaning(code, place)

        meet_and_mend(world, place, error_class, scope, f"{URN}{code}")


TRANSPORT = ["dns", "connect", "tls", "timeout", "reset", "proxy"]


@pytest.mark.parametrize("kind", TRANSPORT)
def test_no_answer_from_any_resource(world: World, kind: str) -> None:
    """Transient, and everybody's: whoever asks next gets none either. A CA that is not trusted is not asked soon."""
    for place in PLACES:
        fail(world, place, raises=TransportFault(kind, "https://ca.test/", "said"))
        first = 12.5 * MINUTE if kind == "tls" else FIRST[T]

        meet_and_mend(world, place, T, CA, f"certworker:ca-{kind}", first)


HTML = {"content-type": "text/html", "replay-nonce": ""}
NONSENSE: dict[str, tuple[int, bytes]] = {
    "a captive portal": (200, b"<html>Please log in</html>"),
    "an empty body": (200, b""),
    "null": (200, b"null"),
    "a list": (200, b"[]"),
    "a deep one": (200, b"[" * 100_000),
    "a redirect": (307, b""),
    "a number": (299, b"7"),
}  # fmt: skip
SHARED = ("directory", "newNonce", "newAccount", "newOrder")
"""Where nonsense is everybody's trouble, and not one order's."""


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_from_any_resource(world: World, what: str) -> None:
    """A24: never read as success, never a crash; the address is named, and the next try is soon."""
    status, body = NONSENSE[what]
    for place, (_, path, _) in PLACES.items():
        fail(world, place, status=status, body=body, headers=HTML)

        error = meet_and_mend(world, place, T, CA if place in SHARED else ONE, "certworker:ca-answer")
        assert f"https://ca.test{path.rstrip('*')}" in error["detail"]


BARE = [
    # place, status, class, scope; the type is "about:blank" unless an order is lost
    ("newAccount", 403, P, ACCOUNT), ("directory", 404, T, CA), ("directory", 500, T, CA), ("newNonce", 405, T, CA),
    ("newNonce", 503, T, CA), ("newOrder", 502, T, CA), ("newOrder", 403, P, ONE), ("newOrder", 408, T, ONE),
    ("newOrder", 409, T, ONE), ("newOrder", 425, T, ONE), ("newOrder", 429, R, ONE), ("authorization", 500, T, CA),
    ("authorization", 403, T, ONE), ("authorization", 404, T, ONE), ("challenge", 404, T, ONE),
    ("challenge", 504, T, CA), ("order", 404, T, ONE), ("order", 500, T, CA), ("finalize", 404, T, ONE),
    ("finalize", 500, T, CA), ("finalize", 403, P, ONE), ("certificate", 404, T, ONE), ("certificate", 500, T, CA),
]  # fmt: skip


def test_a_status_without_a_problem_document(world: World) -> None:
    """A50: the status and what was asked decide; an order that the CA does not know ends its issuance."""
    for count, (place, status, error_class, scope) in enumerate(BARE):
        lost = status == 404 and place not in ("directory", "newNonce")
        fail(world, place, status=status, body=b"<html>\x1b[31m</html>", headers=HTML)

        type_ = "certworker:order-lost" if lost else "about:blank"
        error = meet_and_mend(world, place, error_class, scope, type_, name=f"{count}.test")
        assert error["detail"].isprintable()


def meet_and_mend(
    world: World, place: str, error_class: ErrorClass, scope: Scope, type_: str, first: timedelta | None = None,
    name: str | None = None,
) -> Mapping[str, str]:  # fmt: skip
    """See that what was arranged is told and waited for, and that the issuance ends well; return the error."""
    name, first = name or f"{place.lower()}.test", first or FIRST[error_class]
    policy_id = world.add_policy(name)
    world.take_over()
    world.work()
    row, lineage = world.last_issuance(name), world.lineage(name)
    error = row.error or {}

    assert (place, error["class"], error["scope"], error["type"]) == (place, error_class, scope, type_)
    assert lineage.error == error
    assert error["hint"]
    ends = error_class in (V, P, X) or type_ == "certworker:order-lost"
    if ends:
        assert (row.state, lineage.failures) == (State.FAILED, 1)
        assert (world.policy_status(policy_id), world.count("challenges")) == ("error", 0)
        next_at = lineage.next_check_at
    else:
        assert (row.state, row.failures, row.lease_owner) == (PLACES[place][2], 1, None)
        assert world.policy_status(policy_id) == "pending"
        next_at = row.attempt_at
    assert next_at == world.clock() + first
    assert error["retry_at"] == next_at.isoformat(timespec="seconds")

    sent = len(world.ca.requests)
    go_on_at(world, next_at - SECOND)
    assert len(world.ca.requests) == sent
    go_on_at(world, next_at)
    assert world.policy_status(policy_id) == "active"
    assert world.lineage(name).error is None
    assert world.last_issuance(name).id == row.id or ends
    assert len(world.ca.accounts) == 1
    return error


def go_on_at(world: World, moment: datetime) -> None:
    """Let another process, which remembers nothing, look at this moment."""
    world.clock.now = moment
    world.crash()
    world.take_over()
    world.work()


# -- the same fault, again and again ------------------------------------------------------------------

SCHEDULES = [
    # what is said, to whom, and the waits that follow
    ("conflict", T, [n * SECOND for n in (5, 15, 45, 120, 300, 600, 1800, 3600, 3600)]),
    ("dns", V, [MINUTE, 10 * MINUTE, 100 * MINUTE, DAY, DAY]),
    ("rateLimited", R, [HOUR, 3 * HOUR, 12 * HOUR, DAY, DAY]),
    ("rejectedIdentifier", P, [DAY, 7 * DAY, 7 * DAY]),
    ("userActionRequired", X, [DAY, DAY, DAY]),
]  # fmt: skip


@pytest.mark.parametrize(("code", "error_class", "waits"), SCHEDULES)
def test_a_fault_that_stays(both: World, code: str, error_class: ErrorClass, waits: list[timedelta]) -> None:
    """O6: the schedule of its class, whoever has died in between; the same request is never sent sooner."""
    world = both
    world.ca.fail_next("POST", "/new-order", problem=code, times=99)
    world.add_policy(NAME)
    world.take_over()
    world.work()
    for count, wait in enumerate(waits, 1):
        row, lineage, asked = world.last_issuance(NAME), world.lineage(NAME), world.ca.count("POST", "/new-order")
        next_at = row.attempt_at if row.is_open else lineage.next_check_at
        assert next_at is not None
        assert (asked, row.failures if row.is_open else lineage.failures) == (count, count)
        assert next_at - world.clock() == wait

        go_on_at(world, next_at - SECOND)
        assert world.ca.count("POST", "/new-order") == asked
        go_on_at(world, next_at)


@pytest.mark.parametrize("draw", [0.0, 0.999])
def test_waits_are_spread(world: World, draw: float) -> None:
    """Thousands that failed together do not come back together: a fifth sooner, a fifth later."""
    world.draw = draw
    world.ca.fail_next("POST", "/new-order", problem="conflict")
    world.add_policy(NAME)
    world.take_over()
    world.work()

    waited = world.last_issuance(NAME).attempt_at - world.clock()
    assert waited == pytest.approx(5 * SECOND * (0.8 + 0.4 * draw), abs=SECOND / 100)


WISHES = [
    # Retry-After, Date, the wait without the tenth that is added
    ("120", None, 120 * SECOND),
    ("Sun, 22 Nov 2026 12:02:00 GMT", None, 120 * SECOND),
    ("Sun, 22 Nov 2026 18:02:00 GMT", "Sun, 22 Nov 2026 18:00:00 GMT", 120 * SECOND),  # a CA six hours ahead
    ("Sunday, 22-Nov-26 12:02:00 GMT", None, 120 * SECOND),
    ("0", None, SECOND),
    ("999999999", None, DAY),
    ("99999999999999999999999999", None, DAY),
    ("Sun, 22 Nov 2999 12:02:00 GMT", None, DAY),
    (None, None, None),
    ("-5", None, None),
    ("soon", None, None),
    ("1.5", None, None),
    ("Sun, 22 Nov 2026 11:00:00 GMT", None, None),  # past
]


@pytest.mark.parametrize(("status", "code", "own"), [(503, "serverInternal", 5 * SECOND), (429, "rateLimited", HOUR)])
def test_retry_after(world: World, status: int, code: str, own: timedelta) -> None:
    """A08: never sooner than the CA asks, within 1 s and 24 h; what cannot be read is as good as absent."""
    for count, (wish, date, wait) in enumerate(WISHES):
        world.clock.now, name = START, f"{count}.test"
        headers = {key: value for key, value in (("retry-after", wish), ("date", date)) if value is not None}
        world.ca.fail_next("POST", "/new-order", status=status, problem=code, headers=headers)
        world.add_policy(name)
        world.take_over()
        world.work()

        row = world.last_issuance(name)
        assert (wish, row.attempt_at - START) == (wish, own if wait is None else wait * 1.05)
        assert row.error is not None
        assert row.error["asked_by"] == (None if wait is None else "ca")
        sent = len(world.ca.requests)
        go_on_at(world, row.attempt_at - SECOND / 10)
        assert len(world.ca.requests) == sent
        go_on_at(world, row.attempt_at)
        assert world.lineage(name).status == "active"


# -- a renewal that fails -----------------------------------------------------------------------------

RENEWALS = [
    # place, what is said, class; how soon it is tried again, and how soon at the very end
    ("order", "serverInternal", T, 5 * SECOND),
    ("newOrder", "rateLimited", R, HOUR),
    ("finalize", "badCSR", P, DAY),
    ("newOrder", "rejectedIdentifier", P, DAY),
    ("newOrder", "userActionRequired", X, DAY),
    ("authorization", "unauthorized", X, DAY),
    ("finalize", "caa", V, MINUTE),
]


@pytest.mark.parametrize(("place", "code", "error_class", "wait"), RENEWALS)
def test_a_renewal_that_fails(world: World, place: str, code: str, error_class: ErrorClass, wait: timedelta) -> None:
    """What serves, serves on: same certificate, same revision, policy and lineage `active`; the error is shown."""
    before = serving(world, due=True)
    fail(world, place, problem=code)
    world.work()

    row, lineage = world.last_issuance(NAME), world.lineage(NAME)
    assert certificate(world) == before
    assert (lineage.status, policy_statuses(world)) == ("active", ["active"])
    assert lineage.error is not None
    assert lineage.error["class"] == error_class
    next_at = row.attempt_at if row.is_open else lineage.next_check_at
    assert next_at == world.clock() + wait
    go_on_at(world, next_at)
    assert certificate(world).fingerprint != before.fingerprint


def test_a_refusal_is_no_reason_to_give_up_what_serves(world: World) -> None:
    """P once a day while there is a certificate to lose, and not once a week."""
    serving(world, due=True)
    world.ca.fail_next("POST", "/new-order", problem="rejectedIdentifier", times=3)
    waits = []
    for _ in range(3):
        world.work()
        next_at = world.lineage(NAME).next_check_at
        assert next_at is not None
        waits.append(next_at - world.clock())
        world.clock.now = next_at
        world.take_over()

    assert waits == [DAY, DAY, DAY]


def test_the_last_days_are_tried_more_often(world: World) -> None:
    """V at least each six hours when the certificate is about to end; before, once a day."""
    serving(world, due=True)
    world.closed_names.add(NAME)
    ends_at, waits = certificate(world).expires_at, {}
    world.clock.now = ends_at - 12 * DAY
    while world.clock() < ends_at - HOUR:
        world.work()
        next_at = world.lineage(NAME).next_check_at
        assert next_at is not None
        waits[ends_at - world.clock()] = next_at - world.clock()
        world.clock.now = next_at
        world.take_over()

    early = [wait for left, wait in waits.items() if left > 9 * DAY]
    assert early[:3] == [MINUTE, 10 * MINUTE, 100 * MINUTE]
    assert set(early[3:]) == {DAY}
    assert {wait for left, wait in waits.items() if left < 8 * DAY} == {6 * HOUR}
    assert policy_statuses(world) == ["active"]
