"""The timetable: which step runs how often. The only user of APScheduler, and only its clock.

Nothing that must happen once is decided by a timer: a step that runs late, twice, or in several
workers at a time finds in the database what there is to do.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from apscheduler.events import EVENT_JOB_ERROR, EVENT_JOB_MAX_INSTANCES, EVENT_JOB_MISSED, JobEvent
from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.jobstores.base import JobLookupError
from apscheduler.jobstores.memory import MemoryJobStore
from apscheduler.schedulers.background import BackgroundScheduler

_log = logging.getLogger(__name__)

_THREADS = 4


@dataclass(frozen=True, slots=True)
class Job:
    """One step and its interval; it runs first at the start."""

    name: str
    step: Callable[[], object]
    every: timedelta


class SteadyJobs(MemoryJobStore):  # type: ignore[misc]
    """Jobs that no step of the machine's clock puts off.

    The library plans by the time of day: after a step back it would wait for that time to come again, after
    a step forward count up every run that it thinks it has missed.
    """

    def get_due_jobs(self, now: datetime) -> list[Any]:
        """Return what is due; a job that is further away than its interval, either way, was moved there."""
        for job in self.get_all_jobs():
            if abs(job.next_run_time - now) > job.trigger.interval:
                job.next_run_time = now
                self.update_job(job)
        return super().get_due_jobs(now)  # type: ignore[no-any-return]


class _SteadyScheduler(BackgroundScheduler):  # type: ignore[misc]
    """Looks at its jobs at least as often as the most frequent one runs."""

    def __init__(self, longest_wait: timedelta, **options: Any) -> None:
        super().__init__(jobstores={"default": SteadyJobs()}, **options)
        self._longest_wait = longest_wait.total_seconds()

    def _process_jobs(self) -> float:
        """Start what is due, and return for how many seconds to wait by the monotonic clock."""
        # Reckoned by the time of day once more, which may just have been stepped back; None when stopped.
        wait: float | None = super()._process_jobs()
        return self._longest_wait if wait is None else min(wait, self._longest_wait)


class Timetable:
    """Runs jobs until stopped; one that is still running is not started again."""

    def __init__(self, jobs: list[Job]) -> None:
        self.errors: dict[str, int] = {job.name: 0 for job in jobs}
        """How often each job ended with an exception."""
        self._scheduler = _SteadyScheduler(
            min(job.every for job in jobs),
            timezone=UTC,
            executors={"default": ThreadPoolExecutor(_THREADS)},
            # The library's own default drops a job that is a second late.
            job_defaults={"misfire_grace_time": None, "coalesce": True, "max_instances": 1},
        )
        self._scheduler.add_listener(self._note, EVENT_JOB_ERROR | EVENT_JOB_MISSED | EVENT_JOB_MAX_INSTANCES)
        for job in jobs:
            self._scheduler.add_job(
                job.step, "interval", seconds=job.every.total_seconds(), id=job.name, next_run_time=datetime.now(UTC)
            )

    def start(self) -> None:
        """Start the clock."""
        # Its own loggers would say in several lines what `_note` says in one.
        logging.getLogger("apscheduler").setLevel(logging.CRITICAL)
        self._scheduler.start()

    def stop(self) -> None:
        """Start nothing more, and wait for what runs; harmless if it was never started."""
        if self._scheduler.running:
            self._scheduler.shutdown(wait=True)

    def run_soon(self, name: str, within: timedelta = timedelta(0)) -> None:
        """Run a job `within` this at most, without waiting for its time, however often it is asked for meanwhile.

        Not while stopping.
        """
        at = datetime.now(UTC) + within
        with suppress(JobLookupError):  # it is ending, and forgets its jobs before the last of them is done
            job = self._scheduler.get_job(name)
            if job is not None and job.next_run_time > at:
                job.modify(next_run_time=at)

    def _note(self, event: JobEvent) -> None:
        if event.code == EVENT_JOB_ERROR:
            self.errors[event.job_id] = self.errors.get(event.job_id, 0) + 1
            _log.error("step.failed", extra={"step": event.job_id, "error": str(event.exception)})
        elif event.code == EVENT_JOB_MISSED:
            _log.warning("step.missed", extra={"step": event.job_id})
        else:
            _log.debug("step.still_running", extra={"step": event.job_id})
