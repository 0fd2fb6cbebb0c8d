"""When a CA is asked for nothing for a while, by nobody: a circuit breaker that all workers share.

    closed → open → half_open → closed      the CA is unavailable
             open ← half_open
    any → paused → half_open                our account is refused until a person acts

It moves on failures whose scope is the CA or the account; what one attempt meets alone shows that the CA
answers. Whoever holds the row (`store.breakers`) asks here what it becomes; `steps.gate` does the asking.
"""

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from certworker.core.retry import BAD_NONCE, LONGEST_RETRY_AFTER, Endpoint, ErrorClass, Failure, Scope, spread_wait


class State(StrEnum):
    """Who may ask the CA for certificates."""

    CLOSED = "closed"
    """Everybody."""
    OPEN = "open"
    """Nobody; one worker reads the directory now and then."""
    HALF_OPEN = "half_open"
    """One worker, one order at a time."""
    PAUSED = "paused"
    """Nobody, until the operator acts."""


@dataclass(frozen=True, slots=True)
class Limited:
    """A newOrder that the CA answered with a limit (RFC 8555 §6.6)."""

    lineage_id: str
    at: datetime
    until: datetime
    """When the CA lets it try again."""


@dataclass(frozen=True, slots=True)
class Breaker:
    """What the workers together know of one CA; the value without arguments is that of a CA never in trouble."""

    state: State = State.CLOSED
    state_at: datetime = datetime(1970, 1, 1, tzinfo=UTC)
    """Since when the CA is taken for available, or is not: stays through tries that did not help."""
    failures: int = 0
    """In a row, while it is closed."""
    successes: int = 0
    """While it is half open."""
    probes: int = 0
    """How often the directory was read since it opened, or since before it closed for moments only."""
    probe_at: datetime | None = None
    """Open: when the directory is read next. Paused: when an order is tried all the same."""
    hold_until: datetime | None = None
    """Until then the CA wants to be left alone by everybody."""
    limited: tuple[Limited, ...] = ()
    """The last ones, one for each lineage."""
    error: dict[str, str] | None = None
    """Why: class, type, detail and hint of a failure."""
    registration: str | None = None
    """What accounts were made with when the account was refused."""


@dataclass(frozen=True, slots=True)
class Free:
    """Ask."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One order may show whether the CA is there again."""


@dataclass(frozen=True, slots=True)
class Closed:
    """Ask nothing before `until`, and then look here again."""

    until: datetime


Admission = Free | Trial | Closed

_OPENS_AFTER = 5
_OPENS_AT_DIRECTORY = 3
"""Without the directory nothing else can even be tried."""
_OPENS_AT_NONCES = 12
"""At a CA that refuses nine nonces of ten a third of all acts fails, ten tries each: a few in a row are chance."""
_CLOSES_AFTER = 3
_PROBES = (timedelta(seconds=30), timedelta(minutes=1), timedelta(minutes=2), timedelta(minutes=5))
"""After opening, and after each probe; the last one repeats."""
_SOON = timedelta(minutes=10)
"""Of an outage that has lasted longer nobody expects that it ends in seconds."""
_UNDER_WAY = timedelta(seconds=5)
"""When to look again while somebody reads the directory."""
_SPREAD = 1.2
"""More than a wait is ever spread by."""
_CALM = timedelta(minutes=15)
"""A breaker that opens sooner than this after it closed goes on with its probes where they were."""
_PAUSE = timedelta(hours=24)
_LIMITED_WITHIN = timedelta(minutes=5)
_LIMITED_LINEAGES = 3
"""So many limits on different names are one on the account."""
_LIMITED_FOR = timedelta(hours=1)
"""Where the CA named no time."""


def admits(breaker: Breaker, now: datetime) -> Admission:
    """Say who may ask the CA at `now`."""
    waits = breaker.state in (State.OPEN, State.PAUSED)
    until = max(_hold_end(breaker, now), _probe_time(breaker, now) if waits else now)
    if now < until:
        return Closed(until)
    match breaker.state:
        case State.CLOSED:
            return Free()
        case State.OPEN:
            return Closed(now + _UNDER_WAY)
        case State.HALF_OPEN | State.PAUSED:
            return Trial()


def _hold_end(breaker: Breaker, now: datetime) -> datetime:
    return _end_of(breaker.hold_until, now, LONGEST_RETRY_AFTER)


def _probe_time(breaker: Breaker, now: datetime) -> datetime:
    return _end_of(breaker.probe_at, now, _PAUSE if breaker.state is State.PAUSED else _PROBES[-1])


def _end_of(wait: datetime | None, now: datetime, longest: timedelta) -> datetime:
    """Return when a wait ends; one longer than any that we begin was measured by a clock that ran ahead."""
    return now if wait is None or wait - now > longest * _SPREAD else wait


def after_success(breaker: Breaker, now: datetime) -> Breaker:
    """Return what becomes of it when the CA answers a request of an issuance as RFC 8555 has it."""
    match breaker.state:
        case State.CLOSED:
            return replace(breaker, failures=0) if breaker.failures else breaker
        case State.HALF_OPEN if breaker.successes + 1 < _CLOSES_AFTER:
            return replace(breaker, successes=breaker.successes + 1)
        case State.HALF_OPEN:
            return Breaker(state_at=now, probes=breaker.probes, hold_until=breaker.hold_until, limited=breaker.limited)
        case State.OPEN | State.PAUSED:
            return breaker  # asked before it opened, answered late


def is_answered(failure: Failure) -> bool | None:
    """Say whether the CA has answered an issuance that met `failure`; None if that does not show."""
    if failure.scope is Scope.CA:
        return False
    return True if failure.endpoint is not None and failure.error_class is not ErrorClass.TRANSIENT else None


def after_failure(
    breaker: Breaker, failure: Failure, lineage_id: str, registration: str, now: datetime, draw: float
) -> Breaker:
    """Return what becomes of it when an issuance of `lineage_id` meets `failure`.

    `registration` is what accounts are made with now; `draw`, uniform in [0, 1), makes waits up to a
    tenth longer, never shorter.
    """
    match failure.scope:
        case Scope.CA:
            return _fail(_hold(breaker, failure, now, draw), failure, now, draw)
        case Scope.ACCOUNT if failure.error_class in (ErrorClass.ACTION_REQUIRED, ErrorClass.PERMANENT):
            return _pause(breaker, failure, registration, now, draw)
        case Scope.ISSUANCE if is_answered(failure):
            answered = after_success(breaker, now)
            limited = failure.error_class is ErrorClass.RATE_LIMITED and failure.endpoint is Endpoint.NEW_ORDER
            return _limit(answered, failure, lineage_id, now, draw) if limited else answered
        case _:
            return breaker


def begin_probe(breaker: Breaker, now: datetime, draw: float) -> Breaker | None:
    """Return it with one more probe under way, None if none is due.

    Committed before the directory is read: whoever dies while reading it has asked all the same.
    """
    # Half open with nothing due to try would stay so: then the directory has to do.
    asks = breaker.state in (State.OPEN, State.HALF_OPEN)
    if not asks or now < max(_probe_time(breaker, now), _hold_end(breaker, now)):
        return None
    return _plan_probe(replace(breaker, probes=breaker.probes + 1), now, draw)


def after_probe(breaker: Breaker, failure: Failure | None, now: datetime, draw: float) -> Breaker:
    """Return what becomes of it when the directory was read, or could not be: `failure`."""
    if breaker.state not in (State.OPEN, State.HALF_OPEN):
        return breaker
    if failure is None and breaker.state is State.HALF_OPEN:
        return after_success(breaker, now)
    if failure is None:
        return _half_open(breaker, now, draw)
    if breaker.state is State.HALF_OPEN:
        return _fail(_hold(breaker, failure, now, draw), failure, now, draw)
    return replace(_hold(breaker, failure, now, draw), error=_describe(failure))


def probe_wait(number: int, draw: float) -> timedelta:
    """Return how long to wait before the directory is read, after `number` (>= 0) times that did not help."""
    return spread_wait(_PROBES[min(number, len(_PROBES) - 1)], draw)


def resume(breaker: Breaker, now: datetime, draw: float) -> Breaker:
    """End a pause: the operator may have acted, and one order shows it, or the directory if none is due."""
    return _half_open(breaker, now, draw) if breaker.state is State.PAUSED else breaker


def _half_open(breaker: Breaker, now: datetime, draw: float) -> Breaker:
    return replace(breaker, state=State.HALF_OPEN, successes=0, probe_at=now + spread_wait(_PROBES[-1], draw))


def _fail(breaker: Breaker, failure: Failure, now: datetime, draw: float) -> Breaker:
    match breaker.state:
        case State.CLOSED:
            failures, error = breaker.failures + 1, _describe(failure)
            if failures < _opens_after(failure):
                return replace(breaker, failures=failures, error=error)
            probes = breaker.probes if now - breaker.state_at < _CALM else 0
            opened = replace(breaker, state=State.OPEN, state_at=now, failures=failures, probes=probes, error=error)
            return _plan_probe(opened, now, draw)
        case State.HALF_OPEN:
            return _plan_probe(replace(breaker, state=State.OPEN, error=_describe(failure)), now, draw)
        case State.OPEN | State.PAUSED:
            return breaker


def _opens_after(failure: Failure) -> int:
    """Return how many failures in a row open it, the last of which is `failure`."""
    if failure.type == BAD_NONCE:
        return _OPENS_AT_NONCES
    return _OPENS_AT_DIRECTORY if failure.endpoint is Endpoint.DIRECTORY else _OPENS_AFTER


def _pause(breaker: Breaker, failure: Failure, registration: str, now: datetime, draw: float) -> Breaker:
    if breaker.state is State.PAUSED:
        return breaker
    state_at = now if breaker.state is State.CLOSED else breaker.state_at
    return replace(
        breaker, state=State.PAUSED, state_at=state_at, failures=0, error=_describe(failure),
        registration=registration, probe_at=now + spread_wait(_PAUSE, draw),
    )  # fmt: skip


def _hold(breaker: Breaker, failure: Failure, now: datetime, draw: float) -> Breaker:
    """Leave the CA alone for as long as it asks everybody to (RFC 9110 §10.2.3)."""
    if failure.retry_after is None:
        return breaker
    return _leave_alone(breaker, failure, now + spread_wait(failure.retry_after, draw))


def _limit(breaker: Breaker, failure: Failure, lineage_id: str, now: datetime, draw: float) -> Breaker:
    until = now + spread_wait(failure.retry_after or _LIMITED_FOR, draw)
    recent = [one for one in breaker.limited if now - one.at < _LIMITED_WITHIN and one.lineage_id != lineage_id]
    limited = (*recent, Limited(lineage_id, now, until))
    if len(limited) < _LIMITED_LINEAGES:
        return replace(breaker, limited=limited)
    # Perhaps it was the names after all, and their own limits last for days: nobody else waits that long.
    return _leave_alone(replace(breaker, limited=()), failure, min(until, now + _LIMITED_FOR))


def _leave_alone(breaker: Breaker, failure: Failure, until: datetime) -> Breaker:
    # Why it is paused is what a person has to see.
    error = breaker.error if breaker.state is State.PAUSED else _describe(failure)
    return replace(breaker, hold_until=max(breaker.hold_until or until, until), error=error)


def _plan_probe(breaker: Breaker, now: datetime, draw: float) -> Breaker:
    # By the time too: after hours in which no worker ran it is no new outage.
    number = breaker.probes if now - breaker.state_at < _SOON else len(_PROBES) - 1
    return replace(breaker, probe_at=now + probe_wait(number, draw))


def _describe(failure: Failure) -> dict[str, str]:
    return {
        "class": failure.error_class.value, "type": failure.type, "detail": failure.detail, "hint": failure.hint,
    }  # fmt: skip
