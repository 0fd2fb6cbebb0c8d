"""What the tests run against: a real PostgreSQL, Pebble and HAProxy, all on loopback.

A tool that is missing fails the test with the command that installs it; nothing is skipped.
"""

import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from psycopg import sql

from certworker.cli import pebble as pebble_module
from certworker.cli.pebble import Pebble, free_ports
from certworker.store import schema
from certworker.store.database import Database, open_database

# No test fails for a machine that is slow for a moment.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def _own_ports() -> Iterator[None]:
    """A range of ports for each test process: one that is bound late must not be another's meanwhile."""
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    below = [port for port in pebble_module.port_range() if port < FIXED_PORTS]
    share = len(below) // count
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pebble_module, "port_range", lambda: below[number * share : (number + 1) * share])
        yield


FIXED_PORTS = 22_000
"""From here on tests of nodes have ranges of their own (tests/node/conftest.py)."""


@dataclass(frozen=True, slots=True)
class PostgresServer:
    """A PostgreSQL of this test run; every local user may connect, as superuser `postgres`."""

    port: int
    process: subprocess.Popen[bytes]

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def create_database(self, template: str = "template0") -> str:
        """Make a copy of `template`, which nobody may be connected to, and return its name."""
        name = f"test_{uuid4().hex}"
        self._execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}"), name, template)
        return name

    def drop_database(self, name: str) -> None:
        """Remove a database with all its connections."""
        self._execute(sql.SQL("DROP DATABASE {} WITH (FORCE)"), name)

    def _execute(self, statement: sql.SQL, *names: str) -> None:
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(statement.format(*map(sql.Identifier, names)))


@contextmanager
def run_postgres(*options: str) -> Iterator[PostgresServer]:
    """Run a PostgreSQL in a folder of its own, with `options` such as "fsync=on" on top of ours."""
    binaries = postgres_binaries()
    user = "nobody" if os.getuid() == 0 else None  # PostgreSQL refuses to run as root
    # Not pytest's own temporary folder: another user cannot enter it.
    folder = Path(mkdtemp(prefix="certworker-postgres-"))
    try:
        if user:
            os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
        initdb: list[str | Path] = [binaries / "initdb", "-D", folder / "data", "-U", "postgres"]
        initdb += ["--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"]
        subprocess.run(initdb, check=True, capture_output=True, cwd=folder, user=user)
        # The time zone is odd on purpose: a statement that leans on the session's zone fails here.
        ours = ["fsync=off", "synchronous_commit=off", "full_page_writes=off", "timezone=Asia/Kathmandu"]
        ours += ["max_connections=200", "listen_addresses=127.0.0.1", f"unix_socket_directories={folder}"]
        (port,) = free_ports(1)
        command: list[str | Path] = [binaries / "postgres", "-D", folder / "data", "-p", str(port)]
        for option in (*ours, *options):
            command += ["-c", option]
        with (
            (folder / "log").open("wb") as log,
            subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, user=user, process_group=0) as process,
        ):
            try:
                server = PostgresServer(port, process)
                await_postgres(server, folder / "log")
                yield server
            finally:
                process.send_signal(signal.SIGQUIT)
    finally:
        shutil.rmtree(folder)


def await_postgres(server: PostgresServer, log: Path) -> None:
    give_up_at = time.monotonic() + 30
    while True:
        try:
            psycopg.connect(server.url(), connect_timeout=2).close()
        except psycopg.OperationalError as error:
            if server.process.poll() is not None or time.monotonic() > give_up_at:
                raise RuntimeError(f"cannot start PostgreSQL: {log.read_text()}") from error
            time.sleep(0.05)
        else:
            return


def postgres_binaries() -> Path:
    """Return the folder of the newest PostgreSQL server on this machine."""
    packaged = Path("/usr/lib/postgresql").glob("*/bin/postgres")
    newest = max(packaged, key=lambda path: int(path.parts[-3]), default=None)
    found = newest or shutil.which("postgres")
    return Path(found or missing("PostgreSQL's server")).resolve().parent


def missing(tool: str) -> str:
    pytest.fail(f"{tool} is not installed: run `make setup`")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresServer]:
    """One server per test process."""
    with run_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def postgresql_url(postgresql: PostgresServer) -> str:
    """The URL of the server's own database `postgres`, which no test changes."""
    return postgresql.url()


@pytest.fixture
def postgresql_database(postgresql: PostgresServer) -> Iterator[str]:
    """The URL of an empty database of this test's own."""
    name = postgresql.create_database()
    yield postgresql.url(name)
    postgresql.drop_database(name)


@pytest.fixture(scope="session")
def postgresql_template(postgresql: PostgresServer) -> str:
    """The name of a database with the newest schema, to be copied."""
    name = postgresql.create_database()
    migrate(postgresql.url(name))
    return name


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with the newest schema, to be copied."""
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    migrate(f"sqlite:///{path}")
    return path


def migrate(url: str) -> None:
    db = open_database(url)
    try:
        schema.upgrade(db)
    finally:
        db.close()  # nobody may be connected to what is copied


@pytest.fixture
def postgresql_db(postgresql: PostgresServer, postgresql_template: str) -> Iterator[Database]:
    """A PostgreSQL database of this test's own with the newest schema."""
    name = postgresql.create_database(postgresql_template)
    db = open_database(postgresql.url(name))
    yield db
    db.close()
    postgresql.drop_database(name)


@pytest.fixture
def sqlite_db(tmp_path: Path, sqlite_template: Path) -> Iterator[Database]:
    """An SQLite database of this test's own with the newest schema, `certworker.db` in its `tmp_path`."""
    path = tmp_path / "certworker.db"
    shutil.copy(sqlite_template, path)
    db = open_database(f"sqlite:///{path}")
    yield db
    db.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def db(request: pytest.FixtureRequest) -> Database:
    """Both databases, one after the other."""
    database: Database = request.getfixturevalue(f"{request.param}_db")
    return database


@pytest.fixture
def start_pebble(tmp_path: Path) -> Iterator[Callable[..., Pebble]]:
    """Start a Pebble with the options of `certworker.cli.pebble.Pebble`; it stops when the test ends."""
    with ExitStack() as stack:

        def start(**options: Any) -> Pebble:
            folder = tmp_path / f"pebble-{uuid4().hex[:8]}"
            return stack.enter_context(Pebble(**{"workdir": folder, **options}))

        yield start


@pytest.fixture
def pebble(start_pebble: Callable[..., Pebble]) -> Pebble:
    """A Pebble with its own defaults: refused nonces and reused authorizations included."""
    return start_pebble()


@pytest.fixture(scope="session")
def haproxy_bin() -> str:
    """The path of HAProxy."""
    return shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin") or missing("haproxy")


@pytest.fixture(scope="session")
def nginx_bin() -> str:
    """The path of nginx."""
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin") or missing("nginx")


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Give a loopback port that is free now."""
    return lambda: free_ports(1)[0]
