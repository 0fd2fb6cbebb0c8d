"""A node's folder: certificates by content, versions by number, and a symlink to the one in use.

    certs/<sha256>.pem      0600, immutable: a version or a crt-list only refers to it
    lists/<policy>.list     which certificate answers which names
    versions/<name>/        one rendered version; the name says its number and its content
    current -> versions/…   swapped by one rename
    run/                    sockets and the proxy's log
    state.json, lock        the agent's memory; one agent at a time
    addresses.json          what names of upstreams resolved to, for nginx

Where the proxy is the operator's own, there is one more symlink, and sets of files instead of the lists:

    lists/<digest>/         one set of files for a proxy to include, immutable
    include -> lists/…      swapped by one rename

Every file is written beside its place, flushed, and renamed: a crash leaves the old or the new one.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import BinaryIO

from certworker.errors import FolderHeld, NodeError
from certworker.render.files import RenderedFiles, check_folder

_MAX_SOCKET_PATH = 90
"""The kernel's limit is 107 bytes, and HAProxy binds its sockets under a longer, temporary name."""


def write_file(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Put `content` at `path` in one step that survives a power cut."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.unlink(missing_ok=True)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    beside.replace(path)
    _flush_folder(path.parent)


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Folder:
    """The files of one node."""

    def __init__(self, path: Path) -> None:
        self.path = Path(check_folder(str(path.absolute())))
        self.certs, self.lists, self.versions, self.run = (
            self.path / name for name in ("certs", "lists", "versions", "run")
        )
        self.current = self.path / "current"
        self.include = self.path / "include"
        self.state_path = self.path / "state.json"
        self._lock: BinaryIO | None = None
        if len(str(self.run / "master.sock")) > _MAX_SOCKET_PATH:
            raise NodeError(f"folder {self.path}: too long for the path of a socket, choose a shorter one")
        for folder in (self.path, self.certs, self.lists, self.versions, self.run):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)

    def lock(self) -> None:
        """Take the folder until `unlock` or the end of the process; raise `FolderHeld` if it is taken."""
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        lock = os.fdopen(descriptor, "r+b")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise FolderHeld(f"folder {self.path}: another agent works in it, stop that one first") from None
        self._lock = lock

    def unlock(self) -> None:
        """Give the folder back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_certificate(self, pem: bytes) -> str:
        """Keep a certificate with its key, and return the path of its file."""
        path = self.certs / f"{hashlib.sha256(pem).hexdigest()}.pem"
        if not path.is_file():
            write_file(path, pem)
        return str(path)

    def write_list(self, path: Path, content: bytes) -> None:
        """Write a crt-list, unless it is there already."""
        if not path.is_file() or path.read_bytes() != content:
            write_file(path, content)

    def holds_version(self, name: str, rendered: RenderedFiles) -> bool:
        """Say whether exactly this is the folder of version `name`."""
        folder = self.versions / name
        try:
            return all((folder / path).read_bytes() == file.content for path, file in rendered.files.items())
        except FileNotFoundError:
            return False

    def write_version(self, name: str, rendered: RenderedFiles) -> Path:
        """Write the folder of version `name`, in place of what an earlier attempt left."""
        folder, beside = self.versions / name, self.versions / f"{name}.tmp"
        for old in (beside, folder):
            shutil.rmtree(old, ignore_errors=True)
        beside.mkdir(mode=0o700)
        for path, file in rendered.files.items():
            write_file(beside / path, file.content, file.mode)
        beside.rename(folder)
        _flush_folder(self.versions)
        return folder

    def point_at(self, name: str | None) -> None:
        """Make version `name` the current one; None: there is none."""
        if name is None:
            self.current.unlink(missing_ok=True)
            return
        self._link(self.current, Path("versions") / name)

    def _link(self, link: Path, target: Path) -> None:
        beside = link.with_name(f".{link.name}.tmp")
        beside.unlink(missing_ok=True)
        beside.symlink_to(target)
        beside.replace(link)
        _flush_folder(self.path)

    def write_set(self, name: str, files: Mapping[str, bytes], pairs: Collection[str]) -> None:
        """Write a set of files to be included, unless it is there, with links to the `pairs` that it names.

        So it stays whole, whatever becomes of a certificate that only an older set answers with.
        """
        folder, beside = self.lists / name, self.lists / f"{name}.tmp"
        if folder.is_dir():
            return
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(mode=0o700)
        for file, content in files.items():
            write_file(beside / file, content.replace(f"{self.certs}/".encode(), f"{folder}/".encode()))
        for pair in pairs:
            (beside / Path(pair).name).hardlink_to(pair)
        _flush_folder(beside)
        beside.rename(folder)
        _flush_folder(self.lists)

    def include_set(self, name: str) -> None:
        """Make this set the one that is included."""
        if name != self.included_set():
            self._link(self.include, Path("lists") / name)

    def included_set(self) -> str | None:
        """Return which set is included, None before the first one."""
        try:
            return self.include.readlink().name
        except FileNotFoundError:
            return None

    def collect(self, keep: Mapping[Path, Collection[str]]) -> None:
        """Remove everything in the given folders that is not named there."""
        for folder, names in keep.items():
            for path in folder.iterdir():
                if path.name in names:
                    continue
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
