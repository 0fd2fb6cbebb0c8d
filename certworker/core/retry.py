"""How a failed attempt is followed: its class, what a person can do, and when the next one may start.

The classes are T, V, R, P and X of the error table in docs/decisions/errors.md: who has to act, and
how patient we are, follows from the class alone. What a CA writes in `detail` is shown and never
decided upon, but for one thing: the link of a paused account.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from certworker.core.order import Authorization, AuthorizationStatus, ChallengeStatus, Order
from certworker.errors import Problem


class ErrorClass(StrEnum):
    """Who acts next; from the mildest to the gravest."""

    TRANSIENT = "transient"
    """Nobody: network, 5xx, nonces. We try again soon."""
    VALIDATION = "validation"
    """The owner of the name: the CA looked and did not find the answer. We try again, ever more rarely."""
    RATE_LIMITED = "rate_limited"
    """The CA said when."""
    PERMANENT = "permanent"
    """The operator: what we ask for cannot be had."""
    ACTION_REQUIRED = "action_required"
    """The operator: terms, account or credentials."""


class Endpoint(StrEnum):
    """What was asked of the CA when an error came; the same error means other things elsewhere."""

    DIRECTORY = "directory"
    NEW_NONCE = "new_nonce"
    NEW_ACCOUNT = "new_account"
    ACCOUNT = "account"
    KEY_CHANGE = "key_change"
    NEW_ORDER = "new_order"
    ORDER = "order"
    AUTHORIZATION = "authorization"
    CHALLENGE = "challenge"
    VALIDATION = "validation"
    """No request of ours: the error inside a challenge or an authorization, after the CA has looked."""
    FINALIZE = "finalize"
    CERTIFICATE = "certificate"
    REVOKE = "revoke"
    RENEWAL_INFO = "renewal_info"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt failed, as shown to an operator and kept in the database."""

    error_class: ErrorClass
    type: str
    """The CA's error URN, or `certworker:` and a word of ours (`certworker:ca-tls`, `certworker:chain`)."""
    detail: str
    """What was said, one line, at most 2 KiB."""
    hint: str
    """What a person can check or do, one line."""
    retry_after: timedelta | None = None
    """The CA's wish, if it had one and waiting helps."""


_SCHEDULES: dict[ErrorClass, tuple[timedelta, ...]] = {
    ErrorClass.TRANSIENT: (
        timedelta(seconds=5),
        timedelta(seconds=15),
        timedelta(seconds=45),
        timedelta(minutes=2),
        timedelta(minutes=5),
        timedelta(minutes=10),
        timedelta(minutes=30),
        timedelta(hours=1),
    ),
    # Let's Encrypt's own advice; at one a day it never pauses a name.
    ErrorClass.VALIDATION: (
        timedelta(minutes=1),
        timedelta(minutes=10),
        timedelta(minutes=100),
        timedelta(hours=24),
    ),
    ErrorClass.RATE_LIMITED: (timedelta(hours=1), timedelta(hours=3), timedelta(hours=12), timedelta(hours=24)),
    ErrorClass.PERMANENT: (timedelta(hours=24),),
    ErrorClass.ACTION_REQUIRED: (timedelta(hours=24),),
}

LONGEST_RETRY_AFTER = timedelta(hours=24)


def retry_at(failure: Failure, failures: int, now: datetime, draw: float) -> datetime:
    """Return when the next attempt may start, after `failures` (>= 1) failures in a row.

    `draw` is a uniform number in [0, 1): it spreads attempts by ± 20 %, and after the CA's own
    Retry-After by 0 to 10 %, never before it.
    """
    if failure.retry_after is not None:
        asked = min(max(failure.retry_after, timedelta(seconds=1)), LONGEST_RETRY_AFTER)
        return now + asked * (1 + 0.1 * draw)
    schedule = _SCHEDULES[failure.error_class]
    return now + schedule[min(failures, len(schedule)) - 1] * (0.8 + 0.4 * draw)


# -- classes ------------------------------------------------------------------------------------------

_T, _V, _R, _P, _X = ErrorClass
_GRAVITY = {error_class: gravity for gravity, error_class in enumerate(ErrorClass)}

_EVERYWHERE: dict[str, tuple[ErrorClass, str]] = {
    "accountDoesNotExist": (
        _X,
        "the CA no longer knows this account; to register it anew, clear account_url in acme_accounts",
    ),
    "alreadyReplaced": (_T, "the certificate was replaced already; the order is made once more without saying so"),
    "alreadyRevoked": (_P, "the certificate was revoked already; nothing is left to do"),
    "badCSR": (_P, "the CA refuses the certificate request; check KEY_TYPE and the names"),
    "badNonce": (_T, "the CA refuses every nonce; if this lasts, look for a proxy that drops Replay-Nonce or caches"),
    "badPublicKey": (_P, "the CA does not accept this key; check KEY_TYPE"),
    "badRevocationReason": (_P, "the CA does not allow this reason; choose another one"),
    "badSignatureAlgorithm": (_P, "the CA does not accept this kind of account key; make an account with another key"),
    "caa": (_V, "a CAA record of {name} forbids this CA or this account; check the CAA records and accounturi"),
    "conflict": (_T, "the certificate is being replaced already; the order is made once more without saying so"),
    "connection": (_V, "the CA could not reach http://{name}/; check its address, port 80 and the firewall"),
    "dns": (_V, "the CA could not resolve {name}; check its A and AAAA records and their name servers"),
    "dnssec": (_V, "the CA could not validate DNSSEC for {name}; check the signatures of its zone"),
    "externalAccountRequired": (_X, "the CA wants external credentials; set ACME_EAB_KID and ACME_EAB_HMAC_KEY"),
    "incorrectResponse": (_V, "something else answered the challenge for {name}; check that port 80 leads here"),
    "invalidContact": (_X, "the CA refuses the contact address; check ACME_CONTACT"),
    "invalidProfile": (_P, "the CA does not offer this profile; check ACME_PROFILE"),
    "orderNotReady": (_T, "the order is not where it was expected; it is read again"),
    "rateLimited": (_R, "the CA asks to wait"),
    "rejectedIdentifier": (_P, "the CA will not issue for {name}; take the name out or use another CA"),
    "serverInternal": (_T, "the CA has trouble of its own; nothing to do unless it lasts"),
    "tls": (_V, "TLS failed while the CA looked at {name}; check where port 80 redirects to"),
    "unsupportedContact": (_X, "the CA cannot use this kind of contact; set ACME_CONTACT to an e-mail address"),
    "unsupportedIdentifier": (_P, "the CA does not issue for this kind of name ({name})"),
    "userActionRequired": (_X, "the CA wants something done by a person, mostly new terms agreed to"),
}
"""What an error code means whatever was asked (RFC 8555 §6.7, RFC 9773 §7.4, draft-ietf-acme-profiles)."""

_HERE: dict[tuple[Endpoint, str], tuple[ErrorClass, str]] = {
    (Endpoint.VALIDATION, "unauthorized"): (
        _V,
        "the CA found something else at the challenge URL of {name}; check that port 80 leads here",
    ),
    (Endpoint.NEW_ACCOUNT, "unauthorized"): (
        _X,
        "the CA refuses this account key or its external credentials; check them, and that it is not deactivated",
    ),
    (Endpoint.ACCOUNT, "unauthorized"): (_X, "the account is deactivated or not allowed; check it with the CA"),
    (Endpoint.NEW_ORDER, "unauthorized"): (_X, "the account is deactivated or not allowed; check it with the CA"),
    (Endpoint.VALIDATION, "malformed"): (_V, "the CA could not use what it found for {name}"),
    # A challenge that is not pending any more is refused like this: the authorization is read again.
    (Endpoint.CHALLENGE, "malformed"): (_T, "the challenge was answered already; the authorization is read again"),
}
"""Codes whose meaning hangs on what was asked."""

_PASSING = {408, 409, 425, 429}
"""Statuses below 500 that say "later", not "never"."""
_ASKING = {
    Endpoint.NEW_ACCOUNT,
    Endpoint.NEW_ORDER,
    Endpoint.FINALIZE,
    Endpoint.REVOKE,
    Endpoint.KEY_CHANGE,
}
"""Requests that the CA refuses for what they say; the others only look, so a refusal of them passes."""
_PARTS_OF_ORDER = {
    Endpoint.ORDER,
    Endpoint.AUTHORIZATION,
    Endpoint.CHALLENGE,
    Endpoint.FINALIZE,
    Endpoint.CERTIFICATE,
}
_LINK = re.compile(r"https://[^\s\"'<>]+")
_DETAIL_LIMIT = 2048


def classify_problem(problem: Problem, doing: Endpoint, dns_name: str | None = None) -> Failure:
    """Say what follows from `problem`, which came while `doing` (for `dns_name`, where only one is meant)."""
    if problem.code == "compound" and problem.subproblems:
        return _gravest([classify_problem(part, doing, dns_name) for part in problem.subproblems])
    error_class, hint = _judge(problem, doing)
    name = dns_name or problem.identifier or next((p.identifier for p in problem.subproblems if p.identifier), None)
    return Failure(
        error_class,
        "certworker:order-lost" if _is_lost(problem, doing) else problem.type,
        _tell(problem),
        hint.format(name=name or "the name"),
        problem.retry_after if error_class in (_T, _R) else None,
    )


def classify_order(order: Order, authorizations: Sequence[Authorization]) -> Failure:
    """Say why `order` is invalid: what a failing challenge says outweighs the order's own error."""
    failures = [failure for a in authorizations if (failure := _classify_authorization(a)) is not None]
    if failures:
        return _gravest(failures)
    if order.error is not None:
        return classify_problem(order.error, Endpoint.FINALIZE)
    return Failure(_T, "certworker:order-invalid", "the CA gave no reason", "a new order is made")


def _classify_authorization(authorization: Authorization) -> Failure | None:
    """Return why this authorization cannot be used, or None if nothing is wrong with it (RFC 8555 §7.1.6)."""
    match authorization.status:
        case AuthorizationStatus.INVALID:
            failed = [c for c in authorization.challenges if c.status is ChallengeStatus.INVALID]
            error = next((c.error for c in failed if c.error), None)
            if error:
                return classify_problem(error, Endpoint.VALIDATION, authorization.dns_name)
            detail = f"{authorization.dns_name}: the CA gave no reason"
            return Failure(_V, "certworker:authorization-invalid", detail, "check that port 80 of the name leads here")
        case AuthorizationStatus.DEACTIVATED | AuthorizationStatus.EXPIRED | AuthorizationStatus.REVOKED as status:
            detail = f"{authorization.dns_name}: the authorization is {status}"
            return Failure(_T, f"certworker:authorization-{status}", detail, "a new order is made")
        case _:
            return None


def _judge(problem: Problem, doing: Endpoint) -> tuple[ErrorClass, str]:
    status = problem.status or 0
    if problem.code == "rateLimited" or status == 429:
        return _judge_limit(problem)
    if _is_lost(problem, doing):
        return _T, "the CA no longer knows this order; a new one is made"
    if problem.code == "userActionRequired":
        where = problem.instance or problem.terms_of_service or _link(problem.detail)
        return _X, f"the CA wants something done by a person: {_plain(where) if where else 'see what it said'}"
    if known := _HERE.get((doing, problem.code)) or _EVERYWHERE.get(problem.code):
        return known
    return _judge_status(status, doing)


def _judge_limit(problem: Problem) -> tuple[ErrorClass, str]:
    """A limit ends by itself; a pause does not: it has a link for a person and no Retry-After."""
    link = problem.instance or _link(problem.detail)
    if link and problem.retry_after is None:
        return _X, f"the CA has paused this account or name until a person visits {_plain(link)}"
    return _R, "the CA asks to wait" + (f"; see {_plain(link)}" if link else "")


def _judge_status(status: int, doing: Endpoint) -> tuple[ErrorClass, str]:
    if doing is Endpoint.VALIDATION:
        return _V, "the CA could not validate {name}; see what it said"
    if 400 <= status < 500 and status not in _PASSING and doing in _ASKING:
        return _P, "the CA refuses what was asked; see what it said"
    if 400 <= status < 500 and doing in (Endpoint.DIRECTORY, Endpoint.NEW_NONCE):
        return _T, "check ACME_DIRECTORY_URL"
    return _T, "unexpected answer from the CA; nothing to do unless it lasts"


def _is_lost(problem: Problem, doing: Endpoint) -> bool:
    """The CA knows nothing at this URL: it was reset, or has cleaned up."""
    return problem.status == 404 and problem.code in ("", "malformed") and doing in _PARTS_OF_ORDER


def _tell(problem: Problem) -> str:
    parts = [problem.detail, *(f"{p.identifier or p.code}: {p.detail}" for p in problem.subproblems)]
    return "; ".join(parts).encode()[:_DETAIL_LIMIT].decode(errors="ignore")


def _gravest(failures: Sequence[Failure]) -> Failure:
    return max(failures, key=lambda failure: _GRAVITY[failure.error_class])


def _link(text: str) -> str | None:
    found = _LINK.search(text)
    return found.group().rstrip(".,;)") if found else None


def _plain(text: str) -> str:
    """A hint is a format string; what comes from a CA must not be one."""
    return text.replace("{", "{{").replace("}", "}}")
