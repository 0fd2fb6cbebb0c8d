"""Problem documents as a CA, a proxy or an attacker may write them, and what follows from them."""

import json
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certworker.ca.client import Account, Client
from certworker.ca.keys import AccountKey
from certworker.ca.problems import Endpoint, classify, clean_text, read_problem, read_problem_object
from certworker.ca.transport import Response
from certworker.core.order import (
    Authorization,
    AuthorizationStatus,
    Challenge,
    ChallengeStatus,
    Order,
    OrderStatus,
)
from certworker.core.retry import ErrorClass, Scope, classify_order, classify_problem
from certworker.errors import (
    AccountDeactivated,
    AccountForgotten,
    AnswerFault,
    CaError,
    ChainRefused,
    Problem,
    ProblemReported,
    ProfileNotOffered,
    TermsNotAgreed,
    TransportFault,
)

from .conftest import NOW
from .fake import FakeCa

URN = "urn:ietf:params:acme:error:"
T, V, R, P, X = ErrorClass
KINDS = ("dns", "connect", "tls", "timeout", "reset", "proxy")

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)
documents = st.fixed_dictionaries(
    {},
    optional={
        "type": anything | st.sampled_from([URN + c for c in ("compound", "rateLimited", "malformed", "unknown")]),
        "detail": anything,
        "title": anything,
        "status": anything,
        "instance": anything,
        "identifier": anything,
        "subproblems": anything
        | st.lists(st.dictionaries(st.sampled_from(["type", "detail", "identifier"]), anything)),
    },
)


def answer(document: object, status: int = 400, **headers: str) -> Response:
    """Return an error answer with this document."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return Response("https://ca.test/x", status, {k.replace("_", "-"): v for k, v in headers.items()}, body)


def problem(code: str, status: int = 400, detail: str = "it says", **more: Any) -> Problem:
    return Problem(type=URN + code if code else "about:blank", detail=detail, status=status, **more)


# -- reading --------------------------------------------------------------------------------------------


def test_a_problem_keeps_what_it_says() -> None:
    """Type, detail, status, wait, and both URLs for a person (RFC 8555 §7.3.3)."""
    document = {"type": URN + "userActionRequired", "detail": "new terms", "instance": "https://ca.test/agree"}
    link = '<https://ca.test/terms>;rel="terms-of-service"'

    assert read_problem(answer(document, 403, retry_after="60", link=link), NOW) == Problem(
        type=URN + "userActionRequired",
        detail="new terms",
        status=403,
        retry_after=timedelta(seconds=60),
        instance="https://ca.test/agree",
        terms_of_service="https://ca.test/terms",
    )


@pytest.mark.parametrize(
    "url", ["javascript:alert(1)", "http://ca.test/", "https://", "https://a b/", "/relative", 5, None]
)
def test_only_https_is_shown_to_people(url: object) -> None:
    """A link ends up on a web page."""
    assert read_problem(answer({"instance": url}, link=f'<{url}>;rel="terms-of-service"'), NOW).instance is None
    assert read_problem(answer({}, link=f'<{url}>;rel="terms-of-service"'), NOW).terms_of_service is None


def test_a_malformed_subproblem_hides_no_other() -> None:
    """Nor does an identifier of a type that we do not know."""
    good = {"type": URN + "caa", "detail": "no", "identifier": {"type": "dns", "value": "a.test"}}
    strange = {"type": URN + "dns", "detail": "no", "identifier": {"type": "phone", "value": "+1"}}
    subproblems = [5, None, "x", {"type": 5}, {**good, "identifier": "a.test"}, strange, good]
    read = read_problem(answer({"type": URN + "compound", "detail": "all", "subproblems": subproblems}), NOW)

    assert [(p.code, p.identifier) for p in read.subproblems] == [
        ("", None),
        ("caa", None),
        ("dns", "+1"),
        ("caa", "a.test"),
    ]


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"<html>", b"\xff", b"[" * 90_000, b'{"type": 5, "detail": []}'])
def test_what_is_no_problem_document_becomes_one(body: bytes) -> None:
    """The status says what can be said."""
    read = read_problem(answer(body, 502, content_type="text/html; charset=x"), NOW)

    assert (read.type, read.status) == ("about:blank", 502)
    assert read.detail == "502 Bad Gateway without a problem document (text/html)"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a\r\nb\x1b[31mc\x00", "a b [31mc"),
        ("x\u202egnp.exe", "x gnp.exe"),
        ("\ud800 lone", "lone"),
        ("  a \u2028 b ", "a b"),
        ("ünïcode", "ünïcode"),
        ("x" * 5000, "x" * 2048),
        ("ü" * 5000, "ü" * 1024),
    ],
)
def test_text_is_one_printable_line(text: str, cleaned: str) -> None:
    """It goes to terminals, logs and web pages, and into a bounded column."""
    assert clean_text(text) == cleaned


@given(documents | anything, st.integers(100, 999), st.text(max_size=30))
def test_any_document_is_read(document: object, status: int, kind: str) -> None:
    """Whatever its shape, within bounds, and its classification never fails."""
    read = read_problem(answer(document, status, content_type=kind), NOW)

    assert read.type
    assert read.detail
    assert len(read.detail.encode()) <= 2048
    assert read.detail.isprintable()
    for doing in Endpoint:
        failure = classify_problem(read, doing)
        assert failure.hint
        assert len(failure.detail.encode()) <= 2048


@given(st.binary(max_size=200))
def test_any_bytes_are_read(body: bytes) -> None:
    assert read_problem(answer(body), NOW).detail


@given(anything)
def test_an_error_inside_an_answer_is_read(value: object) -> None:
    """None only where there is none."""
    assert (read_problem_object(value) is None) is not isinstance(value, dict)


# -- classes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status", "doing", "expected"),
    [
        ("accountDoesNotExist", 400, Endpoint.NEW_ORDER, X),
        ("alreadyReplaced", 409, Endpoint.NEW_ORDER, T),
        ("conflict", 409, Endpoint.NEW_ORDER, T),
        ("badCSR", 400, Endpoint.FINALIZE, P),
        ("badNonce", 400, Endpoint.NEW_ORDER, T),
        ("badPublicKey", 400, Endpoint.NEW_ACCOUNT, P),
        ("badRevocationReason", 400, Endpoint.REVOKE, P),
        ("badSignatureAlgorithm", 400, Endpoint.NEW_ACCOUNT, P),
        ("caa", 403, Endpoint.VALIDATION, V),
        ("caa", 403, Endpoint.FINALIZE, V),
        ("connection", 400, Endpoint.VALIDATION, V),
        ("dns", 400, Endpoint.VALIDATION, V),
        ("dnssec", 400, Endpoint.VALIDATION, V),
        ("externalAccountRequired", 403, Endpoint.NEW_ACCOUNT, X),
        ("incorrectResponse", 403, Endpoint.VALIDATION, V),
        ("invalidContact", 400, Endpoint.NEW_ACCOUNT, X),
        ("unsupportedContact", 400, Endpoint.NEW_ACCOUNT, X),
        ("invalidProfile", 400, Endpoint.NEW_ORDER, P),
        ("malformed", 400, Endpoint.NEW_ORDER, P),
        ("malformed", 405, Endpoint.NEW_ORDER, P),
        ("malformed", 400, Endpoint.CHALLENGE, T),
        ("malformed", 404, Endpoint.ORDER, T),
        ("malformed", 400, Endpoint.VALIDATION, V),
        ("malformed", 415, Endpoint.NEW_ORDER, P),
        ("orderNotReady", 403, Endpoint.FINALIZE, T),
        ("rateLimited", 429, Endpoint.NEW_ORDER, R),
        ("rejectedIdentifier", 400, Endpoint.NEW_ORDER, P),
        ("serverInternal", 500, Endpoint.NEW_ORDER, T),
        ("serverInternal", 500, Endpoint.VALIDATION, T),
        ("tls", 400, Endpoint.VALIDATION, V),
        ("unauthorized", 403, Endpoint.VALIDATION, V),
        ("unauthorized", 403, Endpoint.NEW_ACCOUNT, X),
        ("unauthorized", 403, Endpoint.NEW_ORDER, X),
        ("unauthorized", 403, Endpoint.ACCOUNT, X),
        ("unauthorized", 403, Endpoint.ORDER, X),
        ("unauthorized", 403, Endpoint.AUTHORIZATION, X),
        ("unauthorized", 403, Endpoint.CHALLENGE, X),
        ("unauthorized", 403, Endpoint.CERTIFICATE, X),
        ("unauthorized", 403, Endpoint.FINALIZE, P),
        ("unsupportedIdentifier", 400, Endpoint.NEW_ORDER, P),
        ("userActionRequired", 403, Endpoint.NEW_ORDER, X),
        ("fromTheFuture", 400, Endpoint.NEW_ORDER, P),
        ("fromTheFuture", 400, Endpoint.FINALIZE, P),
        ("fromTheFuture", 400, Endpoint.VALIDATION, V),
        ("fromTheFuture", 400, Endpoint.ORDER, T),
        ("", 404, Endpoint.ORDER, T),
        ("", 404, Endpoint.DIRECTORY, T),
        ("", 403, Endpoint.NEW_ORDER, P),
        ("", 408, Endpoint.NEW_ORDER, T),
        ("", 409, Endpoint.NEW_ORDER, T),
        ("", 425, Endpoint.NEW_ORDER, T),
        ("", 429, Endpoint.NEW_NONCE, R),
        ("badCSR", 429, Endpoint.FINALIZE, P),
        ("rateLimited", 503, Endpoint.NEW_ORDER, R),
        ("", 500, Endpoint.NEW_ORDER, T),
        ("", 502, Endpoint.DIRECTORY, T),
        ("", 503, Endpoint.FINALIZE, T),
    ],
)
def test_the_class_says_who_acts_next(code: str, status: int, doing: Endpoint, expected: ErrorClass) -> None:
    """The table of docs/decisions/errors.md."""
    assert classify_problem(problem(code, status), doing).error_class is expected


def test_a_limit_says_when() -> None:
    """And a link in it, without a wait, says that a person has to come: the account is paused."""
    link = "see https://ca.test/limits."
    wait = timedelta(hours=2)

    limited = classify_problem(problem("rateLimited", 429, link, retry_after=wait), Endpoint.NEW_ORDER)
    paused = classify_problem(problem("rateLimited", 429, link), Endpoint.NEW_ORDER)

    assert (limited.error_class, limited.retry_after) == (R, wait)
    assert (paused.error_class, paused.retry_after) == (X, None)
    assert paused.hint.endswith("visits https://ca.test/limits")


def test_terms_are_linked() -> None:
    """The URL that a person has to visit is in the hint."""
    changed = problem("userActionRequired", 403, instance="https://ca.test/agree{0}")

    assert "https://ca.test/agree{0}" in classify_problem(changed, Endpoint.NEW_ORDER).hint


@pytest.mark.parametrize("code", ["badCSR", "userActionRequired", "rejectedIdentifier"])
def test_only_what_waiting_can_cure_waits_for_the_ca(code: str) -> None:
    """A Retry-After of a second must not turn a permanent error into a busy one."""
    hasty = problem(code, 400, retry_after=timedelta(seconds=1))

    assert classify_problem(hasty, Endpoint.NEW_ORDER).retry_after is None


def test_a_compound_is_as_grave_as_its_gravest_part() -> None:
    """RFC 8555 §6.7.1."""
    parts = (problem("dns", identifier="a.test"), problem("rejectedIdentifier", identifier="b.test"), problem("caa"))
    failure = classify_problem(problem("compound", subproblems=parts), Endpoint.NEW_ORDER)

    assert (failure.error_class, failure.type) == (P, URN + "rejectedIdentifier")
    assert "b.test" in failure.hint


def test_a_refused_name_is_named() -> None:
    """In the hint and in the detail."""
    parts = (problem("rejectedIdentifier", detail="forbidden", identifier="b.test"),)
    failure = classify_problem(problem("rejectedIdentifier", subproblems=parts), Endpoint.NEW_ORDER)

    assert "b.test" in failure.hint
    assert failure.detail == "it says; b.test: forbidden"


def test_a_lost_order_is_told_apart() -> None:
    """A CA that was reset answers 404, with or without a document."""
    types = {classify_problem(problem(code, 404), Endpoint.ORDER).type for code in ("", "malformed")}

    assert types == {"certworker:order-lost"}


# -- orders ---------------------------------------------------------------------------------------------


def authorization(
    dns_name: str, status: AuthorizationStatus, error: Problem | None = None, challenge: str = "invalid"
) -> Authorization:
    challenges = (
        Challenge("dns-01", "u", ChallengeStatus.PENDING, "t"),
        Challenge("http-01", "u", ChallengeStatus(challenge), "t", error),
    )
    return Authorization("u", status, dns_name, challenges)


def order(error: Problem | None = None) -> Order:
    return Order("u", OrderStatus.INVALID, frozenset(), (), "u", error=error)


def test_the_failing_challenge_outweighs_the_order() -> None:
    """The order's own error is only a wrapper."""
    failed = authorization("a.test", AuthorizationStatus.INVALID, problem("connection", detail="timeout"))
    failure = classify_order(order(problem("malformed")), [authorization("b.test", AuthorizationStatus.VALID), failed])

    assert (failure.error_class, failure.type, failure.detail) == (V, URN + "connection", "timeout")
    assert "http://a.test/" in failure.hint


@pytest.mark.parametrize(
    ("failed", "error", "expected"),
    [
        (authorization("a.test", AuthorizationStatus.INVALID), None, (V, "certworker:authorization-invalid")),
        (authorization("a.test", AuthorizationStatus.EXPIRED), None, (T, "certworker:authorization-expired")),
        (authorization("a.test", AuthorizationStatus.REVOKED), None, (T, "certworker:authorization-revoked")),
        (authorization("a.test", AuthorizationStatus.DEACTIVATED), None, (T, "certworker:authorization-deactivated")),
        (authorization("a.test", AuthorizationStatus.VALID), problem("caa"), (V, URN + "caa")),
        (
            authorization("a.test", AuthorizationStatus.VALID),
            problem("serverInternal", 500),
            (T, URN + "serverInternal"),
        ),
        (authorization("a.test", AuthorizationStatus.UNKNOWN), None, (T, "certworker:order-invalid")),
    ],
)
def test_an_invalid_order_has_a_reason(
    failed: Authorization, error: Problem | None, expected: tuple[ErrorClass, str]
) -> None:
    """Even if the CA gives none."""
    failure = classify_order(order(error), [failed])

    assert (failure.error_class, failure.type) == expected


# -- our own errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "expected", "scope", "word"),
    [
        *((TransportFault(kind, "https://ca.test/", "said"), T, Scope.CA, f"ca-{kind}") for kind in KINDS),
        (AnswerFault("https://ca.test/", "no JSON"), T, Scope.CA, "ca-answer"),
        (ChainRefused("the chain has another key"), P, Scope.ISSUANCE, "chain"),
        (ProfileNotOffered("x", ["y"]), P, Scope.ISSUANCE, "profile"),
        (TermsNotAgreed("https://ca.test/terms"), X, Scope.ACCOUNT, "terms"),
        (AccountForgotten("the CA knows no account"), X, Scope.ACCOUNT, "account-forgotten"),
        (AccountDeactivated("it is deactivated"), X, Scope.ACCOUNT, "account-deactivated"),
        (CaError("something"), T, Scope.ISSUANCE, "ca"),
    ],
)
def test_an_error_of_ours_has_a_class(error: CaError, expected: ErrorClass, scope: Scope, word: str) -> None:
    """And says in its detail what its message says."""
    failure = classify(error, Endpoint.NEW_ORDER)

    assert (failure.error_class, failure.scope, failure.type) == (expected, scope, f"certworker:{word}")
    assert failure.detail == str(error)
    assert failure.hint


def test_a_reported_problem_is_classified_as_such() -> None:
    reported = ProblemReported("ordering", problem("caa"))

    assert classify(reported, Endpoint.FINALIZE) == classify_problem(reported.problem, Endpoint.FINALIZE)


@pytest.mark.parametrize(("path", "method"), [("/directory", "GET"), ("/new-nonce", "HEAD")])
@pytest.mark.parametrize(
    "fault",
    [{"status": 403, "body": b"<html>"}, {"status": 200, "body": b"{}"}, {"raises": TransportFault("dns", "", "")}],
)
def test_what_an_order_needs_first_is_told_apart(
    ca: FakeCa, client: Client, key: AccountKey, path: str, method: str, fault: dict[str, Any]
) -> None:
    """A directory or a nonce that cannot be had is no refusal of the order."""
    ca.fail_next(method, path, **{**fault, "headers": {"replay-nonce": "?"}})

    with pytest.raises(CaError) as caught:
        client.new_order(Account("https://ca.test/account/1", key), ["a.test"])
    failure = classify(caught.value, Endpoint.NEW_ORDER)

    assert failure.endpoint == (Endpoint.DIRECTORY if method == "GET" else Endpoint.NEW_NONCE)
    assert (failure.error_class, failure.scope) == (T, Scope.CA)


def test_the_order_itself_is_what_was_asked(ca: FakeCa, client: Client, account: Account) -> None:
    """Once directory and nonce are there."""
    ca.fail_next("POST", "/new-order", status=403, body=b"<html>")

    with pytest.raises(CaError) as caught:
        client.new_order(account, ["a.test"])

    assert classify(caught.value, Endpoint.NEW_ORDER).endpoint is Endpoint.NEW_ORDER
