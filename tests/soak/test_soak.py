"""A short soak: a storm that is always the same, then one that never was."""

import secrets
from datetime import timedelta
from pathlib import Path

import pytest

from .run import Plan, soak

SEED = 20260301


@pytest.mark.pebble
@pytest.mark.proxy
@pytest.mark.timeout(480)
def test_two_minutes_of_everything(tmp_path: Path) -> None:
    """Four workers on PostgreSQL: nothing lost, nothing twice, nothing told, nothing stuck, no gap."""
    other = secrets.randbelow(10**6)
    print(f"seeds {SEED} and {other}: repeat with python -m tests.soak --seed")
    plan = Plan(seconds=125, seeds=(SEED, other), names=40, life=timedelta(seconds=150))
    outcome = soak(plan, tmp_path)
    print("\n".join(outcome.lines()))

    assert outcome.faults == []
    assert outcome.struck["SIGKILL"] > 0
    assert int(str(outcome.figures["renewals"])) > 0
