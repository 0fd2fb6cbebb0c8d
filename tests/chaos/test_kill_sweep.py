"""kill -9 at every boundary of an issuance, then the same start again: one certificate, no key lost.

The points are K02 to K24 of the fault matrix. The key is committed with `order_intent` (K03), so there is no
K01; there is no K11, because nothing is done between the commit of `validating` and the challenge. At each the
worker is held exactly there, it is proved from the database and from what the CA saw that it is, and only then
it is killed.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import pytest
from cryptography import x509
from sqlalchemy import Row

from certworker.core.issuance import State
from tests.flow.box import until
from tests.flow.test_takeover import masters

from .database import held_write
from .oracles import OneActive, assert_all_well, keys_lost
from .proxy import Hold, rewrite
from .worker import Rig

pytestmark = pytest.mark.pebble

RESUME_LIMIT = 30.0
"""Seconds, half of a lease: whoever resumes has waited for none to end.

What is promised is 5 s on SQLite and 10 s on PostgreSQL, by a machine at rest; what it was is in the table.
"""

Reached = Callable[[], bool]
Arrange = Callable[[Rig, ExitStack], Reached]


def before(route: str, skip: int = 0) -> Arrange:
    """Hold a request before the CA sees it."""

    def arrange(rig: Rig, stack: ExitStack) -> Reached:
        hold = Hold()
        rig.proxy.on(route, hold, skip=skip)
        return lambda: hold.reached

    return arrange


def after(route: str, done: Callable[[Rig], bool] = lambda _: True) -> Arrange:
    """Hold the CA's answer, and wait until `done`: some of what it does, it does after its answer."""

    def arrange(rig: Rig, stack: ExitStack) -> Reached:
        hold = Hold(answered=True)
        rig.proxy.on(route, hold)
        return lambda: hold.reached and done(rig)

    return arrange


def nonce_after(route: str) -> Arrange:
    """Hold before anything is sent: the answer of `route` brings no nonce, so one has to be asked for."""

    def arrange(rig: Rig, stack: ExitStack) -> Reached:
        rig.proxy.on(route, rewrite(lambda answer: answer.without("replay-nonce")))
        return before("newNonce", skip=1)(rig, stack)

    return arrange


def commit(when: str, table: str = "issuances") -> Arrange:
    """Hold a transaction at a write of this kind, before its COMMIT."""

    def arrange(rig: Rig, stack: ExitStack) -> Reached:
        held = stack.enter_context(held_write(rig.url, table, when))
        return lambda: held.reached

    return arrange


def commit_of(state: State) -> Arrange:
    return commit(f"NEW.state = '{state}'")


def committed(state: State) -> Arrange:
    """Hold nothing: what follows this commit is no part of the issuance."""

    def arrange(rig: Rig, stack: ExitStack) -> Reached:
        return lambda: any(issuance.state == state for issuance in rig.issuances(NAME))

    return arrange


def has_looked(rig: Rig) -> bool:
    """Say whether the CA has fetched the token and was content."""
    (authorization,) = rig.proxy.seen("authorization")
    return f"authz {authorization.path.rpartition('/')[2]} set VALID" in rig.ca.log_path.read_text()


def has_issued(rig: Rig) -> bool:
    """Say whether every order has become a certificate."""
    return len(rig.ledger()) == rig.orders()


@dataclass(frozen=True)
class Point:
    """Where the worker dies."""

    name: str
    what: str
    """What is held, in words."""
    hold: Arrange
    state: State
    """What is committed then."""
    at_ca: tuple[int, int, int]
    """How many accounts, orders and certificates the CA has made by then."""
    orders: int = 1
    """How many orders the CA has made in the end."""


NAME = "kill.chaos.test"
NOTHING, ACCOUNT, ORDER, ISSUED = (0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)
S = State

POINTS = [
    Point("K02", "newAccount unsent", before("newAccount"), S.QUEUED, NOTHING),
    Point("K02a", "newAccount unanswered", after("newAccount"), S.QUEUED, ACCOUNT),
    Point("K03", "commit of key and order_intent", commit_of(S.ORDER_INTENT), S.QUEUED, ACCOUNT),
    Point("K04", "nonce for newOrder", nonce_after("newAccount"), S.ORDER_INTENT, ACCOUNT),
    Point("K05", "newOrder unsent", before("newOrder"), S.ORDER_INTENT, ACCOUNT),
    # The one place where an order may be left over: a CA without order reuse makes another one.
    Point("K06", "newOrder unanswered", after("newOrder"), S.ORDER_INTENT, ORDER, orders=2),
    Point("K07", "authorization unsent", before("authorization"), S.ORDERED, ORDER),
    Point("K08", "authorization unanswered", after("authorization"), S.ORDERED, ORDER),
    Point("K09", "commit of validating", commit_of(S.VALIDATING), S.ORDERED, ORDER),
    Point("K10", "nonce for the challenge", nonce_after("authorization"), S.VALIDATING, ORDER),
    Point("K12", "challenge unsent", before("challenge"), S.VALIDATING, ORDER),
    Point("K13", "challenge unanswered", after("challenge", has_looked), S.VALIDATING, ORDER),
    Point("K14", "order unsent, validating", before("order"), S.VALIDATING, ORDER),
    Point("K15", "commit of finalizing", commit_of(S.FINALIZING), S.VALIDATING, ORDER),
    Point("K16", "finalize unsent", before("finalize"), S.FINALIZING, ORDER),
    Point("K17", "finalize unanswered", after("finalize", has_issued), S.FINALIZING, ISSUED),
    Point("K18", "order unsent, finalizing", before("order", skip=1), S.FINALIZING, ISSUED),
    Point("K19", "certificate unanswered", after("certificate"), S.FINALIZING, ISSUED),
    Point("K20", "first write of the activation", commit_of(S.DONE), S.FINALIZING, ISSUED),
    Point("K21", "last write of the activation", commit("NEW.status = 'active'", "certificates"), S.FINALIZING, ISSUED),
    Point("K22", "after the activation", committed(S.DONE), S.DONE, ISSUED),
]


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_one_certificate_whatever_dies(point: Point, rig: Rig, record_property: Callable[[str, object], None]) -> None:
    """Killed at this point and started again: one certificate of the CA's, with the key that was stored."""
    rig.want(NAME)
    with OneActive(rig.url) as watch:
        dead = kill_at(point, rig, rig.worker.start)
        assert (rig.accounts(), rig.orders(), len(rig.ledger())) == point.at_ca
        rig.worker.start()
        until(lambda: rig.serial(NAME) is not None, RESUME_LIMIT)
        resumed = time.monotonic() - rig.worker.started_at
        done = rig.issuance(NAME)
        record_property("kill", describe(rig, point, resumed))
        assert_all_well(rig)

    assert watch.samples > 0
    assert (rig.accounts(), rig.orders()) == (1, point.orders)
    assert done.id == dead.id
    assert dead.spki_sha256 in (None, done.spki_sha256)


def describe(rig: Rig, point: Point, resumed: float, wanted: int = 1) -> dict[str, object]:
    """Return a line of the table at the end of the run."""
    issued = len(rig.ledger())
    return {
        "point": point.name, "held": point.what, "state": point.state.value, "database": rig.database, "kills": 1,
        "wanted": wanted, "issued": issued, "keys lost": len(keys_lost(rig)), "duplicates": issued - wanted,
        "orders": rig.orders(), "resume s": f"{resumed:.1f}",
    }  # fmt: skip


def kill_at(point: Point, rig: Rig, start: Callable[[], None]) -> Row[Any]:
    """Kill the worker at this point, and return the row of its issuance as it was then."""
    with ExitStack() as holds:
        reached = point.hold(rig, holds)
        start()
        until(lambda: stands_at(point, rig) and reached())
        dead = rig.issuance(NAME)
        rig.worker.kill()
    assert stands_at(point, rig)
    return dead


def stands_at(point: Point, rig: Rig) -> bool:
    """Say whether what is committed is what has to be committed at this point."""
    return [issuance.state for issuance in rig.issuances(NAME)][-1:] == [point.state]


RENEWAL_POINTS = [point for point in POINTS if point.name in ("K17", "K21")]


@pytest.mark.parametrize("point", RENEWAL_POINTS, ids=lambda point: point.name)
def test_a_renewal_is_killed(point: Point, rig: Rig, record_property: Callable[[str, object], None]) -> None:
    """The old certificate is active until the new one is, and there is never none or two."""
    rig.want(NAME)
    rig.worker.start()
    until(lambda: rig.serial(NAME) is not None)
    first = rig.serial(NAME)
    with OneActive(rig.url) as watch:
        dead = kill_at(point, rig, rig.want_renewal)
        assert rig.serial(NAME) == first
        rig.worker.start()
        until(lambda: rig.serial(NAME) != first, RESUME_LIMIT)
        resumed = time.monotonic() - rig.worker.started_at
        record_property("kill", describe(rig, replace(point, name=f"{point.name} renewal"), resumed, wanted=2))
        assert_all_well(rig, wanted=2)

    assert watch.samples > 0
    assert rig.orders() == 2
    assert [issuance.state for issuance in rig.issuances(NAME)] == ["done", "done"]
    assert rig.issuance(NAME).id == dead.id
    rig.worker.stop()


DELIVERY_POINTS = [
    Point(
        "K23", "heartbeat of the node", commit("CAST(NEW.metadata ->> 'revision' AS INTEGER) > 0", "node_status"),
        S.DONE, ISSUED,
    ),
    Point("K24", "note that it is served", commit("NEW.served_at IS NOT NULL", "lineages"), S.DONE, ISSUED),
]  # fmt: skip


@pytest.mark.proxy
@pytest.mark.parametrize("rig", ["sqlite-haproxy", "postgresql-haproxy"], indirect=True)
def test_a_delivery_is_killed(rig: Rig, record_property: Callable[[str, object], None]) -> None:
    """Killed between activation and heartbeat, and between heartbeat and `served_at`: served, and not ordered again."""
    rig.box.configure(NAME)
    for point in DELIVERY_POINTS:
        kill_at(point, rig, rig.worker.start)
        assert not rig.is_served(NAME)
    rig.worker.start()
    until(lambda: rig.is_served(NAME), RESUME_LIMIT)
    resumed = time.monotonic() - rig.worker.started_at
    record_property("kill", {**describe(rig, DELIVERY_POINTS[1], resumed), "point": "K23, K24", "kills": 2})
    assert_all_well(rig)
    with rig.box.upstream():
        status, body, leaf = rig.box.get(NAME, rig.ca.root_pem())

    assert (status, body) == (200, b"hello from upstream")
    assert f"{x509.load_der_x509_certificate(leaf).serial_number:x}" == rig.serial(NAME)
    assert rig.orders() == 1
    rig.worker.stop()
    assert masters(rig.box) == []
