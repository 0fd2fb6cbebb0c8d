"""What every renderer returns, and the checks that are the same for every proxy."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from certworker.errors import InputError

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


def check_folder(folder: str) -> str:
    """Return `folder` if it can be written unquoted in any proxy's configuration."""
    if not _FOLDER.fullmatch(folder):
        raise InputError(f"folder {folder!r}: an absolute path of letters, digits and ._+@=~- is needed")
    return folder
