"""What a command imports: its start is time that nobody gets a certificate in."""

import subprocess
import sys

import pytest

NEVER = {"requests", "acme", "josepy", "alembic", "fastapi", "uvicorn", "apscheduler", "prometheus_client"}
FOR_SOME = {
    "dns", "psycopg", "sqlalchemy.dialects.postgresql", "structlog", "rich",
    "certworker.node", "certworker.outpost", "certworker.render",
}  # fmt: skip
"""Hints about a failure, PostgreSQL, a line of the log, a table on the terminal, an embedded node."""
FOR_GATEWAYS = {"certworker.core.snapshot"}


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("renew", FOR_SOME | FOR_GATEWAYS),
        ("account", FOR_SOME | FOR_GATEWAYS),
        ("status", FOR_SOME),
        ("policy", FOR_SOME),
    ],
)
def test_a_command_loads_what_it_needs(module: str, without: set[str]) -> None:
    """Libraries that other commands, databases and roles need come when they are needed."""
    code = f"import sys, certworker.cli.main, certworker.cli.{module}; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()

    assert not (NEVER | without) & set(loaded)
