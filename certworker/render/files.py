"""What every renderer takes and returns, and what is the same for every proxy."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from certworker.core.snapshot import Responder, Snapshot, Target
from certworker.errors import InputError

CHALLENGE_PATH = "/.well-known/acme-challenge/"
ALL_POLICIES = "all"
"""Names the list of https listeners without a policy of their own."""

_CONTROL = re.compile(rb"[\x00-\x09\x0b-\x1f\x7f]")
_FOLDER = re.compile(r"/[A-Za-z0-9._+@=~/-]*[A-Za-z0-9._+@=~-]")


@dataclass(frozen=True, slots=True)
class RenderedFile:
    """One file, to be written as it is."""

    content: bytes
    mode: int = 0o600


@dataclass(frozen=True, slots=True)
class RenderedFiles:
    """The files of one version."""

    files: Mapping[str, RenderedFile]
    """By path, relative to the folder of the version."""

    def __post_init__(self) -> None:
        """Refuse control characters: one newline too many would be one directive too many.

        Every value was checked before; this is the net below the renderers.
        """
        for path, file in self.files.items():
            if found := _CONTROL.search(file.content):
                raise InputError(f"rendered {path}: control character {found[0]!r} at byte {found.start()}")


@dataclass(frozen=True, slots=True, order=True)
class ServedFile:
    """A certificate's file and the SNI names that it answers, no others."""

    file: str
    dns_names: tuple[str, ...]


def names_to_resolve(snapshot: Snapshot) -> frozenset[str]:
    """Return the upstreams' and responders' hosts that are no IP literals."""
    return frozenset(address.host for address in _addresses(snapshot) if is_name(address.host))


def _addresses(snapshot: Snapshot) -> Iterator[Target | Responder]:
    yield from snapshot.responders
    for pool in snapshot.pools:
        yield from pool.targets


def is_name(host: str) -> bool:
    """Say whether a checked host is a name; no name ends in a number."""
    return ":" not in host and not host.rpartition(".")[2].isdigit()


def check_folder(folder: str) -> str:
    """Return `folder` if it can be written unquoted in any proxy's configuration."""
    if not _FOLDER.fullmatch(folder):
        raise InputError(f"folder {folder!r}: an absolute path of letters, digits and ._+@=~- is needed")
    return folder
