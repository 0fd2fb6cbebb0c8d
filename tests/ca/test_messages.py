"""A CA's JSON, well-formed and otherwise, as values of the core."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certworker.ca.messages import (
    read_authorization,
    read_chain,
    read_challenge,
    read_directory,
    read_location,
    read_order,
    read_renewal_info,
)
from certworker.ca.transport import Response
from certworker.core.certificate import Validity
from certworker.core.order import AuthorizationStatus, ChallengeStatus, OrderStatus
from certworker.core.renewal import RenewalInfo, Window, choose_moment
from certworker.errors import AnswerFault

from .conftest import NOW
from .test_problems import anything

ORDER: dict[str, Any] = {
    "status": "pending",
    "expires": "2026-11-29T12:00:00Z",
    "identifiers": [{"type": "dns", "value": "A.test"}, {"type": "dns", "value": "*.b.test"}],
    "authorizations": ["https://ca.test/authz/1"],
    "finalize": "https://ca.test/finalize/1",
}
AUTHORIZATION: dict[str, Any] = {
    "status": "pending",
    "identifier": {"type": "dns", "value": "a.test"},
    "challenges": [
        {"type": "dns-persist-01", "url": "https://ca.test/c/1", "status": "pending", "issuer-domain-names": ["x"]},
        {"type": "http-01", "url": "https://ca.test/c/2", "status": "pending", "token": "a_B-9"},
    ],
}
DIRECTORY: dict[str, Any] = {
    "newNonce": "https://ca.test/nonce",
    "newAccount": "https://ca.test/account",
    "newOrder": "https://ca.test/order",
    "revokeCert": "https://ca.test/revoke",
    "keyChange": "https://ca.test/key",
}


def answer(document: object, **headers: str) -> Response:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return Response("https://ca.test/x", 200, {k.replace("_", "-"): v for k, v in headers.items()}, body)


def test_an_order_is_read() -> None:
    """Names in lower case, times in UTC, the wait from the header; what we do not know is dropped."""
    document = {**ORDER, "profile": "short", "notBefore": 5, "x": [], "replaces": {}}
    order = read_order(answer(document, location="/order/1", retry_after="3"), NOW)

    assert (order.url, order.status) == ("https://ca.test/order/1", OrderStatus.PENDING)
    assert order.dns_names == {"a.test", "*.b.test"}
    assert order.expires_at == datetime(2026, 11, 29, 12, tzinfo=UTC)
    assert (order.profile, order.retry_after) == ("short", timedelta(seconds=3))


def test_an_invalid_order_keeps_its_error() -> None:
    document = {**ORDER, "status": "invalid", "error": {"type": "urn:ietf:params:acme:error:caa", "detail": "no"}}
    order = read_order(answer(document), NOW, "https://ca.test/order/1")

    assert order.error is not None
    assert order.error.code == "caa"


@pytest.mark.parametrize("status", ["brand-new", "unknown", "VALID"])
def test_a_status_that_we_do_not_know_is_unknown(status: str) -> None:
    """RFC 8555 §7.1.6 may grow."""
    challenge = {**AUTHORIZATION["challenges"][1], "status": status}
    authorization = read_authorization(answer({**AUTHORIZATION, "status": status, "challenges": [challenge]}), NOW, "u")

    assert read_order(answer({**ORDER, "status": status}), NOW, "u").status is OrderStatus.UNKNOWN
    assert authorization.status is AuthorizationStatus.UNKNOWN
    assert authorization.challenges[0].status is ChallengeStatus.UNKNOWN


def test_a_challenge_that_we_do_not_know_is_kept() -> None:
    """Pebble lists one without a token, at a random place."""
    authorization = read_authorization(answer(AUTHORIZATION), NOW, "https://ca.test/authz/1")
    challenge = authorization.http01()

    assert [(c.type, c.token) for c in authorization.challenges] == [("dns-persist-01", ""), ("http-01", "a_B-9")]
    assert challenge is not None
    assert challenge.url == "https://ca.test/c/2"


@pytest.mark.parametrize("token", [None, 5, "", "a/../b", "a b", "a\n", "tökén", "x" * 600, "a=="])
def test_a_token_is_base64url_or_refused(token: object) -> None:
    """It becomes a part of a path that every proxy serves; the message does not repeat it."""
    document = {**AUTHORIZATION["challenges"][1], "token": token}

    with pytest.raises(AnswerFault, match=r"token must be base64url$"):
        read_challenge(answer(document))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"status": None}, "status is missing"),
        ({"status": 5}, "status must be a text"),
        ({"identifiers": None}, "identifiers is missing"),
        ({"identifiers": ["a.test"]}, r"identifiers\[0\] must be an object"),
        ({"identifiers": [{"type": "dns"}]}, r"identifiers\[0\]\.value is missing"),
        ({"authorizations": "https://ca.test/a"}, "authorizations must be a list"),
        ({"authorizations": ["https://ca.test/a", 5]}, r"authorizations\[1\] must be a text"),
        ({"authorizations": ["http://ca.test/a"]}, r"authorizations\[0\] must be an absolute https URL"),
        ({"authorizations": ["https://ca.test/a"] * 1001}, "at most 1000"),
        ({"finalize": "/finalize"}, "finalize must be an absolute https URL"),
        ({"finalize": "file:///etc/passwd"}, "finalize must be"),
        ({"finalize": "https://u:p@ca.test/"}, "finalize must be"),
        ({"finalize": "https:///x"}, "finalize must be"),
        ({"finalize": "https://ca.test:99999/"}, "finalize must be"),
        ({"finalize": "https://ca.test/\n"}, "finalize must be"),
        ({"finalize": "https://[::1/"}, "finalize must be"),
        ({"status": "valid"}, "certificate is missing"),
        ({"certificate": "ftp://ca.test/"}, "certificate must be"),
        ({"expires": "tomorrow"}, "expires must be a time"),
        ({"expires": "2026-11-29T12:00:00"}, "expires must be a time"),
        ({"expires": "9999-12-31T23:59:59-23:00"}, "expires must be a time"),
        ({"expires": 5}, "expires must be a text"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, Any], said: str) -> None:
    """With the answer that it was in."""
    with pytest.raises(AnswerFault, match=rf"https://ca\.test/x: .*{said}"):
        read_order(answer({**ORDER, **change}), NOW, "u")


def test_an_ip_address_is_no_name_of_ours() -> None:
    """An authorization for something else than a DNS name cannot be one that we asked for."""
    with pytest.raises(AnswerFault, match=r"identifier\.type must be dns"):
        read_authorization(answer({**AUTHORIZATION, "identifier": {"type": "ip", "value": "10.0.0.1"}}), NOW, "u")


def test_a_directory_is_read() -> None:
    """What a CA does not offer is None or empty; renewalInfo loses a slash that would be doubled."""
    meta = {"profiles": {"short": "6 days"}, "termsOfService": "data:text/plain,x", "website": "javascript:x"}
    full = read_directory(answer({**DIRECTORY, "renewalInfo": "https://ca.test/ari/", "meta": meta, "x": 1}))
    bare = read_directory(answer(DIRECTORY))

    assert (full.renewal_info, full.profiles) == ("https://ca.test/ari", {"short": "6 days"})
    assert (full.terms_of_service, full.website) == ("data:text/plain,x", None)
    assert (bare.renewal_info, bare.profiles, bare.external_account_required) == (None, {}, False)


RENEWAL_INFO: dict[str, Any] = {
    "suggestedWindow": {"start": "2027-01-02T04:00:00Z", "end": "2027-01-03T06:00:00+02:00"},
    "explanationURL": "https://ca.test/docs/ari",
}


def test_renewal_information_is_read() -> None:
    """The window in UTC and whole seconds; link and wait are optional (RFC 9773 §4.2)."""
    window = Window(datetime(2027, 1, 2, 4, tzinfo=UTC), datetime(2027, 1, 3, 4, tzinfo=UTC))
    full = read_renewal_info(answer(RENEWAL_INFO, retry_after="21600"), NOW)
    odd = {"start": "2027-01-02T04:00:00.123456789Z", "end": "2027-01-03T04:00:00.9Z"}

    assert full == RenewalInfo(window, "https://ca.test/docs/ari", timedelta(hours=6))
    assert read_renewal_info(answer({"suggestedWindow": odd, "x": []}), NOW) == RenewalInfo(window)


@pytest.mark.parametrize(
    "url",
    [
        "javascript:alert(1)",
        "http://ca.test/",
        "https://ca.test/\u0007",
        "https://ca.test/\n",
        "https://ca.test/\u202e",
        "https://user:secret@ca.test/",
        "https://",
        "https://ca.test/" + "x" * 2048,
        5,
        None,
        ["https://ca.test/"],
    ],
)
def test_a_link_that_is_not_to_be_shown_is_dropped(url: object) -> None:
    """It goes to logs and terminals, and perhaps to somebody's browser; the window counts all the same."""
    said = read_renewal_info(answer({**RENEWAL_INFO, "explanationURL": url}), NOW)

    assert (said.explanation_url, said.window.start.year) == (None, 2027)


@pytest.mark.parametrize("wait", ["-5", "soon", "", "1.5", "9" * 400 + "x", "Sun, 31 Nov 2026 00:00:00 GMT"])
def test_a_wait_that_is_none_is_dropped(wait: str) -> None:
    """As if the CA had not said when to ask again."""
    assert read_renewal_info(answer(RENEWAL_INFO, retry_after=wait), NOW).retry_after is None


@pytest.mark.parametrize(
    ("window", "said"),
    [
        (None, "suggestedWindow must be an object"),
        ([], "suggestedWindow must be an object"),
        ({}, r"suggestedWindow\.start is missing"),
        ({"start": "2027-01-02T04:00:00Z"}, r"suggestedWindow\.end is missing"),
        ({"start": "2027-01-02T04:00:00Z", "end": "2027-01-02T04:00:00Z"}, "must be later than start"),
        ({"start": "2027-01-02T04:00:00Z", "end": "2027-01-02T04:00:00.9Z"}, "must be later than start"),
        ({"start": "2027-01-02T04:00:01Z", "end": "2027-01-02T04:00:00Z"}, "must be later than start"),
        ({"start": "0001-01-01T00:00:00Z", "end": "0001-01-01T00:00:00Z"}, "must be later than start"),
        ({"start": "2027-01-02T04:00:00", "end": "2027-01-03T04:00:00Z"}, "start must be a time"),
        ({"start": 1798862400, "end": 1798948800}, "start must be a text"),
        ({"start": "2027-01-02T04:00:00Z", "end": "99999-01-01T00:00:00Z"}, "end must be a time"),
        ({"start": "0001-01-01T00:00:00+14:00", "end": "2027-01-03T04:00:00Z"}, "start must be a time"),
        ({"start": "2027-01-02T04:00:00Z", "end": "9999-12-31T23:59:59-12:00"}, "end must be a time"),
    ],
)
def test_a_window_that_is_none_is_refused(window: object, said: str) -> None:
    """RFC 9773 §4.2: as if there had been no answer."""
    with pytest.raises(AnswerFault, match=said):
        read_renewal_info(answer({"suggestedWindow": window}), NOW)


@pytest.mark.parametrize("location", ["", "http://ca.test/a", "//u@ca.test/", "https://", "javascript:x", "\x00"])
def test_a_thing_must_be_somewhere(location: str) -> None:
    """Without a Location that can be asked, what was made is lost."""
    with pytest.raises(AnswerFault, match="Location"):
        read_location(answer({}, location=location))


def test_an_http_directory_leads_to_http() -> None:
    """For a CA on this machine: each answer may only lead to its own scheme."""
    document = {name: url.replace("https:", "http:") for name, url in DIRECTORY.items()}

    assert read_directory(Response("http://127.0.0.1/dir", 200, {}, json.dumps(document).encode()))
    with pytest.raises(AnswerFault):
        read_directory(answer(document))


@given(st.dictionaries(st.sampled_from([*ORDER, "error", "certificate", "profile"]), anything))
def test_any_order_is_read_or_refused(change: dict[str, Any]) -> None:
    """Never anything else."""
    try:
        order = read_order(answer({**ORDER, **change}), NOW, "u")
    except AnswerFault:
        return
    assert order.expires_at is None or order.expires_at.tzinfo is UTC


@given(st.dictionaries(st.sampled_from([*AUTHORIZATION, "expires", "wildcard"]), anything), st.lists(anything))
def test_any_authorization_is_read_or_refused(change: dict[str, Any], challenges: list[object]) -> None:
    """Never anything else."""
    try:
        read_authorization(answer({**AUTHORIZATION, "challenges": challenges, **change}), NOW, "u")
    except AnswerFault:
        return


@given(st.dictionaries(st.sampled_from([*DIRECTORY, "meta", "renewalInfo"]), anything), anything)
def test_any_directory_is_read_or_refused(change: dict[str, Any], meta: object) -> None:
    """Never anything else."""
    try:
        read_directory(answer({**DIRECTORY, "meta": meta, **change}))
    except AnswerFault:
        return


any_time = st.datetimes(timezones=st.just(UTC)).map(datetime.isoformat) | anything


@given(any_time, any_time, anything, st.text(), st.floats(0, 1, exclude_max=True))
def test_any_renewal_information_is_read_or_refused(
    start: object, end: object, url: object, wait: str, draw: float
) -> None:
    """Never anything else; and of whatever was read a moment can be drawn."""
    document = {"suggestedWindow": {"start": start, "end": end}, "explanationURL": url}
    try:
        said = read_renewal_info(answer(document, retry_after=wait), NOW)
    except AnswerFault:
        return
    assert choose_moment(said.window, Validity(NOW, NOW + timedelta(days=90)), draw) >= NOW


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    """Never anything else."""
    for read in (read_directory, read_challenge, read_chain, lambda response: read_renewal_info(response, NOW)):
        try:
            read(answer(body))
        except AnswerFault:
            continue
