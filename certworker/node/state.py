"""What a node remembers across restarts. Keys are not part of it: they lie in files of their own."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from certworker.core.rollout import Cursor
from certworker.node.control import PublishedVersion
from certworker.node.folder import Folder, write_file
from certworker.render.files import ServedFile


@dataclass(frozen=True, slots=True)
class HeldCertificate:
    """A certificate as the node keeps it."""

    id: str
    policy_ids: frozenset[str]
    dns_names: tuple[str, ...]
    fingerprint: str
    expires_at: datetime
    wanted: bool
    file: str
    """The absolute path of its PEM, named by the content's hash."""


Held = Mapping[str, HeldCertificate]
"""By certificate id."""


@dataclass(frozen=True, slots=True)
class Lists:
    """What a proxy is told beside its version, and more often."""

    certificates: Mapping[str | None, frozenset[ServedFile]] = field(default_factory=dict)
    """Which file answers which names, for each policy that a listener names; None: listeners that serve all."""
    thumbprints: Mapping[str, str] | None = None
    """DNS name -> thumbprint that challenges are answered with; None: no listener answers them by itself."""

    def changes_to(self, after: "Lists") -> int:
        """Return how many lines differ."""
        lines = self.certificates
        changed = sum(len(new ^ lines.get(name, frozenset())) for name, new in after.certificates.items())
        return changed + len((self.thumbprints or {}).items() ^ (after.thumbprints or {}).items())


@dataclass(frozen=True, slots=True)
class State:
    """What was applied and proved last."""

    version: PublishedVersion | None = None
    cursor: Cursor = field(default_factory=Cursor)
    held: Held = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    """Certificate id -> why its newest form is not given to the proxy. An older one may be held."""
    unproved: Mapping[str, str] = field(default_factory=dict)
    """Id of a certificate that is held -> why no handshake has shown it yet."""
    thumbprints: Mapping[str, str] = field(default_factory=dict)
    """DNS name -> thumbprint of the account key that challenges for it are answered with."""
    unanswered: Mapping[str, str] = field(default_factory=dict)
    """DNS name of these -> why no challenge has been answered so yet."""


_STATE = TypeAdapter(State)


def load_state(folder: Folder) -> State:
    """Return what was saved last. Without it, or with files missing, everything is asked for again."""
    try:
        state = _STATE.validate_json(folder.state_path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return State()
    held = {name: one for name, one in state.held.items() if Path(one.file).is_file()}
    return state if len(held) == len(state.held) else replace(state, held=held, cursor=Cursor())


def save_state(folder: Folder, state: State) -> None:
    """Keep `state` for the next start."""
    write_file(folder.state_path, _STATE.dump_json(state, exclude_none=True))
