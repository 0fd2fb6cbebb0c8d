"""The worker role of an embedded database: one process at a time, by a lock of the operating system.

The kernel frees it when the process ends, however it ends; there is no file to clean up and no clock
involved. It is the role that is locked, not the database: every command may write.
"""

import fcntl
import json
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import Self

from certworker.errors import DatabaseHeld


class WorkerRole:
    """Held from `take` to `give_up`."""

    def __init__(self, handle: int) -> None:
        self._handle: int | None = handle

    @classmethod
    def take(cls, database: Path, now: datetime) -> Self:
        """Take the role for the SQLite file `database`, or raise DatabaseHeld naming the holder."""
        path = lock_path(database)
        handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise DatabaseHeld(
                f"the database {database} has a worker already: {_holder(path)}; "
                "stop it first, or use PostgreSQL for several workers"
            ) from None
        os.ftruncate(handle, 0)
        note = {"pid": os.getpid(), "host": socket.gethostname(), "since": now.isoformat(timespec="seconds")}
        os.pwrite(handle, json.dumps(note).encode(), 0)
        return cls(handle)

    def give_up(self) -> None:
        """Let another process take it."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_up()


def lock_path(database: Path) -> Path:
    """Return the lock file of a database."""
    return database.with_name(f"{database.name}.worker.lock")


def _holder(path: Path) -> str:
    try:
        note = json.loads(path.read_text())
        return f"process {int(note['pid'])} on {note['host']}, since {note['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has not said who it is"
