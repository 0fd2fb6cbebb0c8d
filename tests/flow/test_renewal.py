"""Renewals as an operator sees them: when the CA says, and of what can still be had."""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from certworker.cli.pebble import Pebble

from .box import Box, until

pytestmark = [pytest.mark.pebble, pytest.mark.proxy]

PAST = '{"suggestedWindow": {"start": "2020-01-01T00:00:00Z", "end": "2020-01-02T00:00:00Z"}, "explanationURL": %s}'
WHY = "https://ca.example/why"


def ask_again(box: Box) -> None:
    """Let the time come at which the CA wants to be asked again."""
    with sqlite3.connect(box.folder / "data" / "certworker.db", timeout=10) as db:
        db.execute("UPDATE lineages SET ari_check_at = '2026-01-01T00:00:00.000000Z'")
    db.close()


def test_a_window_is_asked_for_right_away_and_obeyed_when_it_moves(
    folder: Path, start_pebble: Callable[..., Pebble]
) -> None:
    """The CA moves it into the past, as for a certificate that it is about to revoke: replaced at once, and said so."""
    ca = start_pebble(nonce_reject=0)
    box = Box.make(folder, ca, SCAN_INTERVAL_SECS="1")
    box.configure("app.example.com")

    with box.service():
        first = until(lambda: informed(box))
        assert first["renew_at"] <= first["expires_at"]
        pem = certificate(box)
        ca.management("/set-renewal-info/", {"Certificate": pem, "ARIResponse": PAST % f'"{WHY}"'})
        ask_again(box)
        until(lambda: box.lineage("app.example.com")["serial"] != first["serial"])
        second = until(lambda: informed(box))

    (moved,) = [line for line in box.log() if line["event"] == "ari.window_moved"]
    assert moved["explanation"] == WHY
    # The stale window is not the new certificate's.
    assert second["suggested_window"]["start"] > "2026"
    assert second["issuance"] is None
    with sqlite3.connect(box.folder / "data" / "certworker.db") as db:
        rows = db.execute("SELECT reason, replaces IS NOT NULL FROM issuances ORDER BY created_at").fetchall()
    db.close()
    assert rows == [("first", 0), ("ca_suggested", 1)]
    assert len(ca.ledger()) == 2


def test_renew_by_itself_asks_about_what_earlier_runs_got(folder: Path, start_pebble: Callable[..., Pebble]) -> None:
    """Not about what it has just got: nobody has to know that before the next run, and it would wait for it."""
    box = Box.make(folder, start_pebble(nonce_reject=0))
    box.configure("app.example.com")

    assert box.json("renew")["renewed"]
    assert informed(box) is None
    assert box.json("renew")["renewed"] == []
    assert informed(box) is not None


def informed(box: Box) -> dict[str, Any] | None:
    """Return the lineage when the CA has said when to renew its certificate."""
    found = box.json("status")["lineages"]
    return dict(found[0]) if found and found[0]["suggested_window"] else None


def certificate(box: Box) -> str:
    with sqlite3.connect(box.folder / "data" / "certworker.db") as db:
        (pem,) = db.execute("SELECT cert_pem FROM certificates").fetchone()
    db.close()
    return str(pem)


def test_a_dead_name_of_a_shared_certificate_is_told_and_comes_back(
    folder: Path, start_pebble: Callable[..., Pebble]
) -> None:
    """`renew` gets the others theirs and ends with 1; when the name lives again, `renew NAME` gets them all one."""
    ca = start_pebble(nonce_reject=0)
    ca.challtest("set-servfail", {"host": "dead.example.com"})
    box = Box.make(folder, ca)
    box.configure()
    box.run("policy", "add", "a.example.com", "dead.example.com", "--shared")

    done = box.json("renew", expect=1)
    (renewed,) = done["renewed"]
    assert (renewed["name"], renewed["left_out"], done["failed"]) == ("a.example.com", ["dead.example.com"], [])
    lineage = box.lineage("dead.example.com")
    (left_out,) = lineage["left_out"]
    assert left_out["error"]["class"] == "validation"
    assert policy_status(box) == "error"
    assert "without dead.example.com: the CA could not reach" in box.run("status").stdout

    ca.challtest("clear-servfail", {"host": "dead.example.com"})
    (both,) = box.json("renew", "dead.example.com")["renewed"]
    assert "left_out" not in both
    assert policy_status(box) == "active"
    assert box.lineage("a.example.com")["left_out"] == []


def policy_status(box: Box) -> Any:
    (policy,) = box.json("status")["policies"]
    return policy["status"]
