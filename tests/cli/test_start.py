"""What a command imports: its start is time that nobody gets a certificate in."""

import subprocess
import sys

import pytest

from .conftest import Cli

NEVER = {"requests", "acme", "josepy", "alembic", "fastapi", "uvicorn", "apscheduler", "prometheus_client"}
FOR_SOME = {
    "dns", "psycopg", "sqlalchemy.dialects.postgresql", "structlog", "rich",
    "certworker.node", "certworker.outpost", "certworker.render",
}  # fmt: skip
"""Hints about a failure, PostgreSQL, a line of the log, a table on the terminal, an embedded node."""
OF_THE_SERVICE = {"fastapi", "uvicorn", "apscheduler", "prometheus_client", "certworker.node", "certworker.render"}
FOR_GATEWAYS = {"certworker.core.snapshot"}


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("renew", NEVER | FOR_SOME | FOR_GATEWAYS),
        ("account", NEVER | FOR_SOME | FOR_GATEWAYS),
        ("status", NEVER | FOR_SOME),
        ("policy", NEVER | FOR_SOME),
        ("run", (NEVER | FOR_SOME) - OF_THE_SERVICE),
    ],
)
def test_a_command_loads_what_it_needs(module: str, without: set[str]) -> None:
    """Libraries that other commands, databases and roles need come when they are needed."""
    code = f"import sys, certworker.cli.main, certworker.cli.{module}; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()

    assert not without & set(loaded)


def test_a_renew_that_finds_nothing_due_loads_no_more(cli: Cli) -> None:
    """What comes late comes when it is needed, not with the first statement."""
    code = "import sys; from certworker.cli.main import run; run(['renew']); print(*sys.modules)"
    said = subprocess.check_output([sys.executable, "-c", code], text=True)

    assert said.startswith("0 renewed")
    assert not (NEVER | FOR_SOME | FOR_GATEWAYS) & set(said.split())
