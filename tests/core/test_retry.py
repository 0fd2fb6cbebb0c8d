"""When a failed attempt is followed by the next one, whose trouble it is, and which names are at fault."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certworker.core.certificate import Validity
from certworker.core.order import (
    Authorization,
    AuthorizationStatus,
    Challenge,
    ChallengeStatus,
    Order,
    OrderStatus,
)
from certworker.core.retry import (
    LONGEST_RETRY_AFTER,
    Endpoint,
    ErrorClass,
    Failure,
    Scope,
    classify_nonsense,
    classify_order,
    classify_problem,
    classify_silence,
    names_refused,
    retry_at,
)
from certworker.errors import Problem

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
DAY, HOUR = timedelta(days=1), timedelta(hours=1)
URN = "urn:ietf:params:acme:error:"
T, V, R, P, X = ErrorClass

CODES = [
    "accountDoesNotExist", "alreadyReplaced", "alreadyRevoked", "badCSR", "badNonce", "badPublicKey",
    "badRevocationReason", "badSignatureAlgorithm", "caa", "compound", "conflict", "connection", "dns", "dnssec",
    "externalAccountRequired", "incorrectResponse", "invalidContact", "invalidProfile", "malformed", "orderNotReady",
    "rateLimited", "rejectedIdentifier", "serverInternal", "tls", "unauthorized", "unsupportedContact",
    "unsupportedIdentifier", "userActionRequired", "fromTheFuture",
]  # fmt: skip

draws = st.floats(0, 1, exclude_max=True)
failures = st.builds(
    Failure,
    st.sampled_from(ErrorClass),
    st.sampled_from([f"{URN}serverInternal", "certworker:ca-tls"]),
    st.just("said"),
    st.just("hint"),
    st.none() | st.timedeltas(timedelta(0), timedelta(days=400)),
)
servings = st.none() | st.builds(
    lambda age, rest: Validity(NOW - age, NOW + rest),
    st.timedeltas(timedelta(0), 400 * DAY),
    st.timedeltas(-400 * DAY, 400 * DAY),
)
leaf_problems = st.builds(
    Problem,
    st.sampled_from([*(URN + code for code in CODES), "about:blank", "urn:other"]),
    st.sampled_from(["said", "see https://ca.test/why", "{0} {name}"]),
    st.none() | st.sampled_from([200, 400, 401, 403, 404, 405, 408, 409, 415, 418, 425, 429, 500, 502, 503, 599]),
    st.none() | st.timedeltas(timedelta(0), 400 * DAY),
    st.none() | st.just("https://ca.test/{act}"),
    identifier=st.none() | st.sampled_from(["a.test", "b.test", "elsewhere.test"]),
)
problems = st.builds(replace, leaf_problems, subproblems=st.lists(leaf_problems, max_size=3).map(tuple))


def pause(
    error_class: ErrorClass,
    count: int,
    draw: float = 0.5,
    serving: Validity | None = None,
    type_: str = "t",
) -> timedelta:
    return retry_at(Failure(error_class, type_, "d", "h"), count, NOW, draw, serving) - NOW


def left(rest: timedelta, lifetime: timedelta = 90 * DAY) -> Validity:
    """Return a certificate with so much left of its life."""
    return Validity(NOW + rest - lifetime, NOW + rest)


def problem(code: str, status: int = 400, **more: Any) -> Problem:
    return Problem(URN + code if code else "about:blank", "said", status, **more)


# -- schedules ------------------------------------------------------------------------------------------


@given(failures, st.integers(1, 10_000), draws, servings)
def test_the_next_attempt_is_ahead_and_within_reason(
    failure: Failure, count: int, draw: float, serving: Validity | None
) -> None:
    """Never now; later than a day, and what spreads it, only where there is nothing to lose."""
    wait = retry_at(failure, count, NOW, draw, serving) - NOW
    longest = 7 * DAY if failure.error_class is P and serving is None else DAY

    assert timedelta(0) < wait <= longest * 1.2


@given(failures.filter(lambda failure: failure.retry_after is not None), st.integers(1, 50), draws, servings)
def test_the_cas_wish_is_never_undercut(failure: Failure, count: int, draw: float, serving: Validity | None) -> None:
    """Retry-After + 0 to 10 %, cut at a day, however urgent it is."""
    assert failure.retry_after is not None
    asked = min(failure.retry_after, LONGEST_RETRY_AFTER)
    wait = retry_at(failure, count, NOW, draw, serving) - NOW

    assert wait >= asked
    assert wait <= max(asked, timedelta(seconds=1)) * 1.1


@given(st.sampled_from(ErrorClass), draws, servings, st.sampled_from(["t", "certworker:ca-tls", URN + "badNonce"]))
def test_patience_grows(error_class: ErrorClass, draw: float, serving: Validity | None, type_: str) -> None:
    """Each failure in a row waits at least as long as the one before, for the same draw."""
    waits = [pause(error_class, count, draw, serving, type_) for count in range(1, 20)]

    assert waits == sorted(waits)


@given(st.sampled_from(ErrorClass), st.integers(1, 50), draws, servings)
def test_what_serves_never_makes_it_later(
    error_class: ErrorClass, count: int, draw: float, serving: Validity | None
) -> None:
    """There is more to lose with a certificate than without."""
    assert pause(error_class, count, draw, serving) <= pause(error_class, count, draw)


@pytest.mark.parametrize(
    ("error_class", "serving", "minutes"),
    [
        (T, None, [5 / 60, 15 / 60, 45 / 60, 2, 5, 10, 30, 60, 60]),
        (V, None, [1, 10, 100, 1440, 1440]),
        (V, left(30 * DAY), [1, 10, 100, 1440, 1440]),
        (V, left(8 * DAY), [1, 10, 100, 360, 360]),
        (R, left(HOUR), [60, 180, 720, 1440, 1440]),
        (P, None, [1440, 7 * 1440, 7 * 1440]),
        (P, left(29 * DAY), [1440, 1440, 1440]),
        (P, left(-DAY), [1440, 1440, 1440]),
        (X, None, [1440, 1440]),
        (X, left(HOUR), [1440, 1440]),
    ],
)
def test_schedules(error_class: ErrorClass, serving: Validity | None, minutes: list[float]) -> None:
    """Let's Encrypt's advice for validations, sooner for a site about to go down; days for what a person mends."""
    waits = [pause(error_class, n, serving=serving) for n in range(1, len(minutes) + 1)]

    assert waits == [timedelta(minutes=m) for m in minutes]


def test_refused_nonces_are_tried_again_soon() -> None:
    """Ten refusals are chance at a CA that refuses nine of ten; a dozen times ten in a row are not."""
    waits = [pause(T, count, type_=URN + "badNonce") for count in range(1, 17)]

    assert waits[:12] == [timedelta(seconds=5)] * 12
    assert waits[12:] == [pause(T, count) for count in range(1, 5)]


@given(st.integers(1, 50), draws)
def test_a_ca_that_is_not_trusted_is_asked_rarely(count: int, draw: float) -> None:
    """Ten minutes at least: a captive portal or a wrong clock is not mended in seconds."""
    wait = pause(T, count, draw, type_="certworker:ca-tls")

    assert max(timedelta(minutes=10), pause(T, count, draw)) <= wait


def test_three_validations_in_the_first_hours_then_one_a_day() -> None:
    """Stays under 5 failed validations per name, account and hour, with the shortest draws."""
    at, tried = timedelta(0), [timedelta(0)]
    for count in range(1, 10):
        at += pause(V, count, draw=0.0)
        tried.append(at)

    for start in tried:
        assert sum(start <= moment < start + HOUR for moment in tried) <= 3


# -- scopes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status", "doing", "expected"),
    [
        # The CA's, and so everybody's.
        ("", 500, Endpoint.FINALIZE, Scope.CA),
        ("", 502, Endpoint.ORDER, Scope.CA),
        ("", 503, Endpoint.NEW_ORDER, Scope.CA),
        ("serverInternal", 500, Endpoint.NEW_ORDER, Scope.CA),
        ("badNonce", 400, Endpoint.NEW_ORDER, Scope.CA),
        ("rateLimited", 503, Endpoint.NEW_ORDER, Scope.CA),
        ("rateLimited", 429, Endpoint.DIRECTORY, Scope.CA),
        ("rateLimited", 429, Endpoint.NEW_NONCE, Scope.CA),
        ("rateLimited", 429, Endpoint.NEW_ACCOUNT, Scope.CA),
        ("", 429, Endpoint.NEW_NONCE, Scope.CA),
        ("", 404, Endpoint.DIRECTORY, Scope.CA),
        ("", 403, Endpoint.NEW_NONCE, Scope.CA),
        # The account's.
        ("accountDoesNotExist", 400, Endpoint.NEW_ORDER, Scope.ACCOUNT),
        ("accountDoesNotExist", 400, Endpoint.ORDER, Scope.ACCOUNT),
        ("badPublicKey", 400, Endpoint.NEW_ACCOUNT, Scope.ACCOUNT),
        ("badSignatureAlgorithm", 400, Endpoint.ORDER, Scope.ACCOUNT),
        ("externalAccountRequired", 403, Endpoint.NEW_ACCOUNT, Scope.ACCOUNT),
        ("invalidContact", 400, Endpoint.NEW_ACCOUNT, Scope.ACCOUNT),
        ("unsupportedContact", 400, Endpoint.NEW_ACCOUNT, Scope.ACCOUNT),
        ("malformed", 400, Endpoint.NEW_ACCOUNT, Scope.ACCOUNT),
        ("unauthorized", 403, Endpoint.NEW_ACCOUNT, Scope.ACCOUNT),
        ("unauthorized", 403, Endpoint.ACCOUNT, Scope.ACCOUNT),
        ("unauthorized", 403, Endpoint.NEW_ORDER, Scope.ACCOUNT),
        ("userActionRequired", 403, Endpoint.FINALIZE, Scope.ACCOUNT),
        # One attempt's.
        ("alreadyReplaced", 409, Endpoint.NEW_ORDER, Scope.ISSUANCE),
        ("badCSR", 400, Endpoint.FINALIZE, Scope.ISSUANCE),
        ("badPublicKey", 400, Endpoint.FINALIZE, Scope.ISSUANCE),
        ("caa", 403, Endpoint.FINALIZE, Scope.ISSUANCE),
        ("connection", 400, Endpoint.VALIDATION, Scope.ISSUANCE),
        ("invalidProfile", 400, Endpoint.NEW_ORDER, Scope.ISSUANCE),
        ("malformed", 400, Endpoint.NEW_ORDER, Scope.ISSUANCE),
        ("orderNotReady", 403, Endpoint.FINALIZE, Scope.ISSUANCE),
        ("rateLimited", 429, Endpoint.NEW_ORDER, Scope.ISSUANCE),
        ("rejectedIdentifier", 400, Endpoint.NEW_ORDER, Scope.ISSUANCE),
        ("unauthorized", 403, Endpoint.ORDER, Scope.ISSUANCE),
        ("", 404, Endpoint.ORDER, Scope.ISSUANCE),
        ("", 408, Endpoint.NEW_ORDER, Scope.ISSUANCE),
        # The CA has answered, or can be done without.
        ("serverInternal", 500, Endpoint.VALIDATION, Scope.ISSUANCE),
        ("", 500, Endpoint.RENEWAL_INFO, Scope.ISSUANCE),
    ],
)
def test_the_scope_says_who_else_would_meet_it(code: str, status: int, doing: Endpoint, expected: Scope) -> None:
    assert classify_problem(problem(code, status), doing).scope is expected


def test_a_paused_name_stops_no_other() -> None:
    """A link without Retry-After is Boulder's pause of names; with 503 it is a CA that is busy."""
    linked = replace(problem("rateLimited", 429), detail="see https://ca.test/unpause")

    paused = classify_problem(linked, Endpoint.NEW_ORDER)
    busy = classify_problem(replace(linked, status=503), Endpoint.NEW_ORDER)

    assert (paused.error_class, paused.scope) == (X, Scope.ISSUANCE)
    assert (busy.error_class, busy.scope) == (R, Scope.CA)


@pytest.mark.parametrize("doing", Endpoint)
def test_silence_is_everybodys_trouble(doing: Endpoint) -> None:
    """Who asks next gets no answer either; renewal information can be done without."""
    failure = classify_silence("certworker:ca-timeout", "d", "h", doing)

    assert (failure.error_class, failure.endpoint) == (T, doing)
    assert (failure.scope is Scope.CA) is (doing not in (Endpoint.RENEWAL_INFO, Endpoint.VALIDATION))


@pytest.mark.parametrize(
    ("doing", "expected"),
    [
        (Endpoint.DIRECTORY, Scope.CA),
        (Endpoint.NEW_NONCE, Scope.CA),
        (Endpoint.NEW_ACCOUNT, Scope.CA),
        (Endpoint.NEW_ORDER, Scope.CA),
        (Endpoint.ORDER, Scope.ISSUANCE),
        (Endpoint.CERTIFICATE, Scope.ISSUANCE),
        (Endpoint.RENEWAL_INFO, Scope.ISSUANCE),
    ],
)
def test_nonsense_about_one_order_is_that_orders(doing: Endpoint, expected: Scope) -> None:
    assert classify_nonsense("certworker:ca-answer", "d", "h", doing).scope is expected


@given(problems, st.sampled_from(Endpoint))
def test_every_problem_has_one_class_one_hint_one_scope(said: Problem, doing: Endpoint) -> None:
    """Whatever a CA says, wherever; an account is only stopped for what a person has to mend."""
    failure = classify_problem(said, doing)

    assert failure.hint
    assert "{" not in failure.hint.replace("https://ca.test/{act}", "")
    assert failure.endpoint is doing
    assert failure.scope is not Scope.ACCOUNT or failure.error_class in (P, X)
    assert failure.scope is not Scope.CA or failure.error_class in (T, R)
    assert failure.retry_after is None or failure.error_class in (T, R)


@given(st.lists(leaf_problems, min_size=1, max_size=4), st.sampled_from(Endpoint), st.sampled_from([400, 403, 500]))
def test_a_compound_is_its_gravest_part(parts: list[Problem], doing: Endpoint, status: int) -> None:
    """RFC 8555 §6.7.1; what a part does not say, the answer around it does."""
    whole = problem("compound", status, subproblems=tuple(parts))
    alone = [classify_problem(replace(p, status=p.status or status, retry_after=None), doing) for p in parts]

    assert classify_problem(whole, doing).error_class == max(
        (failure.error_class for failure in alone), key=list(ErrorClass).index
    )


def test_a_compound_of_limits_waits_as_long_as_it_says() -> None:
    """Retry-After is a header: it stands beside the whole document."""
    parts = (problem("rateLimited"), problem("rateLimited"))
    whole = problem("compound", 429, subproblems=parts, retry_after=HOUR)

    assert classify_problem(whole, Endpoint.NEW_ORDER).retry_after == HOUR


# -- names at fault -----------------------------------------------------------------------------------


def authorization(dns_name: str, status: AuthorizationStatus, code: str | None = None) -> Authorization:
    error = None if code is None else problem(code, 403)
    return Authorization("u", status, dns_name, (Challenge("http-01", "u", ChallengeStatus.INVALID, "t", error),))


def order(error: Problem | None = None) -> Order:
    return Order("u", OrderStatus.INVALID, frozenset(), (), "u", error=error)


NAMES = ["a.test", "b.test", "c.test"]
INVALID, VALID, PENDING = AuthorizationStatus.INVALID, AuthorizationStatus.VALID, AuthorizationStatus.PENDING


def test_names_whose_validation_failed_are_at_fault() -> None:
    """Each with its own reason; a valid or pending one is not, nor one that the CA had trouble with itself."""
    refused = names_refused(
        NAMES,
        order(),
        [
            authorization("a.test", INVALID, "connection"),
            authorization("b.test", INVALID),
            authorization("c.test", INVALID, "serverInternal"),
        ],
    )

    assert {name: failure.type for name, failure in refused.items()} == {
        "a.test": f"{URN}connection",
        "b.test": "certworker:authorization-invalid",
    }
    assert "http://a.test/" in refused["a.test"].hint


@pytest.mark.parametrize(
    "authorizations",
    [
        [],
        [authorization("a.test", VALID), authorization("b.test", PENDING)],
        [authorization("a.test", AuthorizationStatus.EXPIRED), authorization("b.test", AuthorizationStatus.REVOKED)],
    ],
)
def test_an_order_that_died_of_itself_blames_nobody(authorizations: list[Authorization]) -> None:
    assert names_refused(NAMES, order(problem("serverInternal", 500)), authorizations) == {}


def test_names_that_new_order_rejects_are_at_fault() -> None:
    """By the identifiers of its subproblems, in any case; those of others and limits are not."""
    parts = (
        problem("rejectedIdentifier", identifier="A.test"),
        problem("caa", identifier="b.test"),
        problem("rateLimited", identifier="c.test"),
        problem("rejectedIdentifier", identifier="elsewhere.test"),
        problem("rejectedIdentifier"),
    )
    refused = names_refused(NAMES, problem("compound", 403, subproblems=parts))

    assert {name: failure.error_class for name, failure in refused.items()} == {"a.test": P, "b.test": V}
    assert {failure.scope for failure in refused.values()} == {Scope.ISSUANCE}
    assert "a.test" in refused["a.test"].hint.lower()


def test_names_refused_at_finalize_are_at_fault() -> None:
    """CAA is looked up again there; what a challenge says of the same name comes first."""
    parts = (problem("caa", identifier="a.test"), problem("caa", identifier="b.test"))
    refused = names_refused(
        NAMES, order(problem("caa", 403, subproblems=parts)), [authorization("b.test", INVALID, "dns")]
    )

    assert {name: failure.type for name, failure in refused.items()} == {"a.test": f"{URN}caa", "b.test": f"{URN}dns"}


def test_a_refusal_without_names_blames_nobody() -> None:
    """What stands in a detail is for people."""
    assert names_refused(NAMES, replace(problem("rejectedIdentifier"), detail="Cannot issue for a.test")) == {}


@given(
    problems,
    st.booleans(),
    st.lists(
        st.builds(
            authorization,
            st.sampled_from([*NAMES, "elsewhere.test"]),
            st.sampled_from(AuthorizationStatus),
            st.none() | st.sampled_from(CODES),
        ),
        max_size=4,
    ),
)
def test_only_ordered_names_are_left_out(said: Problem, of_order: bool, authorizations: list[Authorization]) -> None:
    """And only for what does not pass by itself."""
    refused = names_refused(NAMES, order(said) if of_order else said, authorizations if of_order else ())

    assert refused.keys() <= set(NAMES)
    assert all(failure.error_class in (V, P, X) for failure in refused.values())


@given(problems)
def test_an_invalid_order_stops_nobody_else(said: Problem) -> None:
    """The CA has answered."""
    assert classify_order(order(said), ()).scope is Scope.ISSUANCE
