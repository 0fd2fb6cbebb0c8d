"""What a node may have: which config version, and which certificates.

Decided on the control plane, from what the node is and what its heartbeats proved. A node that asks
for more than that gets no more.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from certworker.core.rollout import CertificateChanges, Cursor, NodeCertificate

if TYPE_CHECKING:
    from certworker.core.snapshot import Snapshot

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Scope:
    """The certificates that the https listeners of a version, or of some, can answer with."""

    policy_ids: frozenset[str] | None
    """Those that one of these policies wants. None: all, because a listener names no policy."""

    @property
    def tag(self) -> str:
        """A short name of the scope for a cursor; equal scopes have equal tags, and all has "".

        Not the ids themselves: a cursor travels in a URL.
        """
        if self.policy_ids is None:
            return ""
        return hashlib.sha256(",".join(sorted(self.policy_ids)).encode()).hexdigest()[:16]

    def covers(self, policy_ids: Iterable[str]) -> bool:
        """Say whether a certificate that these policies want is one of them."""
        return self.policy_ids is None or not self.policy_ids.isdisjoint(policy_ids)


EVERYTHING = Scope(None)
NOTHING = Scope(frozenset())


def scope_of(snapshot: "Snapshot") -> Scope:
    """Return which certificates a node needs that serves this version."""
    named = {listener.tls_policy_id for listener in snapshot.listeners if listener.protocol == "https"}
    policy_ids = frozenset(policy_id for policy_id in named if policy_id is not None)
    return EVERYTHING if None in named else Scope(policy_ids)


def join_scopes(scopes: Iterable[Scope]) -> Scope:
    """Return what any of these scopes covers."""
    joined: frozenset[str] = frozenset()
    for scope in scopes:
        if scope.policy_ids is None:
            return EVERYTHING
        joined |= scope.policy_ids
    return Scope(joined)


@dataclass(frozen=True, slots=True)
class Node:
    """A gateway machine that was enrolled."""

    id: str
    name: str
    canary: bool


@dataclass(frozen=True, slots=True)
class Canary:
    """A node that gets a version before the others."""

    name: str
    live: bool
    """Whether it was heard of lately."""
    version_id: str | None
    """The version it proved to serve."""


def why_held_back(version_id: str, canaries: Iterable[Canary]) -> str | None:
    """Return why only the canaries may have a version yet; None: every node may.

    A silent canary may have died of this very version. So one at least has to prove it, and no live one
    may be without it.
    """
    known = list(canaries)
    live = [canary for canary in known if canary.live]
    lacking = sorted(canary.name for canary in live if canary.version_id != version_id)
    if lacking:
        return f"not yet proved by canary {', '.join(lacking)}"
    if known and not live:
        silent = ", ".join(sorted(canary.name for canary in known))
        return f"no canary is live that could prove it: start the agent of {silent}, or remove that node"
    return None


@dataclass(frozen=True, slots=True)
class Standing:
    """Where the control plane is: what a waiting node compares with where it is itself."""

    published_id: str | None
    """The config version that is published, None before the first one."""
    released_id: str | None
    """The version for nodes that are no canaries."""
    epoch: int
    revision: int

    def version_id(self, *, canary: bool) -> str | None:
        """Return which version a node is to serve."""
        return self.published_id if canary else self.released_id

    def is_news(self, version_id: str | None, cursor: Cursor, *, canary: bool) -> bool:
        """Say whether there is something for a node that has this version and stands at `cursor`."""
        wanted = self.version_id(canary=canary)
        return wanted not in (None, version_id) or (self.epoch, self.revision) != (cursor.epoch, cursor.revision)


def collect_changes(read: Callable[[Cursor, bool], CertificateChanges], cursor: Cursor) -> CertificateChanges:
    """Return everything after `cursor` as one, from as many pages as there are.

    `read` is told whether the pages before are part of a whole that began with a `complete` one: that
    needs no tombstones from before its beginning.
    """
    page = read(cursor, False)
    collected = _Collected(page.complete)
    collected.add(page)
    while page.more:
        page = read(page.cursor, collected.complete)
        if page.complete:
            collected = _Collected(complete=True)
        collected.add(page)
    return collected.up_to(page.cursor)


@dataclass(slots=True)
class _Collected:
    """Pages as one, in the order of their revisions: what a later one says of a certificate or host holds."""

    complete: bool
    changed: dict[str, NodeCertificate] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)
    thumbprints: dict[str, str] = field(default_factory=dict)
    removed_hosts: set[str] = field(default_factory=set)

    def add(self, page: CertificateChanges) -> None:
        """Take a page in; costs what it holds, not what there is already."""
        _take_over(self.changed, self.removed, {one.id: one for one in page.changed}, page.removed)
        _take_over(self.thumbprints, self.removed_hosts, page.thumbprints, page.removed_hosts)

    def up_to(self, cursor: Cursor) -> CertificateChanges:
        return CertificateChanges(
            cursor, tuple(self.changed.values()), frozenset(self.removed), self.complete,
            thumbprints=self.thumbprints, removed_hosts=frozenset(self.removed_hosts),
        )  # fmt: skip


def _take_over(there: dict[str, T], gone: set[str], newer: Mapping[str, T], removed: Iterable[str]) -> None:
    for name in removed:
        there.pop(name, None)
        gone.add(name)
    there.update(newer)
    gone.difference_update(newer)
