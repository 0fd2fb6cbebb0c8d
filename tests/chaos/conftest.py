"""A Pebble for each module, a fault proxy and a rig for each test; at the end the table of what was killed."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from certworker.cli.pebble import Pebble, free_ports
from tests.conftest import PostgresServer

from .pgproxy import PostgresProxy
from .proxy import FaultProxy
from .worker import Rig, copy_sqlite, rigged


@pytest.fixture(scope="module")
def ca() -> Iterator[Pebble]:
    """A Pebble that refuses no nonce and reuses no authorization: what is counted is what was caused."""
    with Pebble(nonce_reject=0, authz_reuse=0) as ca:
        yield ca


@pytest.fixture
def proxy(ca: Pebble, tmp_path: Path) -> Iterator[FaultProxy]:
    """A fault proxy before the CA, without any rule yet."""
    with FaultProxy(ca, tmp_path / "proxy") as proxy:
        yield proxy


@pytest.fixture
def postgresql_copy(postgresql: PostgresServer, postgresql_template: str) -> Iterator[str]:
    """The URL of a PostgreSQL database of this test's own with the newest schema."""
    name = postgresql.create_database(postgresql_template)
    yield postgresql.url(name)
    postgresql.drop_database(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def rig(request: pytest.FixtureRequest, ca: Pebble, proxy: FaultProxy) -> Iterator[Rig]:
    """A worker that is not started yet, on both databases, one after the other.

    `-haproxy` gives it a node, `-guarded` a proxy of its own before PostgreSQL.
    """
    database, _, extra = request.param.partition("-")
    with ExitStack() as stack:
        # Short, for the sockets of a node.
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="cw-chaos-")))
        settings, guard = {}, None
        if extra == "haproxy":
            settings = {"EMBEDDED_NODE": "haproxy", "RESPONDER_LISTEN": f"127.0.0.1:{free_ports(1)[0]}"}
        if database == "sqlite":
            url = copy_sqlite(request.getfixturevalue("sqlite_template"), folder)
        else:
            url = request.getfixturevalue("postgresql_copy")
        if extra == "guarded":
            server: PostgresServer = request.getfixturevalue("postgresql")
            guard = stack.enter_context(PostgresProxy(server.port))
            settings = {"DATABASE_URL": url.replace(f":{server.port}/", f":{guard.port}/")}
        yield stack.enter_context(rigged(ca, proxy, folder, url, guard, **settings))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what the tests recorded as a kill: one line for each."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    killed = [dict(value) for report in reports for name, value in report.user_properties if name == "kill"]
    if not killed:
        return
    killed.sort(key=lambda one: (one["point"], one["database"]))
    columns = {name: max(len(name), *(len(str(one[name])) for one in killed)) for name in killed[0]}
    terminalreporter.section("killed and started again")
    terminalreporter.line("  ".join(name.ljust(width) for name, width in columns.items()))
    for one in killed:
        terminalreporter.line("  ".join(str(one[name]).ljust(width) for name, width in columns.items()))
