"""What went wrong: a CA's problem document read, and every error of this room as a `Failure`.

The only place that reads problem documents. What a code means, and who has to act, is in `core.retry`.
Sources: RFC 7807, RFC 8555 §6.6 and §6.7.
"""

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from http import HTTPStatus
from typing import Any

from certworker.ca.headers import read_links, read_retry_after
from certworker.ca.transport import Response
from certworker.ca.urls import is_url
from certworker.core.retry import Endpoint as Endpoint
from certworker.core.retry import (
    ErrorClass,
    Failure,
    Scope,
    classify_nonsense,
    classify_problem,
    classify_silence,
)
from certworker.errors import (
    AccountDeactivated,
    AccountForgotten,
    AnswerFault,
    CaError,
    ChainRefused,
    OverBudget,
    Problem,
    ProblemReported,
    ProfileNotOffered,
    TermsNotAgreed,
    TransportFault,
)

_TEXT_LIMIT = 2048
"""Bytes of any text of the CA's that we keep."""
_NAME_LIMIT = 255
_MOST_SUBPROBLEMS = 100
_NO_TYPE = "about:blank"
"""RFC 7807 §4.2."""
_PINS = "its account_url will be new: change CAA records that name the old one as accounturi (RFC 8657 §3) first"


def read_problem(response: Response, now: datetime) -> Problem:
    """Read an error answer; one without a problem document becomes a problem without a type."""
    document = _document(response.body)
    terms = next((url for url in read_links(response.headers, "terms-of-service") if is_url(url, "https")), None)
    return Problem(
        type=_text(document, "type", _NAME_LIMIT) or _NO_TYPE,
        detail=_text(document, "detail") or _text(document, "title") or _status_line(response),
        status=response.status,
        retry_after=read_retry_after(response.headers, now),
        instance=_shown_url(document.get("instance")),
        terms_of_service=terms,
        subproblems=_subproblems(document),
    )


def read_problem_object(value: object) -> Problem | None:
    """Read a problem document inside another answer: a challenge's error, an order's error."""
    if not isinstance(value, dict):
        return None
    status = value.get("status")
    return Problem(
        type=_text(value, "type", _NAME_LIMIT) or _NO_TYPE,
        detail=_text(value, "detail") or _text(value, "title") or "no reason given",
        status=status if type(status) is int and 100 <= status <= 599 else None,
        instance=_shown_url(value.get("instance")),
        identifier=_identifier(value.get("identifier")),
        subproblems=_subproblems(value),
    )


_TRANSPORT_HINTS = {
    "dns": "check ACME_DIRECTORY_URL and this machine's DNS if it lasts",
    "connect": "check ACME_DIRECTORY_URL and the way to the CA if it lasts",
    # A fault of the network more often than of settings: captive portals, broken proxies.
    "tls": "the CA was not trusted, so nothing was sent; check ACME_CA_BUNDLE and this machine's clock if it lasts",
    "proxy": "check HTTPS_PROXY and NO_PROXY",
}
_UNLESS_IT_LASTS = "nothing to do unless it lasts"


def classify(error: CaError, doing: Endpoint) -> Failure:
    """Say what follows from `error`, raised while `doing`: who has to act, and what to tell them."""
    doing = Endpoint(error.asked or doing)
    match error:
        case ProblemReported():
            return classify_problem(error.problem, doing)
        case TransportFault():
            hint = _TRANSPORT_HINTS.get(error.kind, _UNLESS_IT_LASTS)
            return classify_silence(f"certworker:ca-{error.kind}", clean_text(str(error)), hint, doing)
        case AnswerFault():
            return classify_nonsense("certworker:ca-answer", clean_text(str(error)), _UNLESS_IT_LASTS, doing)
        case ChainRefused():
            return _failure(ErrorClass.PERMANENT, "chain", error, "nothing was stored; ask the CA about this order")
        case ProfileNotOffered():
            return _failure(ErrorClass.PERMANENT, "profile", error, "set ACME_PROFILE to one that is offered")
        case TermsNotAgreed():
            return _no_account("terms", error, f"read {error.terms_of_service} and set ACME_TOS_AGREED=true")
        case AccountForgotten():
            return _no_account("account-forgotten", error, f"`certworker account register` makes it again; {_PINS}")
        case AccountDeactivated():
            hint = f"`certworker account register --new-key` makes another one; {_PINS}"
            return _no_account("account-deactivated", error, hint)
        case OverBudget():
            over = _failure(ErrorClass.RATE_LIMITED, "budget", error, "nothing to do: it goes on by itself")
            return replace(over, retry_after=error.wait)
        case _:
            return _failure(ErrorClass.TRANSIENT, "ca", error, _UNLESS_IT_LASTS)


def clean_text(text: str, limit: int = _TEXT_LIMIT) -> str:
    """Return a stranger's text as one printable line of at most `limit` bytes.

    Control and format characters (also those that turn the direction of writing) become blanks: the
    text goes to terminals, logs and web pages.
    """
    # Cut first: nothing is gained by cleaning a megabyte.
    visible = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in text[:limit])
    return " ".join(visible.split()).encode()[:limit].decode(errors="ignore")


def _failure(error_class: ErrorClass, word: str, error: CaError, hint: str) -> Failure:
    return Failure(error_class, f"certworker:{word}", clean_text(str(error)), hint)


def _no_account(word: str, error: CaError, hint: str) -> Failure:
    return replace(_failure(ErrorClass.ACTION_REQUIRED, word, error, hint), scope=Scope.ACCOUNT)


def _document(body: bytes) -> Mapping[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, Mapping) else {}


def _subproblems(document: Mapping[str, Any]) -> tuple[Problem, ...]:
    """Read what can be read; one that cannot must not hide the others (RFC 8555 §6.7.1)."""
    values = document.get("subproblems")
    if not isinstance(values, list):
        return ()
    # Those of subproblems are dropped: there are none in RFC 8555, and this bounds the depth.
    flat = [{**v, "subproblems": None} for v in values[:_MOST_SUBPROBLEMS] if isinstance(v, Mapping)]
    return tuple(problem for value in flat if (problem := read_problem_object(value)) is not None)


def _identifier(value: object) -> str | None:
    return _text(value, "value", _NAME_LIMIT) or None if isinstance(value, Mapping) else None


def _text(document: Mapping[str, Any], name: str, limit: int = _TEXT_LIMIT) -> str:
    value = document.get(name)
    return clean_text(value, limit) if isinstance(value, str) else ""


def _shown_url(value: object) -> str | None:
    return value if isinstance(value, str) and is_url(value, "https") else None


def _status_line(response: Response) -> str:
    """Say what came instead of a problem document."""
    phrase = HTTPStatus(response.status).phrase if response.status in set(HTTPStatus) else ""
    kind = response.headers.get("content-type", "").partition(";")[0]
    return clean_text(f"{response.status} {phrase} without a problem document ({kind or 'no content type'})", 200)
