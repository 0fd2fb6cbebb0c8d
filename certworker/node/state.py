"""What a node remembers across restarts. Keys are not part of it: they lie in files of their own."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from certworker.core.rollout import Cursor
from certworker.node.control import PublishedVersion
from certworker.node.folder import Folder, write_file
from certworker.render.haproxy import CrtLine


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
Lists = Mapping[str | None, frozenset[CrtLine]]
"""Which file answers which names, for each policy that a listener names; None: listeners that serve all."""


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
