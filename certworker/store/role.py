"""What only one process at a time can be, by a lock of the operating system.

The kernel frees it when the process ends, however it ends; there is no file to clean up and no clock
involved. An embedded database has one worker: it is the role that is locked, not the database, and every
command may write. A data folder is the place of one worker: whoever takes it next knows that one is dead.
"""

import fcntl
import json
import os
import socket
import uuid
from datetime import datetime
from pathlib import Path
from typing import Self

from certworker.errors import DatabaseHeld, StoreError
from certworker.store.rows import new_id


class _Held:
    """Held until `give_up`."""

    def __init__(self, handle: int) -> None:
        self._handle: int | None = handle

    def give_up(self) -> None:
        """Let another process take it."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_up()


class WorkerRole(_Held):
    """The right to be the one worker of an SQLite file."""

    @classmethod
    def take(cls, database: Path, now: datetime) -> Self:
        """Take the role for the SQLite file `database`, or raise DatabaseHeld naming the holder.

        StoreError if there can be no lock where the file is.
        """
        path = lock_path(database)
        try:
            handle = _open(path)
        except OSError as error:
            raise StoreError(
                f"cannot take the worker role of the database {database}: cannot write to {path}: {error.strerror}; "
                "check who owns the file and its folder, and how they are mounted"
            ) from None
        if not _lock(handle):
            raise DatabaseHeld(
                f"the database {database} has a worker already: {_holder(path)}; "
                "stop it first, or use PostgreSQL for several workers"
            ) from None
        os.ftruncate(handle, 0)
        note = {"pid": os.getpid(), "host": socket.gethostname(), "since": now.isoformat(timespec="seconds")}
        os.pwrite(handle, json.dumps(note).encode(), 0)
        return cls(handle)


class Place(_Held):
    """A data folder as one worker's own. While it is held, every other worker of this `name` is dead."""

    def __init__(self, handle: int, name: str) -> None:
        super().__init__(handle)
        self.name = name
        """What `workers.place` says: made once and kept in the folder; a copy of the folder has another."""

    @classmethod
    def take(cls, data_dir: Path) -> Self | None:
        """Take the place of `data_dir`; None if a live worker has it, or the folder cannot hold a lock.

        A worker without a place does the same work; when it dies, its leases end by themselves.
        """
        try:
            handle = _open(data_dir / "worker.lock")
        except OSError:
            return None
        if not _lock(handle):
            return None
        try:
            return cls(handle, _name_in(handle))
        except OSError:
            os.close(handle)
            return None


def lock_path(database: Path) -> Path:
    """Return the lock file of a database."""
    return database.with_name(f"{database.name}.worker.lock")


def _open(path: Path) -> int:
    return os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _lock(handle: int) -> bool:
    """Lock an open file for good, or close it and return False."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return False
    return True


def _name_in(handle: int) -> str:
    """Return the name that the locked file has, written at first."""
    try:
        word = str(uuid.UUID(os.pread(handle, 100, 0).decode()))
    except ValueError:
        word = new_id()
        os.ftruncate(handle, 0)
        os.pwrite(handle, word.encode(), 0)
    # The number is the file's own: a folder that a second machine was set up from has the same word.
    return f"{word}.{os.fstat(handle).st_ino}"


def _holder(path: Path) -> str:
    try:
        note = json.loads(path.read_text())
        return f"process {int(note['pid'])} on {note['host']}, since {note['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has not said who it is"
