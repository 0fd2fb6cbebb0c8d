"""The node's side of the control plane: where versions and certificates come from, where heartbeats go.

`parts` builds a `Source` on the database for an embedded node and one over HTTP for a gateway
machine; the agent cannot tell them apart.
"""

from dataclasses import dataclass
from typing import Protocol

from certworker.core.rollout import CertificateChanges, Cursor, Heartbeat
from certworker.core.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class PublishedVersion:
    """The config version that every node should serve."""

    id: str
    number: int
    """Grows with every version, so the greater one is the newer one."""
    snapshot: Snapshot

    @property
    def folder_name(self) -> str:
        """Name the version by number and content: a restored control plane may give a number again."""
        return f"{self.number}-{self.snapshot.digest()[:16]}"


class Source(Protocol):
    """What an agent asks. Any exception of it but VersionRefused goes through to the caller of `Agent.step`."""

    def published(self) -> PublishedVersion | None:
        """Return the version to serve, None before the first one; VersionRefused if it cannot be read here."""

    def changes_after(self, cursor: Cursor) -> CertificateChanges:
        """Return what changed after `cursor`; if its epoch is not the present one, everything, `complete`."""

    def report(self, heartbeat: Heartbeat) -> None:
        """Record what the node proved."""
