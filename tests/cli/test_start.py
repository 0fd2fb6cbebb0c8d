"""What a command imports: its start is time that nobody gets a certificate in."""

import subprocess
import sys

import pytest

NEVER = {"requests", "acme", "josepy", "alembic", "fastapi", "uvicorn", "apscheduler", "prometheus_client"}
FOR_SOME = {"dns", "psycopg", "certworker.node", "certworker.outpost", "certworker.render"}
"""Hints about a failure, PostgreSQL, an embedded node."""


@pytest.mark.parametrize("module", ["renew", "status", "policy"])
def test_a_command_loads_what_it_needs(module: str) -> None:
    """Libraries that other commands, databases and roles need come when they are needed."""
    code = f"import sys, certworker.cli.main, certworker.cli.{module}; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()

    assert not (NEVER | FOR_SOME) & set(loaded)
