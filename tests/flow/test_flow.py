"""The main job, whole: real Pebble, real HAProxy and nginx, the real command line, on both databases."""

import hashlib
import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from certworker.cli.pebble import Pebble

from .box import Box, until

pytestmark = [pytest.mark.pebble, pytest.mark.proxy]


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> dict[str, str]:
    """Settings of either database."""
    if request.param == "sqlite":
        return {}
    return {"DATABASE_URL": request.getfixturevalue("postgresql_database")}


def test_a_policy_row_becomes_a_certificate_that_the_proxy_serves(
    folder: Path, start_pebble: Callable[..., Pebble], database: dict[str, str]
) -> None:
    """Pebble with all its defaults: refused nonces, reused authorizations, random delays, Retry-After."""
    ca = start_pebble(va_sleep=None, retry_after=(1, 2))
    box = Box.make(folder, ca, **database)
    box.configure("shop.flow.test", "www.flow.test")
    with box.upstream(), box.service():
        until(lambda: all(box.served(name) for name in ("shop.flow.test", "www.flow.test")), limit=60)
        status, body, leaf = box.get("shop.flow.test", ca.root_pem())
        shown = box.json("status")
        ready, metrics = box.api("/readyz"), box.api("/metrics")

    assert (status, body) == (200, b"hello from upstream")
    assert hashlib.sha256(leaf).hexdigest() == box.lineage("shop.flow.test")["fingerprint_sha256"]
    assert [policy["status"] for policy in shown["policies"]] == ["active"]
    assert [(node["node_id"], node["live"], node["error"]) for node in shown["nodes"]] == [("box", True, None)]
    assert ready[0] == 200
    assert 'certworker_certificates{status="active"} 2.0' in metrics[1]
    assert len(ca.ledger()) == 2


def test_strict_pebble(folder: Path, start_pebble: Callable[..., Pebble]) -> None:
    """With -strict nothing is sent that RFC 8555 does not have."""
    ca = start_pebble(strict=True)
    box = Box.make(folder, ca)
    box.configure("strict.flow.test")
    with box.service():
        until(lambda: box.served("strict.flow.test"))

    assert len(ca.ledger()) == 1


def test_a_shared_certificate_names_all(folder: Path, start_pebble: Callable[..., Pebble]) -> None:
    """--shared: one order, one certificate, every name served with it."""
    ca = start_pebble()
    box = Box.make(folder, ca)
    box.configure()
    box.run("policy", "add", "a.flow.test", "b.flow.test", "c.flow.test", "--shared")
    with box.upstream(), box.service():
        until(lambda: box.served("b.flow.test"))
        leaves = {box.get(name, ca.root_pem())[2] for name in ("a.flow.test", "b.flow.test", "c.flow.test")}

    assert len(leaves) == 1
    assert len(ca.ledger()) == 1


def test_renew_alone_brings_its_own_responder(
    folder: Path, start_pebble: Callable[..., Pebble], database: dict[str, str]
) -> None:
    """No service runs: one command does it all and leaves nothing running."""
    ca = start_pebble()
    box = Box.make(folder, ca, **database)
    box.configure("alone.flow.test")

    done = box.json("renew")
    again = box.json("renew")

    assert [one["name"] for one in done["renewed"]] == ["alone.flow.test"]
    assert done["renewed"][0]["served"] is True
    assert set(done["renewed"][0]) == {"name", "lineage_id", "serial", "expires_at", "fingerprint_sha256", "served"}
    assert again == {"renewed": [], "failed": [], "waiting": [], "unchanged": 0}
    assert len(ca.ledger()) == 1


def test_renew_alone_with_nginx(folder: Path, start_pebble: Callable[..., Pebble]) -> None:
    """The command starts it, proves by it, and takes it along when it ends."""
    ca = start_pebble()
    box = Box.make(folder, ca, node="nginx")
    box.configure("alone.flow.test")

    assert box.json("renew")["renewed"][0]["served"] is True
    assert not (folder / "data" / "node" / "run" / "nginx.pid").exists()


@pytest.mark.parametrize("node", ["haproxy", "nginx"])
def test_renew_asks_the_service_by_rows(folder: Path, start_pebble: Callable[..., Pebble], node: str) -> None:
    """While the service holds the role, the command waits for it; a forced renewal changes what is served."""
    ca = start_pebble()
    box = Box.make(folder, ca, node=node)
    box.configure("asked.flow.test")
    with box.upstream(), box.service():
        until(lambda: box.served("asked.flow.test"))
        before = box.get("asked.flow.test", ca.root_pem())[2]
        unchanged = box.json("renew", "asked.flow.test")
        forced = box.json("renew", "asked.flow.test", "--force")
        after = box.get("asked.flow.test", ca.root_pem())[2]

    assert unchanged["unchanged"] == 1
    assert forced["renewed"][0]["served"] is True
    assert hashlib.sha256(after).hexdigest() == forced["renewed"][0]["fingerprint_sha256"]
    assert before != after
    assert [line for line in box.log() if line["level"] == "error"] == []


def test_a_row_of_another_program_is_worked_on_while_the_service_runs(
    folder: Path, start_pebble: Callable[..., Pebble]
) -> None:
    """Raw SQL with the given columns alone, one row of it impossible: the good one is served, the bad one told."""
    ca = start_pebble()
    box = Box.make(folder, ca)
    box.configure()
    good, bad = "7a0c0c5e-7a53-4f43-9f53-0a2b8d8f1c11", "7a0c0c5e-7a53-4f43-9f53-0a2b8d8f1c12"
    with box.service():
        until(lambda: box.log() and box.log()[-1]["event"] == "service.started")
        with sqlite3.connect(folder / "data" / "certworker.db", timeout=10) as other:
            for policy_id, names in ((good, ["raw.flow.test"]), (bad, ["a..b"])):
                other.execute(
                    "INSERT INTO tls_policies (id, mode, domains, status, created_at, updated_at) VALUES (?, 'auto', ?,"
                    " 'pending', '2026-11-22T12:00:00.000000Z', '2026-11-22T12:00:00.000000Z')",
                    (policy_id, json.dumps(names)),
                )
        other.close()
        until(lambda: box.status()["lineages"] and box.served("raw.flow.test"))
        statuses = {policy["id"]: policy["status"] for policy in box.json("status")["policies"]}

    assert statuses == {good: "active", bad: "error"}


def test_two_workers_issue_each_certificate_once(
    folder: Path, start_pebble: Callable[..., Pebble], postgresql_database: str
) -> None:
    """PostgreSQL, two services, any responder answers any token: every wanted certificate exactly once."""
    ca = start_pebble()
    box = Box.make(folder, ca, DATABASE_URL=postgresql_database)
    names = [f"n{number}.flow.test" for number in range(20)]
    box.configure(*names)
    other = Box.make(folder, ca, node="none", DATABASE_URL=postgresql_database, DATA_DIR=str(folder / "data"))
    with box.service(name="one"):
        listens = {key: other.environ[f"CERTWORKER_{key}"] for key in ("RESPONDER_LISTEN", "API_LISTEN")}
        with box.service(name="two", EMBEDDED_NODE="none", **listens):
            until(lambda: all(box.served(name) for name in names[:1] + names[-1:]), limit=90)
            until(lambda: all(one["served_at"] for one in box.status()["lineages"]))

    assert len(ca.ledger()) == len(names)
    assert len(box.json("status")["lineages"]) == len(names)


def test_sigterm_in_the_middle_loses_nothing(folder: Path, start_pebble: Callable[..., Pebble]) -> None:
    """Drained while the CA validates; the next start goes on with the same order and the same key."""
    ca = start_pebble(va_sleep=5)
    box = Box.make(folder, ca)
    box.configure("drain.flow.test")
    with box.service() as process:
        until(lambda: any(line["event"] == "issuance.validating" for line in box.log()))
        started = time.monotonic()
        process.terminate()
        assert process.wait(30) == 0
        took = time.monotonic() - started
    assert took < 30

    with box.service():
        until(lambda: box.served("drain.flow.test"), limit=60)

    assert len(ca.ledger()) == 1
    with sqlite3.connect(folder / "data" / "certworker.db") as db:
        assert db.execute("SELECT count(DISTINCT spki_sha256), count(*) FROM issuances").fetchone() == (1, 1)
    db.close()


def test_a_second_service_on_the_same_file_ends_with_3(folder: Path, start_pebble: Callable[..., Pebble]) -> None:
    """It says who holds it; commands that only write rows still work."""
    ca = start_pebble()
    box = Box.make(folder, ca)
    box.configure("held.flow.test")
    with box.service() as process:
        until(lambda: box.log() and any(line["event"] == "service.started" for line in box.log()))
        second = box.run("run", expect=3)
        upgrade = box.run("db", "upgrade", expect=3)
        box.run("policy", "add", "more.flow.test")
        assert f"process {process.pid}" in second.stderr
        assert f"process {process.pid}" in upgrade.stderr


def test_a_change_to_a_shorter_life_is_served(folder: Path, start_pebble: Callable[..., Pebble]) -> None:
    """Another profile is another lineage: its certificate serves although the old one ends later."""
    days = 24 * 3600
    profiles = {
        name: {"description": name, "validityPeriod": life * days} for name, life in (("long", 90), ("short", 6))
    }
    ca = start_pebble(profiles=profiles)
    box = Box.make(folder, ca, ACME_PROFILE="long")
    box.configure("life.flow.test")
    with box.upstream(), box.service(name="long"):
        until(lambda: box.served("life.flow.test"))
        before = box.get("life.flow.test", ca.root_pem())[2]
    box.environ["CERTWORKER_ACME_PROFILE"] = "short"
    with box.upstream(), box.service(name="short"):
        until(lambda: len(ca.ledger()) == 2 and box.served("life.flow.test"))
        after = box.get("life.flow.test", ca.root_pem())[2]
        other = {**box.environ, "CERTWORKER_ACME_PROFILE": "long"}
        box.environ, ours = other, box.environ
        refused = box.run("renew", "--force", expect=2)
        box.environ = ours

    assert before != after
    assert "these settings say" in refused.stderr
    assert len(ca.ledger()) == 2
