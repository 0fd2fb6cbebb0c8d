"""Threads that take turns run on one core, and on another one when that is busier."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from certworker import cores
from certworker.cores import Core

ALLOWED = sorted(os.sched_getaffinity(0))

pytestmark = pytest.mark.skipif(len(ALLOWED) < 2, reason="needs two cores")


@pytest.fixture
def thread() -> Iterator[threading.Thread]:
    """A thread that waits."""
    end = threading.Event()
    waiting = threading.Thread(target=end.wait, daemon=True)
    waiting.start()
    yield waiting
    end.set()
    waiting.join()


@pytest.fixture
def stat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What /proc/stat says."""
    path = tmp_path / "stat"
    monkeypatch.setattr(cores, "_STAT", path)
    return path


def idle(stat: Path, **seconds: float) -> None:
    """Write how long each allowed core was idle: `first`, `second`."""
    lines = [f"cpu{core} 0 0 0 {int(at * 100)} 0 0 0" for core, at in zip(ALLOWED, seconds.values(), strict=False)]
    stat.write_text("\n".join(["cpu  1 2 3 4 5", *lines, "intr 1"]))


def where(thread: threading.Thread) -> set[int]:
    assert thread.native_id is not None
    return os.sched_getaffinity(thread.native_id)


def test_the_idlest_core_is_chosen(thread: threading.Thread, stat: Path) -> None:
    """For these threads alone: what this process starts otherwise may run anywhere."""
    idle(stat, first=10.0, second=900.0)
    Core().gather([thread])

    assert where(thread) == {ALLOWED[1]}
    assert os.sched_getaffinity(0) == set(ALLOWED)


def test_it_moves_when_others_need_the_core(thread: threading.Thread, stat: Path) -> None:
    """And not for what it used itself, nor for little."""
    core = Core()
    idle(stat, first=10.0, second=900.0)
    core.gather([thread])
    idle(stat, first=10.001, second=900.0)
    core.gather([thread])
    assert where(thread) == {ALLOWED[1]}

    idle(stat, first=10_000.0, second=900.0)
    core.gather([thread])
    assert where(thread) == {ALLOWED[0]}


def test_what_cannot_be_read_or_bound_is_left_alone(thread: threading.Thread, stat: Path) -> None:
    """A machine without /proc, a thread that has ended."""
    ended = threading.Thread(target=int)
    ended.start()
    ended.join()
    assert not stat.exists()

    Core().gather([ended, thread])

    assert where(thread) == {ALLOWED[0]}
