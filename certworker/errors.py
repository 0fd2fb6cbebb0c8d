"""Every exception of certworker.

    CertworkerError                 exit code 1
    ├── UsageError                  exit code 2: wrong use, wrong settings, bad input
    │   ├── SettingsError           a setting is missing or wrong
    │   ├── InputError              a value a person or a row gave is wrong: names field, value and rule
    │   │   └── NameRefused         a DNS name that cannot be ordered
    │   └── UnknownName             no policy wants this name
    ├── DatabaseHeld                exit code 3: the embedded database is held by another process
    ├── StoreError                  the database cannot be used as it is
    │   ├── StoreRefused            it will not have a value: asking again cannot help
    │   ├── SchemaError             its schema does not fit this release
    │   └── SealError               a sealed value cannot be opened, or the key-encryption key is missing
    ├── LeaseLost                   another worker owns this issuance now: stop, send nothing more
    ├── TokenUnknown                no node has the token that was shown
    ├── NodeRemoved                 the node that has it belongs to the fleet no more
    ├── EnrolmentRefused            a one-time token that is unknown, used or too old
    ├── ControlPlaneError           the node API could not be asked, or said no; the proxy serves on
    │   ├── WrongControlPlane       its key is not the one that was pinned: nothing was sent
    │   └── NodeRefused             it does not, or no longer, take this machine for a node
    ├── NodeError                   a proxy refused a configuration, or cannot be run
    │   ├── FolderHeld              another agent works in this node's folder
    │   ├── PairRefused             a certificate and its key that must not reach a proxy
    │   ├── CheckRefused            the proxy's own check says no, before anything changed
    │   ├── ReloadRefused           the proxy did not take a configuration over
    │   ├── CommandRefused          a running proxy answered a command with something else than success
    │   └── VersionRefused          a config version is not served; the one before it is
    └── CaError                     a CA could not be asked, or said no
        ├── AccountGone             the account of an order is not in the database any more: nothing was sent
        ├── AccountForgotten        the CA knows the account no more, and a person decides what follows
        ├── AccountDeactivated      the account was given up for good: a person makes another one
        ├── OverBudget              our own limit for this CA is used up: nothing was sent
        ├── ProfileNotOffered       the profile asked for is not in the CA's directory: nothing was sent
        ├── TermsNotAgreed          the CA's terms have to be agreed to first: nothing was sent
        ├── TransportFault          no answer came: DNS, connect, TLS, time limit, reset, proxy
        ├── AnswerFault             an answer came that RFC 8555 does not allow
        ├── ChainRefused            a certificate chain that must not be stored
        │   └── ChainUnreadable     one that is damaged, so that nobody knows what it is
        └── ProblemReported         the CA answered with a problem document (RFC 7807)

A message is one lower-case line: what we were doing, to which thing, what was said, and what to
check when an operator can help.
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta

_LONGEST_SHOWN = 300
"""Characters of a refused name in a message: a little more than a name can have."""


class CertworkerError(Exception):
    """Something certworker was asked to do failed; the message is for a person."""

    exit_code = 1


class UsageError(CertworkerError):
    """The caller has to change something before this can work."""

    exit_code = 2


class SettingsError(UsageError):
    """One or more settings are missing or wrong; the message names them all."""


class InputError(UsageError):
    """A given value breaks a rule; the message names the field, the value and the rule."""


class NameRefused(InputError):
    """A DNS name that no certificate can be ordered for."""

    def __init__(self, value: str, rule: str) -> None:
        shown = repr(value) if len(value) <= _LONGEST_SHOWN else f"{value[:_LONGEST_SHOWN]!r}..."
        super().__init__(f"name {shown}: {rule}")
        self.value = value
        self.rule = rule


class UnknownName(UsageError):
    """No policy wants the name that was given."""


class DatabaseHeld(CertworkerError):
    """The embedded database has a worker already; the message says which process."""

    exit_code = 3


class StoreError(CertworkerError):
    """The database cannot be used as it is."""

    contended = False
    """Somebody else's transaction was in the way of some rows; others may be written."""


class StoreRefused(StoreError):
    """The database is there and will not have this value: asking again cannot help."""


class SchemaError(StoreError):
    """The database's schema does not fit this release of certworker."""


class SealError(StoreError):
    """A sealed value cannot be opened, or the key-encryption key is missing or wrong."""

    exit_code = 2


class LeaseLost(CertworkerError):
    """Another worker owns this issuance now."""


class TokenUnknown(CertworkerError):
    """No node has the token that was shown."""


class NodeRemoved(CertworkerError):
    """The node that has the token was removed from the fleet."""


class EnrolmentRefused(CertworkerError):
    """A one-time token is unknown, used, or too old."""


class ControlPlaneError(CertworkerError):
    """The node API could not be asked, or its answer could not be used; asking again may help."""


class WrongControlPlane(ControlPlaneError):
    """Whoever answered does not have the key that was pinned at the enrolment; nothing was sent."""


class NodeRefused(ControlPlaneError):
    """The node API knows this machine not, or no more: a person has to enrol it."""


class NodeError(CertworkerError):
    """A proxy refused a configuration, or cannot be run."""


class FolderHeld(NodeError):
    """Another agent works in this node's folder."""


class PairRefused(NodeError):
    """A certificate and its key do not fit together, or not their names."""


class CheckRefused(NodeError):
    """The proxy's own check refused a configuration; `files` are the certificate files it named."""

    def __init__(self, message: str, files: frozenset[str] = frozenset()) -> None:
        super().__init__(message)
        self.files = files


class ReloadRefused(NodeError):
    """The proxy did not take a configuration over; what it served before, it still serves."""


class CommandRefused(NodeError):
    """A running proxy did not do what it was told over its socket."""


class VersionRefused(NodeError):
    """A config version cannot be served here; the one before it is served instead."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem document (RFC 7807, RFC 8555 §6.7), cleaned of control characters and cut to size."""

    type: str
    """The URN, for example `urn:ietf:params:acme:error:rateLimited`; `about:blank` if none was given."""
    detail: str
    status: int | None = None
    """HTTP status of the answer, or of the document when it was inside another answer."""
    retry_after: timedelta | None = None
    """From the answer's Retry-After header, never negative."""
    instance: str | None = None
    """An https URL for a person, for example where to agree to new terms (RFC 8555 §7.3.3)."""
    terms_of_service: str | None = None
    """The https URL of the terms themselves, from the answer's Link header (RFC 8555 §7.3.3)."""
    identifier: str | None = None
    """The identifier's value that a subproblem speaks of."""
    subproblems: tuple["Problem", ...] = ()

    @property
    def code(self) -> str:
        """The last word of an ACME error URN, else ""."""
        prefix = "urn:ietf:params:acme:error:"
        return self.type.removeprefix(prefix) if self.type.startswith(prefix) else ""


class CaError(CertworkerError):
    """The CA could not be asked, or said no."""

    asked: str | None = None
    """What was asked (a `core.retry.Endpoint`), where it was not what the caller was after: every act needs
    the directory and a nonce first."""
    told: bool = False
    """Whether it was counted against the CA: who waited for the same request has the same error."""


class AccountGone(CaError):
    """The account that an order was made with is not used any more, or not in the database; nothing was sent."""


class AccountForgotten(CaError):
    """The CA knows no account with the key that we have, and only a person may have one made again."""


class AccountDeactivated(CaError):
    """The account was given up for good (RFC 8555 §7.3.6); only a person may have another one made."""


class OverBudget(CaError):
    """We allow ourselves no more of this at the CA before `wait` is over; nothing was sent."""

    def __init__(self, bucket: str, wait: timedelta) -> None:
        super().__init__(f"our own limit {bucket!r} at this CA is used up for {round(wait.total_seconds())} s")
        self.bucket = bucket
        self.wait = wait


class ProfileNotOffered(CaError):
    """The CA's directory does not list the profile that was asked for; nothing was sent."""

    def __init__(self, profile: str, offered: Collection[str]) -> None:
        names = ", ".join(sorted(offered)) or "none"
        super().__init__(f"the CA does not offer profile {profile!r}, check ACME_PROFILE; it offers: {names}")
        self.profile = profile
        self.offered = frozenset(offered)


class TermsNotAgreed(CaError):
    """An account needs consent to the CA's terms, which a person has to give; nothing was sent."""

    def __init__(self, terms_of_service: str) -> None:
        super().__init__(f"the CA wants its terms agreed to: read {terms_of_service} and set ACME_TOS_AGREED=true")
        self.terms_of_service = terms_of_service


class TransportFault(CaError):
    """No usable answer came back from `url`.

    `kind` is one of dns, connect, tls, timeout, reset, proxy.
    """

    def __init__(self, kind: str, url: str, detail: str) -> None:
        super().__init__(f"cannot reach {url}: {detail}")
        self.kind = kind
        self.url = url
        self.detail = detail


class AnswerFault(CaError):
    """The CA's answer breaks RFC 8555, so it cannot be used."""

    def __init__(self, url: str, detail: str) -> None:
        super().__init__(f"unusable answer from {url}: {detail}")
        self.url = url
        self.detail = detail


class ChainRefused(CaError):
    """The CA's certificate chain failed a check and is not stored."""


class ChainUnreadable(ChainRefused):
    """The CA's certificate chain is no PEM, or what is in it is no certificate."""


class ProblemReported(CaError):
    """The CA answered with an error status; `problem` is its problem document, or stands in for it."""

    def __init__(self, doing: str, problem: Problem) -> None:
        super().__init__(f"{doing}: the CA said {problem.type}: {problem.detail}")
        self.doing = doing
        self.problem = problem
