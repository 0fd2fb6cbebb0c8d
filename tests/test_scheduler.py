"""The timetable: a clock and nothing more."""

import itertools
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, tzinfo

import pytest
from apscheduler.schedulers.background import BackgroundScheduler

from certworker.scheduler import Job, SteadyJobs, Timetable

NOON = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
YEAR = 365 * 24 * 3600


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


def test_what_is_asked_for_again_and_again_runs_once() -> None:
    """A thousand certificates issued in a row are no reason for a thousand passes."""
    ran = threading.Semaphore(0)
    with running(Job("gathers", ran.release, timedelta(hours=1))) as timetable:
        assert ran.acquire(timeout=10)
        job = timetable._scheduler.get_job("gathers")
        timetable.run_soon("gathers", within=timedelta(minutes=1))
        at = job.next_run_time
        timetable.run_soon("gathers", within=timedelta(minutes=2))

        assert job.next_run_time == at
        timetable.run_soon("gathers")

        assert ran.acquire(timeout=10)
        assert not ran.acquire(blocking=False)


class Stepped(datetime):
    """The machine's wall clock, moved by `by`."""

    by = timedelta()

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        return datetime.now(tz) + cls.by


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Stepped]]:
    """The time of day as the library and we see it, to be stepped."""
    # The library asks for it by itself; there is nothing to hand it in by.
    monkeypatch.setattr("apscheduler.schedulers.base.datetime", Stepped)
    monkeypatch.setattr("certworker.scheduler.datetime", Stepped)
    yield Stepped
    Stepped.by = timedelta()


@pytest.mark.parametrize("step", [timedelta(days=-1), timedelta(days=1)])
def test_a_step_of_the_wall_clock_stops_nothing(wall: type[Stepped], step: timedelta) -> None:
    """Not even for a day: what was to run in 20 ms runs in 20 ms."""
    ran = threading.Semaphore(0)
    with running(Job("tick", ran.release, timedelta(milliseconds=20))) as timetable:
        assert ran.acquire(timeout=10)
        wall.by = step
        for _ in range(3):
            assert ran.acquire(timeout=10)
        wall.by = timedelta()
        for _ in range(3):
            assert ran.acquire(timeout=10)
        assert timetable.errors == {"tick": 0}


def test_a_step_back_in_the_middle_of_a_look_stops_nothing(wall: type[Stepped]) -> None:
    """The library asks for the time twice: what is due, and how long until the next."""
    ran, looks = threading.Semaphore(0), itertools.count()

    class SteppedBack(Stepped):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) - timedelta(days=next(looks))

    with running(Job("tick", ran.release, timedelta(milliseconds=20))), pytest.MonkeyPatch.context() as patch:
        patch.setattr("apscheduler.schedulers.base.datetime", SteppedBack)
        for _ in range(5):
            assert ran.acquire(timeout=10)


@pytest.fixture
def jobs() -> Iterator[SteadyJobs]:
    """One job, every two seconds, next at noon."""
    jobs = SteadyJobs()
    scheduler = BackgroundScheduler(timezone=UTC, jobstores={"default": jobs})
    scheduler.start(paused=True)
    scheduler.add_job(lambda: None, "interval", seconds=2, id="often", next_run_time=NOON)
    yield jobs
    scheduler.shutdown()


@pytest.mark.parametrize("seconds", [-50 * YEAR, -3, 0, 3, 50 * YEAR])
def test_what_is_due_is_due_now(jobs: SteadyJobs, seconds: int) -> None:
    """Not at the time that was planned: fifty years of runs are neither waited for nor made up for one by one."""
    now = NOON + timedelta(seconds=seconds)
    (job,) = jobs.get_due_jobs(now)

    assert job.next_run_time == now
    assert jobs.get_next_run_time() == now


@pytest.mark.parametrize(("seconds", "due"), [(-2, 0), (-1, 0), (1, 1), (2, 1)])
def test_a_plan_within_the_interval_stands(jobs: SteadyJobs, seconds: int, due: int) -> None:
    """A job keeps its rhythm while the clock is right, and when a run of it is a little late."""
    found = jobs.get_due_jobs(NOON + timedelta(seconds=seconds))

    assert len(found) == due
    assert jobs.get_next_run_time() == NOON
