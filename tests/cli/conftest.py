"""The real command line on an embedded database of each test's own."""

import json
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from certworker.cli.main import run
from certworker.cli.pebble import free_ports

COMMANDS: tuple[tuple[str, ...], ...] = (
    ("init",),
    ("db",),
    ("db", "upgrade"),
    ("db", "check"),
    ("db", "restored"),
    ("run",),
    ("renew",),
    ("account",),
    ("account", "list"),
    ("account", "register"),
    ("account", "rollover"),
    ("account", "deactivate"),
    ("policy",),
    ("policy", "add"),
    ("policy", "list"),
    ("policy", "show"),
    ("policy", "pause"),
    ("policy", "resume"),
    ("policy", "remove"),
    ("config",),
    ("config", "apply"),
    ("config", "export"),
    ("config", "diff"),
    ("config", "publish"),
    ("config", "rollback"),
    ("config", "versions"),
    ("node",),
    ("node", "enroll"),
    ("node", "list"),
    ("node", "remove"),
    ("agent",),
    ("status",),
    ("demo",),
)
LIMIT = 30.0


@dataclass(frozen=True, slots=True)
class Done:
    """What one command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def refused(self, code: int, *parts: str) -> None:
        """Hold it to: this exit code, nothing on stdout, one line on stderr that has all the parts."""
        assert self.code == code, self
        assert self.out == ""
        assert self.err.startswith("certworker: "), self.err
        assert self.err.endswith("\n")
        assert self.err[:-1].isprintable(), self.err
        for part in parts:
            assert part in self.err, self.err


class Cli:
    """Runs commands in this process; `start` runs one beside it."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str], stack: ExitStack) -> None:
        self.folder = folder
        self._capture = capture
        self._stack = stack

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def database(self) -> Path:
        return self.data / "certworker.db"

    def __call__(self, *arguments: str) -> Done:
        self._capture.readouterr()
        try:
            code = run(list(arguments))
        finally:
            _end_logging()
        said = self._capture.readouterr()
        return Done(code, said.out, said.err)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        process = self._stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "certworker", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True, process_group=0,
            )
        )  # fmt: skip
        self._stack.callback(lambda: process.poll() is None and process.kill())
        return process

    def start_service(self) -> subprocess.Popen[str]:
        """Start `run`, and return when it says that it works."""
        service = self.start("run")
        assert service.stderr is not None
        said = []
        for line in service.stderr:
            said.append(line)
            if "service.started" in line:
                return service
        pytest.fail(f"the service did not start: {''.join(said)}")

    def sql(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Do what another program may do."""
        with closing(sqlite3.connect(self.database)) as database, database:
            return database.execute(statement, values).fetchall()

    def content(self) -> dict[str, list[tuple[Any, ...]]]:
        """Return every row of every table."""
        tables = [name for (name,) in self.sql("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: self.sql(f'SELECT * FROM "{name}"') for name in tables}

    def audited(self) -> list[str]:
        return [action for (action,) in self.sql("SELECT action FROM audit_logs ORDER BY created_at, id")]


@pytest.fixture(scope="session")
def made_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `init` makes, once: a test gets a copy."""
    folder = tmp_path_factory.mktemp("made")
    made = subprocess.run(
        [sys.executable, "-m", "certworker", "init"], cwd=folder, env=_clean(), capture_output=True, text=True,
        timeout=LIMIT, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return folder / ".certworker"


@pytest.fixture
def bare(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """A command line on an empty folder."""
    for name in set(os.environ) - set(_clean()):
        monkeypatch.delenv(name)
    api, responder = free_ports(2)
    settings = {
        "DATA_DIR": str(tmp_path / "data"), "ACME_PRIVATE_CA": "true", "ACME_DIRECTORY_URL": "https://127.0.0.1:9/dir",
        "API_LISTEN": f"127.0.0.1:{api}", "RESPONDER_LISTEN": f"127.0.0.1:{responder}", "LOG_FORMAT": "json",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(f"CERTWORKER_{name}", value)
    monkeypatch.chdir(tmp_path)
    with ExitStack() as stack:
        yield Cli(tmp_path, capsys, stack)


@pytest.fixture
def cli(bare: Cli, made_data: Path) -> Cli:
    """A command line after `init`."""
    shutil.copytree(made_data, bare.data)
    return bare


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    """Write a file, and return its path."""

    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def _end_logging() -> None:
    """Take back what `start_logging` did to the process: the tests that follow log as if no command had run."""
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler]:
        root.removeHandler(handler)


def _clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("CERTWORKER_")}
