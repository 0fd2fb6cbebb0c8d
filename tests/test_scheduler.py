"""The timetable: a clock and nothing more."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest

from certworker.scheduler import Job, Timetable


@contextmanager
def running(*jobs: Job) -> Iterator[Timetable]:
    timetable = Timetable(list(jobs))
    timetable.start()
    try:
        yield timetable
    finally:
        timetable.stop()


def test_a_job_runs_at_once_and_again() -> None:
    """The first run is at the start, not one interval later."""
    ran = threading.Semaphore(0)
    with running(Job("tick", ran.release, timedelta(milliseconds=20))):
        for _ in range(3):
            assert ran.acquire(timeout=10)


def test_a_failing_job_is_counted_logged_and_run_again(caplog: pytest.LogCaptureFixture) -> None:
    """An exception ends one run, not the timetable."""
    ran = threading.Semaphore(0)

    def fail() -> None:
        ran.release()
        raise ZeroDivisionError("planned")

    with caplog.at_level(logging.ERROR), running(Job("bad", fail, timedelta(milliseconds=20))) as timetable:
        for _ in range(3):
            assert ran.acquire(timeout=10)

    assert timetable.errors["bad"] >= 2
    assert any(record.message == "step.failed" for record in caplog.records)


def test_a_slow_job_is_not_started_twice_and_delays_no_other() -> None:
    """One instance at a time; the others go on meanwhile."""
    inside, most, release, ticks = [0], [0], threading.Event(), threading.Semaphore(0)

    def slow() -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        release.wait(10)
        inside[0] -= 1

    with running(Job("slow", slow, timedelta(milliseconds=10)), Job("tick", ticks.release, timedelta(milliseconds=10))):
        for _ in range(10):
            assert ticks.acquire(timeout=10)
        release.set()

    assert most == [1]


def test_a_late_job_is_not_dropped() -> None:
    """The library's own default drops what is a second late; a full pool must only delay it."""
    release, late = threading.Event(), threading.Event()
    blockers = [Job(f"block-{n}", lambda: release.wait(10), timedelta(hours=1)) for n in range(4)]
    with running(*blockers, Job("late", late.set, timedelta(hours=1))):
        threading.Timer(1.5, release.set).start()

        assert late.wait(10)


def test_stop_waits_for_what_runs() -> None:
    """A step is never cut in the middle."""
    started, done = threading.Event(), []

    def step() -> None:
        started.set()
        threading.Event().wait(0.2)
        done.append(True)

    with running(Job("step", step, timedelta(hours=1))):
        assert started.wait(10)

    assert done == [True]


def test_run_soon_does_not_wait_for_the_time() -> None:
    """Used when something is known to have changed."""
    ran = threading.Semaphore(0)
    with running(Job("rare", ran.release, timedelta(hours=1))) as timetable:
        assert ran.acquire(timeout=10)
        timetable.run_soon("rare")

        assert ran.acquire(timeout=10)
