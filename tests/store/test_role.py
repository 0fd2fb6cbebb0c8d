"""The worker role of an SQLite file: one process, and free again however that process ends."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from certworker.errors import DatabaseHeld
from certworker.store.role import WorkerRole, lock_path

from .conftest import NOW

HOLD = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from certworker.errors import DatabaseHeld
from certworker.store.role import WorkerRole
try:
    role = WorkerRole.take(Path(sys.argv[1]), datetime.now(UTC))
except DatabaseHeld as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
print("held", flush=True)
sys.stdin.read()
"""


def start(database: Path) -> subprocess.Popen[str]:
    """Start a process that takes the role and keeps it until its input ends."""
    command = [sys.executable, "-c", HOLD, str(database)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_second_process_is_told_who_holds_it(tmp_path: Path) -> None:
    """Exit code 3; the first one's death by SIGKILL frees it at once."""
    database = tmp_path / "certworker.db"
    with start(database) as first:
        assert said(first) == "held"
        with start(database) as second:
            message = said(second)
            assert second.wait(10) == 3
        assert f"process {first.pid} on " in message
        with pytest.raises(DatabaseHeld) as caught:
            WorkerRole.take(database, NOW)
        assert caught.value.exit_code == 3

        first.send_signal(signal.SIGKILL)
        first.wait(10)
        with WorkerRole.take(database, NOW), pytest.raises(DatabaseHeld, match=f"process {os.getpid()} on "):
            WorkerRole.take(database, NOW)


def test_the_role_can_be_given_up_and_taken_again(tmp_path: Path) -> None:
    """Giving it up twice is nothing; the lock file stays, and is its owner's only."""
    database = tmp_path / "certworker.db"
    role = WorkerRole.take(database, NOW)
    note = json.loads(lock_path(database).read_text())
    role.give_up()
    role.give_up()

    with WorkerRole.take(database, NOW):
        pass
    assert note["pid"] == os.getpid()
    assert stat.S_IMODE(lock_path(database).stat().st_mode) == 0o600


def test_two_databases_in_one_folder_have_two_roles(tmp_path: Path) -> None:
    """The lock belongs to the file."""
    with WorkerRole.take(tmp_path / "a.db", NOW), WorkerRole.take(tmp_path / "b.db", NOW):
        pass


def test_a_holder_that_left_no_note_is_still_refused(tmp_path: Path) -> None:
    """It may be between taking and writing."""
    with WorkerRole.take(tmp_path / "a.db", NOW):
        lock_path(tmp_path / "a.db").write_text("{")
        with pytest.raises(DatabaseHeld, match="a process that has not said who it is"):
            WorkerRole.take(tmp_path / "a.db", NOW)
