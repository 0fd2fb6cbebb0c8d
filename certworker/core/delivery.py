"""What a node may have: which config version, and which certificates.

Decided on the control plane, from what the node is and what its heartbeats proved. A node that asks
for more than that gets no more.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from certworker.core.rollout import CertificateChanges, Cursor
from certworker.core.snapshot import Snapshot


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


def scope_of(snapshot: Snapshot) -> Scope:
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
    whole = page.complete
    while page.more:
        following = read(page.cursor, whole)
        page = following if following.complete else _joined(page, following)
        whole = whole or following.complete
    return page


def _joined(first: CertificateChanges, second: CertificateChanges) -> CertificateChanges:
    changed = {one.id: one for one in first.changed if one.id not in second.removed}
    changed |= {one.id: one for one in second.changed}
    kept = {host: value for host, value in first.thumbprints.items() if host not in second.removed_hosts}
    thumbprints = {**kept, **second.thumbprints}
    return replace(
        second,
        changed=tuple(changed.values()),
        removed=(first.removed | second.removed) - changed.keys(),
        thumbprints=thumbprints,
        removed_hosts=(first.removed_hosts | second.removed_hosts) - thumbprints.keys(),
        complete=first.complete,
    )
