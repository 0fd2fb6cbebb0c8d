"""The state machine of one issuance: every state has an answer, and every answer leads on."""

from datetime import timedelta
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certworker.core.issuance import (
    CLOSED,
    LONGEST_WAIT,
    SHORTEST_WAIT,
    Action,
    Patience,
    State,
    next_action,
    to_answer,
    unproved,
    wait_for,
)
from certworker.core.order import (
    Authorization,
    AuthorizationStatus,
    Challenge,
    ChallengeStatus,
    Order,
    OrderStatus,
)

OPEN = [state for state in State if state not in CLOSED]
BEFORE_ORDER = [State.QUEUED, State.ORDER_INTENT]


def order(status: OrderStatus) -> Order:
    return Order("https://ca.test/order/1", status, frozenset({"a.test"}), ("https://ca.test/authz/1",), "https://f")


AFTER = {
    Action.INTEND_ORDER: State.ORDER_INTENT,
    Action.PLACE_ORDER: State.ORDERED,
    Action.PUBLISH_CHALLENGES: State.VALIDATING,
    Action.INTEND_FINALIZE: State.FINALIZING,
    Action.DOWNLOAD: State.DONE,
    Action.ACTIVATE: State.DONE,
    Action.EXPLAIN_FAILURE: State.FAILED,
}
"""What is committed after an action; what only asks the CA, or tells it something, commits nothing."""


@pytest.mark.parametrize(("state", "status"), list(product(OPEN, [None, *OrderStatus])))
def test_there_is_always_one_answer(state: State, status: OrderStatus | None) -> None:
    """Every open state with everything a CA may say; before an order nobody is asked."""
    action = next_action(state, None if status is None else order(status))

    if state in BEFORE_ORDER:
        assert action in (Action.INTEND_ORDER, Action.PLACE_ORDER)
    elif state is State.DOWNLOADED:
        assert action is Action.ACTIVATE
    elif status is None:
        assert action is Action.LOOK
    else:
        assert action not in (Action.LOOK, Action.INTEND_ORDER, Action.PLACE_ORDER)


@pytest.mark.parametrize(("state", "status"), list(product(OPEN, OrderStatus)))
def test_nothing_goes_backwards(state: State, status: OrderStatus) -> None:
    """No action leads to a state before the one that is committed: nothing is done twice that matters."""
    after = AFTER.get(next_action(state, order(status)))

    assert after is None or after is State.FAILED or OPEN.index(state) < [*OPEN, State.DONE].index(after)


@pytest.mark.parametrize("state", [state for state in OPEN if state not in BEFORE_ORDER])
def test_an_invalid_order_ends_it(state: State) -> None:
    """A dead order is explained and closed, unless its certificate is here already."""
    expected = Action.ACTIVATE if state is State.DOWNLOADED else Action.EXPLAIN_FAILURE
    assert next_action(state, order(OrderStatus.INVALID)) is expected


@pytest.mark.parametrize(
    ("state", "status", "action"),
    [
        (State.ORDERED, OrderStatus.PENDING, Action.PUBLISH_CHALLENGES),
        (State.ORDERED, OrderStatus.READY, Action.INTEND_FINALIZE),
        (State.VALIDATING, OrderStatus.PENDING, Action.ANSWER_CHALLENGES),
        (State.VALIDATING, OrderStatus.VALID, Action.DOWNLOAD),
        (State.FINALIZING, OrderStatus.PENDING, Action.PROVE_AGAIN),
        (State.VALIDATING, OrderStatus.READY, Action.INTEND_FINALIZE),
        (State.FINALIZING, OrderStatus.READY, Action.FINALIZE),
        (State.FINALIZING, OrderStatus.PROCESSING, Action.WAIT),
        (State.FINALIZING, OrderStatus.VALID, Action.DOWNLOAD),
        (State.FINALIZING, OrderStatus.UNKNOWN, Action.WAIT),
    ],
)
def test_a_life_and_its_interruptions(state: State, status: OrderStatus, action: Action) -> None:
    """A lost answer to finalize is found out by looking; a second order is never the answer."""
    assert next_action(state, order(status)) is action


# -- a walk with a CA that keeps to RFC 8555 §7.1.6 ----------------------------------------------------

MOST_BUSY = 3
"""How often in a row the modelled CA may say that it is not ready yet."""


class ModelCa:
    """One order at a CA that may be slow, may refuse, may lose an answer; `draw` chooses."""

    def __init__(self, draw: st.DataObject, status: OrderStatus) -> None:
        self._draw = draw
        self.status = status
        self.answered = status is not OrderStatus.PENDING
        self._busy = 0

    def look(self) -> Order:
        if self.status is OrderStatus.PENDING and self.answered:
            self._move(OrderStatus.READY)
        elif self.status is OrderStatus.PROCESSING:
            self._move(OrderStatus.VALID)
        return order(self.status)

    def finalize(self) -> Order:
        assert self.status is OrderStatus.READY, "RFC 8555 §7.4: orderNotReady"
        self.status = self._draw.draw(st.sampled_from([OrderStatus.PROCESSING, OrderStatus.VALID]))
        return order(self.status)

    def _move(self, to: OrderStatus) -> None:
        busy = self._busy < MOST_BUSY and self._draw.draw(st.booleans())
        self._busy = self._busy + 1 if busy else 0
        if not busy:
            self.status = self._draw.draw(st.sampled_from([to, to, to, OrderStatus.INVALID]))


POSSIBLE = {
    State.ORDERED: [OrderStatus.PENDING, OrderStatus.READY, OrderStatus.INVALID],
    State.VALIDATING: [OrderStatus.PENDING, OrderStatus.READY, OrderStatus.INVALID],
    State.FINALIZING: [OrderStatus.READY, OrderStatus.PROCESSING, OrderStatus.VALID, OrderStatus.INVALID],
}
"""Where the CA's order can be when we come back after a crash."""


@given(start=st.sampled_from(OPEN), draw=st.data())
def test_every_walk_ends(start: State, draw: st.DataObject) -> None:
    """From any state, with a process that may forget everything at any time, a CA leads to done or failed."""
    state, seen = start, None
    ca = ModelCa(draw, draw.draw(st.sampled_from(POSSIBLE.get(start, [OrderStatus.PENDING]))))
    crashes = acts = 0
    while state not in CLOSED:
        acts += 1
        assert acts < 60, f"still {state} after {acts} acts"
        if crashes < 3 and draw.draw(st.booleans()):
            crashes, seen = crashes + 1, None
        action = next_action(state, seen)
        match action:
            case Action.LOOK:
                seen = ca.look()
            case Action.WAIT:
                seen = None
            case Action.PLACE_ORDER:
                state, seen = State.ORDERED, order(ca.status)
            case Action.ANSWER_CHALLENGES:
                ca.answered, seen = True, None
            case Action.FINALIZE:
                seen = ca.finalize()
                if draw.draw(st.booleans()):  # the answer may be lost
                    seen = None
            case _:
                state = AFTER[action]
    assert state in (State.DONE, State.FAILED)
    assert (state is State.FAILED) == (ca.status is OrderStatus.INVALID)


# -- challenges ----------------------------------------------------------------------------------------


def authorization(
    status: AuthorizationStatus, challenge: ChallengeStatus, kind: str = "http-01", name: str = "a.test"
) -> Authorization:
    offered = (
        Challenge("dns-persist-01", "https://ca.test/p", ChallengeStatus.PENDING),
        Challenge(kind, f"https://ca.test/{name}", challenge, token="t" * 22),
    )
    return Authorization(f"https://ca.test/authz/{name}", status, name, offered)


@pytest.mark.parametrize("status", list(AuthorizationStatus))
def test_only_pending_authorizations_need_work(status: AuthorizationStatus) -> None:
    """A valid one that the CA reuses is left alone."""
    one = authorization(status, ChallengeStatus.PENDING)
    assert unproved((one,)) == ((one,) if status is AuthorizationStatus.PENDING else ())


@pytest.mark.parametrize("status", list(ChallengeStatus))
def test_a_challenge_is_answered_once(status: ChallengeStatus) -> None:
    """Only HTTP-01, and only one that the CA has not been told of."""
    one = authorization(AuthorizationStatus.PENDING, status)
    assert to_answer((one,)) == ((one,) if status is ChallengeStatus.PENDING else ())
    assert to_answer((authorization(AuthorizationStatus.PENDING, status, kind="dns-01"),)) == ()


# -- patience ------------------------------------------------------------------------------------------


@given(looks=st.integers(0, 300), retry_after=st.none() | st.timedeltas(timedelta(0), timedelta(days=400)))
def test_a_wait_has_bounds(looks: int, retry_after: timedelta | None) -> None:
    """Never a busy loop, never longer than a minute, whatever the CA says and however long it takes."""
    assert SHORTEST_WAIT <= wait_for(retry_after, looks) <= LONGEST_WAIT


def test_the_ca_is_taken_at_its_word() -> None:
    """Retry-After within the bounds is followed exactly (RFC 8555 §7.5.1)."""
    for seconds in (1, 5, 60):
        assert wait_for(timedelta(seconds=seconds), 7) == timedelta(seconds=seconds)


def test_looks_become_rarer() -> None:
    """From a quarter of a second to half a minute, each pause at least as long as the one before."""
    pauses = [wait_for(None, looks) for looks in range(200)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (Patience().first, Patience().longest)
    assert sum(pauses[:8], timedelta()) < timedelta(seconds=20)  # a quick CA is not kept waiting
