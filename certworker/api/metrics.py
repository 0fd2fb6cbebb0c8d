"""What `/metrics` shows, read from facts when it is asked for.

Kept is only what costs as much as there is: rows by status. A scraper that comes every few seconds would otherwise
keep a database with a million certificates busy.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class Facts(Protocol):
    """Where the figures come from; `service` implements it."""

    def now(self) -> datetime:
        """Return the present instant."""

    def last_scan_at(self) -> datetime | None:
        """Return when a scan last finished; raises StoreError when the database does not answer."""

    def issuances_in_flight(self) -> int:
        """Return how many issuances this worker holds."""

    def ca_available(self) -> bool:
        """Say whether the CA may be asked now."""

    def overdue(self) -> int:
        """Return how many certificates should be served by every live node by now, and are not."""

    def counts(self) -> Mapping[str, Mapping[str, int]]:
        """Return rows by status: `certificates`, `policies`, `open_issuances`."""

    def publishing(self) -> Mapping[str, int]:
        """Return the published version's number (0 for none), rows `refused` and `left_out`, and whether `held`."""

    def step_errors(self) -> Mapping[str, int]:
        """Return how often each step failed."""

    def challenge_answers(self) -> Mapping[str, int]:
        """Return the responder's answers by kind."""


Counts = Mapping[str, Mapping[str, int]]

_REST = 100
"""Times as long as the last count took, the next one waits: one part in a hundred is what counting may cost."""


class Seldom:
    """Counts anew when it is time, and else says what was counted last; any number of threads may ask."""

    def __init__(self, count: Callable[[], Counts], stopwatch: Callable[[], float] = time.monotonic) -> None:
        self._count = count
        self._stopwatch = stopwatch
        self._lock = threading.Lock()
        self._counted: Counts = {}
        self._again_at: float | None = None
        """By the stopwatch; None: nothing was counted yet."""

    def __call__(self) -> Counts:
        with self._lock:
            began = self._stopwatch()
            if self._again_at is None or began >= self._again_at:
                self._counted = self._count()
                ended = self._stopwatch()
                self._again_at = ended + (ended - began) * _REST
            return self._counted


class FactsCollector(Collector):
    """Turns facts into metric families."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._counts = Seldom(facts.counts)

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        in_flight = GaugeMetricFamily("certworker_issuances_in_flight", "Issuances this worker holds")
        in_flight.add_metric([], self._facts.issuances_in_flight())
        yield in_flight
        available = GaugeMetricFamily(
            "certworker_ca_available", "1 if the CA may be asked, 0 while its breaker is open"
        )
        available.add_metric([], int(self._facts.ca_available()))
        yield available
        overdue = GaugeMetricFamily(
            "certworker_certificates_not_served", "Certificates that some live node should serve by now, and does not"
        )
        overdue.add_metric([], self._facts.overdue())
        yield overdue
        for table, by_status in self._counts().items():
            help_text = f"Rows of {table} by status, as counted last: so often that counting takes 1 % of the time"
            family = GaugeMetricFamily(f"certworker_{table}", help_text, labels=["status"])
            for status, count in sorted(by_status.items()):
                family.add_metric([status], count)
            yield family
        yield from _publishing(self._facts.publishing())
        yield _counter("certworker_step_errors", "Steps that ended with an error", "step", self._facts.step_errors())
        answers = self._facts.challenge_answers()
        yield _counter("certworker_challenge_answers", "Answers of the HTTP-01 responder", "kind", answers)
        last = self._facts.last_scan_at()
        scanned = GaugeMetricFamily("certworker_last_scan_timestamp_seconds", "When a scan last finished")
        scanned.add_metric([], 0 if last is None else last.timestamp())
        yield scanned


def _publishing(figures: Mapping[str, int]) -> Iterable[Metric]:
    version = GaugeMetricFamily("certworker_published_version", "Number of the version that nodes are to serve")
    version.add_metric([], figures["version"])
    yield version
    rows = GaugeMetricFamily("certworker_bad_rows", "Rows of the gateway that break a rule", labels=["effect"])
    for effect in ("left_out", "refused"):
        rows.add_metric([effect], figures[effect])
    yield rows
    held = GaugeMetricFamily("certworker_publish_held", "1 while a person's version stands against the rows")
    held.add_metric([], figures["held"])
    yield held


def _counter(name: str, help_text: str, label: str, values: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help_text, labels=[label])
    for value, count in sorted(values.items()):
        family.add_metric([value], count)
    return family
