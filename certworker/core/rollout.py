"""What a node is given and what it says back: a version, certificates by revision, a heartbeat.

Versions and certificates travel separately: a renewal never makes a version. A node asks for
everything after its cursor `(epoch, revision)`; revisions are committed in order, so it misses
nothing. A restore from backup raises the epoch, and a node that serves other policies than before
has another scope; it then starts from nothing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol, TypeVar


@dataclass(frozen=True, slots=True)
class Cursor:
    """The last change to the certificates that a node has taken over."""

    epoch: int = 0
    revision: int = 0
    scope: str = ""
    """The tag of the `core.delivery.Scope` that the certificates were chosen by."""


@dataclass(frozen=True, slots=True)
class NodeCertificate:
    """One certificate with its key, as a node serves it."""

    id: str
    policy_ids: frozenset[str]
    """The policies that want it; an https listener may be restricted to one."""
    dns_names: tuple[str, ...]
    """The SNI names it answers: A-labels, lower case, exact or `*.one-label`."""
    chain_pem: str
    """Leaf first, then the intermediates."""
    key_pem: str = field(repr=False)
    fingerprint: str
    """SHA-256 of the leaf's DER, 64 lower-case hex digits."""
    expires_at: datetime
    revision: int
    wanted: bool = True
    """Whether it is renewed; one that no policy wants any more serves until another one can."""


@dataclass(frozen=True, slots=True)
class CertificateChanges:
    """Everything that changed after a cursor, in order of revision."""

    cursor: Cursor
    """Where the node stands once it has taken these over."""
    changed: tuple[NodeCertificate, ...] = ()
    removed: frozenset[str] = frozenset()
    """Ids of certificates to be served no longer."""
    complete: bool = False
    """True if `changed` and `thumbprints` are all there is, so that whatever they do not name is gone."""
    thumbprints: Mapping[str, str] = field(default_factory=dict)
    """DNS name -> thumbprint of the account key (RFC 7638) that challenges for it are answered with."""
    removed_hosts: frozenset[str] = frozenset()
    """DNS names whose challenges are answered no longer."""
    more: bool = False
    """True if this is a page, and there is more after `cursor`."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a node proved, at one moment. Written to `node_status`."""

    node_id: str
    version_id: str | None
    """The config version *proved to be served*, never just the one fetched."""
    version_number: int | None
    cursor: Cursor
    """Every certificate up to here was proved to be served by a TLS handshake, or is named in `unserved`; every
    thumbprint by an answered request, or is named in `unanswered`."""
    proxy: str
    """For example `haproxy 2.6.12`."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Certificate id -> SHA-256 of the leaf that the proxy presented, for what changed lately."""
    unserved: Mapping[str, str] = field(default_factory=dict)
    """Certificate id -> why the proxy does not present it."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Those of `unserved` that the proxy was not given: key and chain do not fit, or its own check says no."""
    refused_version_id: str | None = None
    """The newest version, if it was not taken over."""
    unanswered: Mapping[str, str] = field(default_factory=dict)
    """DNS name -> why a challenge for it is not answered with its thumbprint."""
    untold: int = 0
    """How many more there are in `unserved` and `unanswered` than are named."""
    warnings: tuple[str, ...] = ()
    """What the proxy's own check remarked on the served version."""
    error: str | None = None
    """Why the newest version or certificate is not served, one line."""


class Servable(Protocol):
    """What deciding who answers a name needs to know of a certificate."""

    @property
    def id(self) -> str: ...
    @property
    def policy_ids(self) -> frozenset[str]: ...
    @property
    def dns_names(self) -> tuple[str, ...]: ...
    @property
    def expires_at(self) -> datetime: ...
    @property
    def wanted(self) -> bool: ...


C = TypeVar("C", bound=Servable)


def choose_served(certificates: Iterable[C]) -> dict[str, C]:
    """Return which certificate answers each SNI name: a wanted one, then the later expiry, then the smaller id.

    (Wanted first, or a change to a CA or profile of shorter life would not be served until the old
    certificate ends.)
    (Exact before wildcard is the proxy's own rule: each name is a key of its own here.)
    """
    chosen: dict[str, C] = {}
    for certificate in certificates:
        for name in certificate.dns_names:
            rival = chosen.get(name)
            if rival is None or _rank(certificate, rival.id) > _rank(rival, certificate.id):
                chosen[name] = certificate
    return chosen


def _rank(one: Servable, rival_id: str) -> tuple[bool, datetime, str]:
    return one.wanted, one.expires_at, rival_id


def assign_names(certificates: Iterable[C], policy_id: str | None) -> dict[str, tuple[str, ...]]:
    """Return, by certificate id, the names it answers on listeners of one policy (None: of all)."""
    allowed = (one for one in certificates if policy_id is None or policy_id in one.policy_ids)
    names: dict[str, list[str]] = {}
    for name, certificate in choose_served(allowed).items():
        names.setdefault(certificate.id, []).append(name)
    return {certificate_id: tuple(sorted(own)) for certificate_id, own in names.items()}
