"""How a failed attempt is followed: its class, its scope, what a person can do, when the next one may start.

The classes are T, V, R, P and X of the error table in docs/decisions/errors.md: who has to act, and
how patient we are, follows from the class; who else has to wait follows from the scope. What a CA writes
in `detail` is shown and never decided upon, but for one thing: the link of a paused name.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import NamedTuple

from certworker.core.certificate import Validity
from certworker.core.order import Authorization, AuthorizationStatus, ChallengeStatus, Order
from certworker.core.renewal import is_urgent
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


class Scope(StrEnum):
    """Whose trouble it is: who else would only meet the same."""

    ISSUANCE = "issuance"
    """This attempt's, or its names'."""
    ACCOUNT = "account"
    """Everybody's who orders with this account: an operator has to act first."""
    CA = "ca"
    """Everybody's at this CA: it is down, or does not keep to RFC 8555."""


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
    scope: Scope = Scope.ISSUANCE
    endpoint: Endpoint | None = None
    """What was asked of the CA; None where nothing was."""


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
    # A wrong class must not cost a site, a right one costs one request a week.
    ErrorClass.PERMANENT: (timedelta(hours=24), timedelta(days=7)),
    ErrorClass.ACTION_REQUIRED: (timedelta(hours=24),),
}

LONGEST_RETRY_AFTER = timedelta(hours=24)
_LONGEST_URGENT = timedelta(hours=6)
"""At four failed validations a day Let's Encrypt pauses a name after a year; the certificate has hours."""
_LONGEST_REPLACING = timedelta(hours=24)
"""Longest wait after a permanent error while there is a certificate to lose."""
_REFUSED_NONCES = timedelta(seconds=5)
"""After a row of refused nonces: the next one is as good as the first; where all are refused the breaker opens."""
_NONCES_ARE_CHANCE = 12
"""So many rows of refusals are; a CA that refuses those for one kind of request only is asked ever more rarely."""
_MISTRUST = timedelta(minutes=12, seconds=30)
"""Shortest wait for a CA whose own TLS certificate is not trusted: ten minutes with the shortest draw."""


def retry_at(failure: Failure, failures: int, now: datetime, draw: float, serving: Validity | None = None) -> datetime:
    """Return when the next attempt may start, after `failures` (>= 1) failures in a row.

    `draw` is a uniform number in [0, 1): it spreads attempts by ± 20 %, and after the CA's own
    Retry-After by 0 to 10 %, never before it. `serving` is the certificate that the attempt was to
    replace, None if there is none.
    """
    if failure.retry_after is not None:
        return now + spread_wait(failure.retry_after, draw)
    schedule = _SCHEDULES[failure.error_class]
    step = schedule[min(failures, len(schedule)) - 1]
    if failure.error_class is ErrorClass.VALIDATION and is_urgent(now, serving):
        step = min(step, _LONGEST_URGENT)
    elif failure.error_class is ErrorClass.PERMANENT and serving is not None:
        step = min(step, _LONGEST_REPLACING)
    elif failure.type == BAD_NONCE:
        late = failures - _NONCES_ARE_CHANCE
        step = _REFUSED_NONCES if late <= 0 else schedule[min(late, len(schedule)) - 1]
    elif failure.type == MISTRUSTED:
        step = max(step, _MISTRUST)
    return now + step * (0.8 + 0.4 * draw)


def spread_wait(retry_after: timedelta, draw: float) -> timedelta:
    """Return how long to wait when the CA asked for `retry_after`: within reason, and never less."""
    return min(max(retry_after, timedelta(seconds=1)), LONGEST_RETRY_AFTER) * (1 + 0.1 * draw)


# -- classes ------------------------------------------------------------------------------------------

_T, _V, _R, _P, _X = ErrorClass
_GRAVITY = {error_class: gravity for gravity, error_class in enumerate(ErrorClass)}

BAD_NONCE = "urn:ietf:params:acme:error:badNonce"
"""The type of a failure whose every try was refused for its nonce (RFC 8555 §6.5)."""
MISTRUSTED = "certworker:ca-tls"
"""The type of a failure to trust the CA's own TLS certificate."""


class _Meaning(NamedTuple):
    error_class: ErrorClass
    hint: str
    scope: Scope = Scope.ISSUANCE


_EVERYWHERE: dict[str, _Meaning] = {
    "accountDoesNotExist": _Meaning(
        _X,
        "the CA no longer knows this account; run `certworker account register`",
        Scope.ACCOUNT,
    ),
    "alreadyReplaced": _Meaning(
        _T, "the certificate was replaced already; the order is made once more without saying so"
    ),
    "alreadyRevoked": _Meaning(_P, "the certificate was revoked already; nothing is left to do"),
    "badCSR": _Meaning(_P, "the CA refuses the certificate request; check KEY_TYPE and the names"),
    "badNonce": _Meaning(
        _T,
        "the CA refuses every nonce; if this lasts, look for a proxy that drops Replay-Nonce or caches",
        Scope.CA,
    ),
    "badPublicKey": _Meaning(_P, "the CA does not accept this key; check KEY_TYPE"),
    "badRevocationReason": _Meaning(_P, "the CA does not allow this reason; choose another one"),
    "badSignatureAlgorithm": _Meaning(
        _P, "the CA does not accept this kind of account key; make an account with another key", Scope.ACCOUNT
    ),
    "caa": _Meaning(_V, "a CAA record of {name} forbids this CA or this account; check the CAA records and accounturi"),
    "conflict": _Meaning(
        _T, "the certificate is being replaced already; the order is made once more without saying so"
    ),
    "connection": _Meaning(_V, "the CA could not reach http://{name}/; check its address, port 80 and the firewall"),
    "dns": _Meaning(_V, "the CA could not resolve {name}; check its A and AAAA records and their name servers"),
    "dnssec": _Meaning(_V, "the CA could not validate DNSSEC for {name}; check the signatures of its zone"),
    "externalAccountRequired": _Meaning(
        _X, "the CA wants external credentials; set ACME_EAB_KID and ACME_EAB_HMAC_KEY", Scope.ACCOUNT
    ),
    "incorrectResponse": _Meaning(
        _V, "something else answered the challenge for {name}; check that port 80 leads here"
    ),
    "invalidContact": _Meaning(_X, "the CA refuses the contact address; check ACME_CONTACT", Scope.ACCOUNT),
    "invalidProfile": _Meaning(_P, "the CA does not offer this profile; check ACME_PROFILE"),
    "orderNotReady": _Meaning(_T, "the order is not where it was expected; it is read again"),
    "rateLimited": _Meaning(_R, "the CA asks to wait"),
    "rejectedIdentifier": _Meaning(_P, "the CA will not issue for {name}; take the name out or use another CA"),
    "serverInternal": _Meaning(_T, "the CA has trouble of its own; nothing to do unless it lasts", Scope.CA),
    "tls": _Meaning(_V, "TLS failed while the CA looked at {name}; check where port 80 redirects to"),
    "unsupportedContact": _Meaning(
        _X, "the CA cannot use this kind of contact; set ACME_CONTACT to an e-mail address", Scope.ACCOUNT
    ),
    "unsupportedIdentifier": _Meaning(_P, "the CA does not issue for this kind of name ({name})"),
    "userActionRequired": _Meaning(
        _X, "the CA wants something done by a person, mostly new terms agreed to", Scope.ACCOUNT
    ),
}
"""What an error code means whatever was asked (RFC 8555 §6.7, RFC 9773 §7.4, draft-ietf-acme-profiles)."""

_REFUSED_ACCOUNT = _Meaning(_X, "the account is deactivated or not allowed; check it with the CA", Scope.ACCOUNT)
_NOT_OURS = _Meaning(_X, "the CA says that this order is not the account's, or that the account is deactivated")

_HERE: dict[tuple[Endpoint, str], _Meaning] = {
    (Endpoint.VALIDATION, "unauthorized"): _Meaning(
        _V, "the CA found something else at the challenge URL of {name}; check that port 80 leads here"
    ),
    (Endpoint.NEW_ACCOUNT, "unauthorized"): _Meaning(
        _X,
        "the CA refuses this account key or its external credentials; check them, and that it is not deactivated",
        Scope.ACCOUNT,
    ),
    (Endpoint.ACCOUNT, "unauthorized"): _REFUSED_ACCOUNT,
    (Endpoint.NEW_ORDER, "unauthorized"): _REFUSED_ACCOUNT,
    # One odd order must not stop the account: the next newOrder says whether it is the account.
    (Endpoint.ORDER, "unauthorized"): _NOT_OURS,
    (Endpoint.AUTHORIZATION, "unauthorized"): _NOT_OURS,
    (Endpoint.CHALLENGE, "unauthorized"): _NOT_OURS,
    (Endpoint.CERTIFICATE, "unauthorized"): _NOT_OURS,
    (Endpoint.NEW_ORDER, "malformed"): _Meaning(
        _P, "the CA cannot read this order; check the names, else report it as a bug of certworker"
    ),
    (Endpoint.VALIDATION, "malformed"): _Meaning(_V, "the CA could not use what it found for {name}"),
    # A challenge that is not pending any more is refused like this: the authorization is read again.
    (Endpoint.CHALLENGE, "malformed"): _Meaning(
        _T, "the challenge was answered already; the authorization is read again"
    ),
}
"""Codes whose meaning hangs on what was asked."""

_PASSING = {408, 409, 425, 429}
"""Statuses below 500 that say "later", not "never"."""
_BUSY = 503
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
_SHARED = {Endpoint.DIRECTORY, Endpoint.NEW_NONCE, Endpoint.NEW_ACCOUNT}
"""What everybody needs before anything else."""
_ACCOUNTS = {Endpoint.NEW_ACCOUNT, Endpoint.ACCOUNT}
_APART = {Endpoint.VALIDATION, Endpoint.RENEWAL_INFO}
"""Where trouble says nothing of the next order: the CA has answered, or a renewal can do without."""
_LINK = re.compile(r"https://[^\s\"'<>]+")
_DETAIL_LIMIT = 2048


def classify_problem(problem: Problem, doing: Endpoint, dns_name: str | None = None) -> Failure:
    """Say what follows from `problem`, which came while `doing` (for `dns_name`, where only one is meant)."""
    if problem.code == "compound" and problem.subproblems:
        return _gravest([classify_problem(_inherit(part, problem), doing, dns_name) for part in problem.subproblems])
    error_class, hint, scope = _judge(problem, doing)
    name = dns_name or problem.identifier or next((p.identifier for p in problem.subproblems if p.identifier), None)
    return Failure(
        error_class,
        "certworker:order-lost" if _is_lost(problem, doing) else problem.type,
        _tell(problem),
        hint.format(name=name or "the name"),
        problem.retry_after if error_class in (_T, _R) else None,
        _scope_here(error_class, scope, doing),
        doing,
    )


def classify_silence(type_: str, detail: str, hint: str, doing: Endpoint) -> Failure:
    """Say what follows when no answer came: whoever asks next will get none either."""
    scope = Scope.ISSUANCE if doing in _APART else Scope.CA
    return Failure(_T, type_, detail, hint, scope=scope, endpoint=doing)


def classify_nonsense(type_: str, detail: str, hint: str, doing: Endpoint) -> Failure:
    """Say what follows from an answer that RFC 8555 does not allow; about one order it is that order's trouble."""
    scope = Scope.ISSUANCE if doing in _APART | _PARTS_OF_ORDER else Scope.CA
    return Failure(_T, type_, detail, hint, scope=scope, endpoint=doing)


def classify_order(order: Order, authorizations: Sequence[Authorization]) -> Failure:
    """Say why `order` is invalid: what a failing challenge says outweighs the order's own error."""
    failures = [failure for a in authorizations if (failure := _classify_authorization(a)) is not None]
    if failures:
        return _gravest(failures)
    if order.error is not None:
        # The CA has answered: whatever it met, it met with this order.
        return replace(classify_problem(order.error, Endpoint.FINALIZE), scope=Scope.ISSUANCE)
    return Failure(_T, "certworker:order-invalid", "the CA gave no reason", "a new order is made")


def names_refused(
    dns_names: Collection[str], said: Order | Problem, authorizations: Sequence[Authorization] = ()
) -> dict[str, Failure]:
    """Return which of the ordered `dns_names` are at fault, and why; empty if the CA has not told.

    `said` is an invalid order, with its authorizations, or the problem that newOrder was answered with.
    A name with trouble that passes (T) or a limit (R) is not at fault: it can wait and be ordered.
    """
    error, doing = (said, Endpoint.NEW_ORDER) if isinstance(said, Problem) else (said.error, Endpoint.FINALIZE)
    parts = error.subproblems if error is not None else ()
    found = {
        p.identifier.lower(): replace(classify_problem(_inherit(p, error), doing), scope=Scope.ISSUANCE)
        for p in parts
        if p.identifier
    }
    # Last, because what a failing challenge says outweighs the rest.
    found |= {a.dns_name: failure for a in authorizations if (failure := _classify_authorization(a)) is not None}
    return {name: f for name, f in found.items() if name in dns_names and f.error_class not in (_T, _R)}


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


def _judge(problem: Problem, doing: Endpoint) -> _Meaning:
    status = problem.status or 0
    if problem.code == "rateLimited" or (status == 429 and problem.code not in _EVERYWHERE):
        return _judge_limit(problem, doing)
    if _is_lost(problem, doing):
        return _Meaning(_T, "the CA no longer knows this order; a new one is made")
    if problem.code == "userActionRequired":
        where = problem.instance or problem.terms_of_service or _link(problem.detail)
        hint = f"the CA wants something done by a person: {_plain(where) if where else 'see what it said'}"
        return _Meaning(_X, hint, Scope.ACCOUNT)
    if known := _HERE.get((doing, problem.code)) or _EVERYWHERE.get(problem.code):
        return known
    return _judge_status(status, doing)


def _judge_limit(problem: Problem, doing: Endpoint) -> _Meaning:
    """A limit ends by itself; a pause of a name does not: it has a link for a person and no Retry-After."""
    busy = problem.status == _BUSY
    link = problem.instance or _link(problem.detail)
    if link and problem.retry_after is None and not busy:
        return _Meaning(_X, f"the CA has paused this account or name until a person visits {_plain(link)}")
    hint = "the CA asks to wait" + (f"; see {_plain(link)}" if link else "")
    return _Meaning(_R, hint, Scope.CA if busy or doing in _SHARED else Scope.ISSUANCE)


def _judge_status(status: int, doing: Endpoint) -> _Meaning:
    if doing is Endpoint.VALIDATION:
        return _Meaning(_V, "the CA could not validate {name}; see what it said")
    if status >= 500:
        return _Meaning(_T, "unexpected answer from the CA; nothing to do unless it lasts", Scope.CA)
    if status >= 400 and status not in _PASSING and doing in _ASKING:
        return _Meaning(_P, "the CA refuses what was asked; see what it said")
    if status >= 400 and doing in (Endpoint.DIRECTORY, Endpoint.NEW_NONCE):
        return _Meaning(_T, "check ACME_DIRECTORY_URL", Scope.CA)
    return _Meaning(_T, "unexpected answer from the CA; nothing to do unless it lasts")


def _scope_here(error_class: ErrorClass, scope: Scope, doing: Endpoint) -> Scope:
    """Return whose trouble it is when it comes while `doing`."""
    if doing in _APART:
        return Scope.ISSUANCE
    # Without an account nobody orders, whatever it is that the CA does not like about ours.
    return Scope.ACCOUNT if doing in _ACCOUNTS and error_class in (_P, _X) else scope


def _is_lost(problem: Problem, doing: Endpoint) -> bool:
    """The CA knows nothing at this URL: it was reset, or has cleaned up."""
    return problem.status == 404 and problem.code in ("", "malformed") and doing in _PARTS_OF_ORDER


def _inherit(part: Problem, whole: Problem | None) -> Problem:
    """Return a subproblem with what only the answer around it says."""
    if whole is None:
        return part
    return replace(part, status=part.status or whole.status, retry_after=whole.retry_after)


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
