"""One attempt to get one certificate: its states, and the one thing that moves it forward.

    queued → order_intent → ordered → validating → finalizing → done
    finalizing → downloaded → done: a certificate that is not valid yet
    any open state → failed | cancelled
    an order that died of some of its names → queued, without these

Every act at the CA has a committed state before it, and every input of the act (key, CSR, account, names)
is fixed in the row by then; what only reads (order, authorizations, chain) needs none. After a crash the CA
is asked where the order is; whatever it says, `next_action` has an answer, so nothing is guessed and nothing
is done twice that matters.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum, auto

from certworker.core.order import (
    Authorization,
    AuthorizationStatus,
    ChallengeStatus,
    Order,
    OrderStatus,
)


class State(StrEnum):
    """What is committed. The comment says what happens next."""

    QUEUED = "queued"  # choose the account, make key and CSR, intend the order
    ORDER_INTENT = "order_intent"  # newOrder
    ORDERED = "ordered"  # read the authorizations, publish the key authorizations
    VALIDATING = "validating"  # tell the CA to look, wait for it, intend to finalize
    FINALIZING = "finalizing"  # finalize with the stored CSR, wait for the CA; download and activate
    DOWNLOADED = "downloaded"  # wait until it is valid, activate
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


CLOSED = frozenset([State.DONE, State.FAILED, State.CANCELLED])
_BEFORE_ORDER = frozenset([State.QUEUED, State.ORDER_INTENT])
_BEFORE_READY = frozenset([State.ORDERED, State.VALIDATING])


class Action(StrEnum):
    """One move: at most one act at the CA, then one commit."""

    INTEND_ORDER = auto()
    PLACE_ORDER = auto()
    LOOK = auto()
    """Read the order; commits nothing."""
    PUBLISH_CHALLENGES = auto()
    ANSWER_CHALLENGES = auto()
    """Tell the CA to look, once with every claim; in between it is waited for."""
    PROVE_AGAIN = auto()
    """The order was ready and is pending: see what the CA wants proved, commit no other state."""
    INTEND_FINALIZE = auto()
    FINALIZE = auto()
    DOWNLOAD = auto()
    ACTIVATE = auto()
    WAIT = auto()
    """The CA is busy: look again later."""
    EXPLAIN_FAILURE = auto()
    """The order is dead: find out which challenge failed, and close."""


_BEFORE_ORDER_ACTIONS = {
    State.QUEUED: Action.INTEND_ORDER,
    State.ORDER_INTENT: Action.PLACE_ORDER,
}
_PENDING_ACTIONS = {
    State.ORDERED: Action.PUBLISH_CHALLENGES,
    State.VALIDATING: Action.ANSWER_CHALLENGES,
    # RFC 8555 §7.1.6 knows no way back; a CA that was restored from a backup, or lags behind itself, does.
    State.FINALIZING: Action.PROVE_AGAIN,
}


def next_action(state: State, order: Order | None) -> Action:
    """Return the one thing that moves an open issuance forward (RFC 8555 §7.1.6).

    `order` is what the CA last said of it in this session, None when it was not asked yet: then, once
    there is an order, the answer is always to look first.
    """
    if state in _BEFORE_ORDER:
        return _BEFORE_ORDER_ACTIONS[state]
    if state is State.DOWNLOADED:
        return Action.ACTIVATE
    if order is None:
        return Action.LOOK
    match order.status:
        case OrderStatus.PENDING:
            return _PENDING_ACTIONS.get(state, Action.WAIT)
        case OrderStatus.READY:
            # `ready` after a finalize that was accepted: the CA lost it; the same CSR makes it harmless.
            return Action.INTEND_FINALIZE if state in _BEFORE_READY else Action.FINALIZE
        case OrderStatus.PROCESSING | OrderStatus.UNKNOWN:
            return Action.WAIT
        case OrderStatus.VALID:
            return Action.DOWNLOAD
        case OrderStatus.INVALID:
            return Action.EXPLAIN_FAILURE


def unproved(authorizations: Iterable[Authorization]) -> tuple[Authorization, ...]:
    """Return those that need a key authorization published: pending ones, whatever their challenge does."""
    return tuple(a for a in authorizations if a.status is AuthorizationStatus.PENDING)


def to_answer(authorizations: Iterable[Authorization]) -> tuple[Authorization, ...]:
    """Return those whose challenge the CA has not been told of: a second answer would be an error."""
    return _with_challenge(ChallengeStatus.PENDING, authorizations)


def still_validating(authorizations: Iterable[Authorization]) -> tuple[Authorization, ...]:
    """Return those that the CA is at work on: it was told to look, and has not said what it found."""
    return _with_challenge(ChallengeStatus.PROCESSING, authorizations)


def _with_challenge(status: ChallengeStatus, authorizations: Iterable[Authorization]) -> tuple[Authorization, ...]:
    found = ((a, a.http01()) for a in unproved(authorizations))
    return tuple(a for a, challenge in found if challenge is not None and challenge.status is status)


_ATTEMPTS = 3
"""How often the CA may refuse a name before a certificate that still has it is renewed without it."""


def may_leave_out(
    ordered: frozenset[str], refused: frozenset[str], served: frozenset[str], failures: int, *, urgent: bool
) -> bool:
    """Say whether to go on without the names that the CA `refused`: a dead name must not block its neighbours.

    A name that the present certificate still serves would lose it: it gets some more tries first, after
    `failures` of this lineage, unless that certificate is about to end.
    """
    if not refused or not refused < ordered:
        return False
    return urgent or not refused & served or failures + 1 >= _ATTEMPTS


@dataclass(frozen=True, slots=True)
class Patience:
    """How often the CA is asked while it works, when it does not say so itself."""

    first: timedelta = timedelta(milliseconds=250)
    longest: timedelta = timedelta(seconds=30)
    growth: float = 1.6


_BELIEVED = 4
_POLITE = timedelta(seconds=1)
POLLING = timedelta(minutes=10)
"""A CA that is busy for longer is asked every REST only, and the issuance holds no place meanwhile."""
REST = timedelta(minutes=5)
SHORTEST_WAIT = timedelta(milliseconds=50)
LONGEST_WAIT = timedelta(seconds=60)


def wait_for(retry_after: timedelta | None, looks: int, patience: Patience = Patience()) -> timedelta:
    """Return how long to wait before look number `looks` + 1 (RFC 8555 §7.5.1: Retry-After)."""
    if retry_after is not None:
        # A CA that says "at once" again and again is believed a few times only.
        return min(max(retry_after, SHORTEST_WAIT if looks < _BELIEVED else _POLITE), LONGEST_WAIT)
    steps = min(looks, 25)  # far past `longest`; a long wait must not overflow
    return min(patience.first * patience.growth**steps, patience.longest)
