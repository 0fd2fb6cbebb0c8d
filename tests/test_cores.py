"""Threads that take turns run on one core, and on another one when that is busier."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from certworker import cores
from certworker.cores import Core


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


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> dict[int, set[int]]:
    """A machine of two cores, and where threads were bound on it, by their number."""
    found: dict[int, set[int]] = {}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(os, "sched_setaffinity", found.__setitem__)
    return found


def idle(stat: Path, first: float, second: float) -> None:
    """Write for how long each core was idle."""
    lines = [f"cpu{core} 0 0 0 {int(seconds * 100)} 0 0 0" for core, seconds in enumerate((first, second))]
    stat.write_text("\n".join(["cpu  1 2 3 4 5", *lines, "intr 1"]))


@pytest.mark.parametrize(("batch", "policy"), [(False, os.SCHED_OTHER), (True, os.SCHED_BATCH)])
def test_one_core_for_these_threads_alone(thread: threading.Thread, *, batch: bool, policy: int) -> None:
    """On the machine as it is; what this process starts otherwise may run anywhere."""
    allowed = os.sched_getaffinity(0)

    Core().gather([thread], batch=batch)

    assert thread.native_id is not None
    assert len(os.sched_getaffinity(thread.native_id) & allowed) == 1
    assert os.sched_getscheduler(thread.native_id) == policy
    assert os.sched_getaffinity(0) == allowed
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_it_moves_when_others_need_the_core(thread: threading.Thread, stat: Path, bound: dict[int, set[int]]) -> None:
    """To the idlest, and not for what it used itself, nor for little."""
    core = Core()
    idle(stat, 10.0, 900.0)
    core.gather([thread])
    idle(stat, 10.001, 900.0)
    core.gather([thread])
    assert list(bound.values()) == [{1}]

    idle(stat, 10_000.0, 900.0)
    core.gather([thread])
    assert list(bound.values()) == [{0}]


@pytest.mark.parametrize("choice", [0, 1])
def test_workers_that_start_together_spread(
    thread: threading.Thread, stat: Path, bound: dict[int, set[int]], choice: int
) -> None:
    """Of cores that are as idle each takes its own, and stays there."""
    idle(stat, 500.0, 500.0)
    core = Core(lambda good: good[choice])
    core.gather([thread])
    core.gather([thread])

    assert list(bound.values()) == [{choice}]


def test_what_cannot_be_read_or_bound_is_left_alone(
    thread: threading.Thread, stat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine without /proc, a thread that has ended, a system without the call."""
    ended = threading.Thread(target=int)
    ended.start()
    ended.join()
    assert not stat.exists()
    Core().gather([ended, thread])

    monkeypatch.delattr(os, "sched_setaffinity")
    Core().gather([thread])
