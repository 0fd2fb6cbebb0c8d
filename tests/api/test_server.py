"""`/healthz`, `/readyz`, `/metrics` over real HTTP."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection

import pytest

from certworker.api.metrics import Seldom
from certworker.api.server import ApiServer
from certworker.errors import CertworkerError, StoreError

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


@dataclass
class World:
    """Facts that tests set."""

    scanned_at: datetime | None = NOW
    database_down: bool = False
    ca_down: bool = False
    found: dict[str, dict[str, int]] = field(default_factory=lambda: {"certificates": {"active": 3}})

    def now(self) -> datetime:
        return NOW

    def last_scan_at(self) -> datetime | None:
        if self.database_down:
            raise StoreError("cannot read from the database: connection refused")
        return self.scanned_at

    def issuances_in_flight(self) -> int:
        return 7

    def ca_available(self) -> bool:
        return not self.ca_down

    def counts(self) -> Mapping[str, Mapping[str, int]]:
        return self.found

    def overdue(self) -> int:
        return 2

    def publishing(self) -> Mapping[str, int]:
        return {"version": 12, "refused": 0, "left_out": 3, "held": 1}

    def step_errors(self) -> Mapping[str, int]:
        return {"scan": 2}

    def challenge_answers(self) -> Mapping[str, int]:
        return {"answered": 5, "unknown": 1}


@pytest.fixture
def facts() -> World:
    return World()


@pytest.fixture
def get(facts: World, free_port: Callable[[], int]) -> Iterator[Callable[[str], tuple[int, str]]]:
    port = free_port()
    server = ApiServer(f"127.0.0.1:{port}", facts, timedelta(seconds=30))
    server.start()

    def ask(path: str) -> tuple[int, str]:
        connection = HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read().decode()
        connection.close()
        return answer.status, body

    yield ask
    server.stop()


def test_healthy_is_the_process_alone(get: Callable[[str], tuple[int, str]], facts: World) -> None:
    """It answers even when the database does not."""
    facts.database_down = True

    assert get("/healthz") == (200, '{"status":"ok"}')


def test_ready_while_the_scan_runs(get: Callable[[str], tuple[int, str]]) -> None:
    assert get("/readyz")[0] == 200


@pytest.mark.parametrize("scanned_at", [None, NOW - timedelta(minutes=5)], ids=["never", "long-ago"])
def test_not_ready_without_a_scan(
    get: Callable[[str], tuple[int, str]], facts: World, scanned_at: datetime | None
) -> None:
    """A worker whose scan stands still is not ready, and says so."""
    facts.scanned_at = scanned_at
    status, body = get("/readyz")

    assert status == 503
    assert "scan" in json.loads(body)["why"]


def test_not_ready_without_the_database(get: Callable[[str], tuple[int, str]], facts: World) -> None:
    facts.database_down = True
    status, body = get("/readyz")

    assert status == 503
    assert "connection refused" in json.loads(body)["why"]


def test_metrics_show_the_facts(get: Callable[[str], tuple[int, str]]) -> None:
    """In Prometheus' text format."""
    status, body = get("/metrics")

    assert status == 200
    assert "certworker_issuances_in_flight 7.0" in body
    assert "certworker_ca_available 1.0" in body
    assert "certworker_certificates_not_served 2.0" in body
    assert 'certworker_certificates{status="active"} 3.0' in body
    assert "certworker_published_version 12.0" in body
    assert 'certworker_bad_rows{effect="left_out"} 3.0' in body
    assert 'certworker_bad_rows{effect="refused"} 0.0' in body
    assert "certworker_publish_held 1.0" in body
    assert 'certworker_step_errors_total{step="scan"} 2.0' in body
    assert 'certworker_challenge_answers_total{kind="answered"} 5.0' in body
    assert f"certworker_last_scan_timestamp_seconds {NOW.timestamp():.9e}"[:40] in body


def test_what_costs_as_much_as_there_is_is_counted_seldom() -> None:
    """After a hundred times as long as it took; until then the last count stands."""
    now, counted = [0.0], []

    def count() -> dict[str, dict[str, int]]:
        now[0] += 0.5
        counted.append(now[0])
        return {"certificates": {"active": len(counted)}}

    counts = Seldom(count, lambda: now[0])
    found = []
    for moment in (0.0, 15.0, 50.4, 50.5, 60.0, 101.0, 102.0):
        now[0] = moment
        found.append(counts()["certificates"]["active"])

    assert found == [1, 1, 1, 2, 2, 3, 3]


def test_a_count_that_failed_is_made_again() -> None:
    """The database was away: the next scrape asks anew."""
    answers = iter([StoreError("gone"), {"certificates": {"active": 1}}])

    def count() -> Mapping[str, Mapping[str, int]]:
        answer = next(answers)
        if isinstance(answer, StoreError):
            raise answer
        return answer

    counts = Seldom(count)
    with pytest.raises(StoreError):
        counts()

    assert counts() == {"certificates": {"active": 1}}


def test_unknown_paths_are_404(get: Callable[[str], tuple[int, str]]) -> None:
    assert get("/docs")[0] == 404
    assert get("/v1/nodes")[0] == 404


def test_a_taken_port_is_told(facts: World, free_port: Callable[[], int]) -> None:
    """One line with the address and what to do; stop() is harmless afterwards."""
    port = free_port()
    first = ApiServer(f"127.0.0.1:{port}", facts, timedelta(seconds=30))
    second = ApiServer(f"127.0.0.1:{port}", facts, timedelta(seconds=30))
    first.start()
    with pytest.raises(CertworkerError, match=r"API_LISTEN"):
        second.start()
    second.stop()
    first.stop()
    first.stop()
