"""What one process at a time can be: free again however that process ends."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from certworker.errors import DatabaseHeld, StoreError
from certworker.store.role import Place, WorkerRole, lock_path

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


STAND = """
import sys
from pathlib import Path
from certworker.store.role import Place
place = Place.take(Path(sys.argv[1]))
print(place and place.name, flush=True)
sys.stdin.read()
"""


def start(path: Path, program: str = HOLD) -> subprocess.Popen[str]:
    """Start a process that takes the role (STAND: the place) and keeps it until its input ends."""
    command = [sys.executable, "-c", program, str(path)]
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


# -- the place of a worker ----------------------------------------------------------------------------


def test_where_no_lock_can_be_is_no_role(tmp_path: Path) -> None:
    """One line that names the file, and what the system said of it."""
    database = tmp_path / "certworker.db"
    lock_path(database).mkdir()

    with pytest.raises(StoreError, match=rf"cannot write to {lock_path(database)}: Is a directory; check who owns"):
        WorkerRole.take(database, NOW)


def test_a_place_is_one_worker_s_until_it_dies(tmp_path: Path) -> None:
    """The next one gets the same name, at once after a SIGKILL; meanwhile nobody does."""
    with start(tmp_path, STAND) as first:
        name = said(first)
        with start(tmp_path, STAND) as second:
            assert said(second) == "None"
            second.stdin.close()  # type: ignore[union-attr]
        assert Place.take(tmp_path) is None

        first.send_signal(signal.SIGKILL)
        first.wait(10)
        with take(tmp_path) as place:
            assert place.name == name
            assert Place.take(tmp_path) is None
    with take(tmp_path) as place:
        assert place.name == name


def test_every_folder_is_a_place_of_its_own(tmp_path: Path) -> None:
    """A copy too: a second machine may have been set up from the first one's folder."""
    (tmp_path / "one").mkdir()
    with take(tmp_path / "one") as one:
        shutil.copytree(tmp_path / "one", tmp_path / "copy")
        (tmp_path / "two").mkdir()
        with take(tmp_path / "copy") as copy, take(tmp_path / "two") as two:
            assert len({one.name, copy.name, two.name}) == 3


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"x" * 200])
def test_a_place_that_was_never_named_is_named(tmp_path: Path, content: bytes) -> None:
    """Its first worker may have died between making the file and writing to it."""
    (tmp_path / "worker.lock").write_bytes(content)
    with take(tmp_path) as place:
        name = place.name
    with take(tmp_path) as place:
        assert place.name == name


def test_a_folder_that_holds_no_lock_is_no_place(tmp_path: Path) -> None:
    """Nothing is there, or something that is not ours: a worker runs without."""
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "worker.lock").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "folder" / "worker.lock").mkdir(parents=True)

    for folder in ("nowhere", "linked", "folder"):
        assert Place.take(tmp_path / folder) is None
    assert not (tmp_path / "elsewhere").exists()


def take(data_dir: Path) -> Place:
    place = Place.take(data_dir)
    assert place is not None
    return place
