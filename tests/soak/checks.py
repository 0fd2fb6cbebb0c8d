"""What must hold for a whole fleet when everything has settled, besides the oracles of `tests.chaos`."""

import re
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from sqlalchemy import select

from certworker.store.database import sqlite_path
from certworker.store.tables import issuances
from tests.chaos.oracles import secrets_of
from tests.chaos.proxy import Exchange
from tests.conftest import postgres_binaries
from tests.test_leaks import Secret

from .fleet import Fleet

# -- O3 -----------------------------------------------------------------------------------------------


def duplicates(fleet: Fleet) -> list[str]:
    """Return the serials that the CA issued and that never served: each wanted certificate is issued once."""
    query = select(issuances.c.serial).where(issuances.c.state == "done")
    served = {int(serial, 16) for serial in fleet.db.read(lambda tx: tx.execute(query).scalars().all())}
    return [issued.serial for issued in fleet.ledger() if int(issued.serial, 16) not in served]


# -- O5 -----------------------------------------------------------------------------------------------

_GRAM, _STRIDE = 8, 16
"""Whatever is at least 23 bytes long has a gram at a multiple of the stride, wherever it stands."""


class Needles:
    """Many secrets, looked for in one pass however many they are."""

    def __init__(self, secrets: list[Secret]) -> None:
        self._of_gram: dict[bytes, Secret] = {}
        """A gram belongs to one secret: eight bytes of two keys are not the same."""
        for secret in secrets:
            for form in secret.forms:
                assert len(form) >= _GRAM + _STRIDE - 1, f"{secret.name}: a form is too short to be found"
                grams = (form[at : at + _GRAM] for at in range(len(form) - _GRAM + 1))
                self._of_gram.update(dict.fromkeys(grams, secret))

    def found_in(self, content: bytes) -> list[str]:
        """Return the names of the secrets that stand in `content`, in any of their forms."""
        # PEM breaks its lines.
        joined = content.replace(b"\n", b"").replace(b"\\n", b"")
        grams = {text[at : at + _GRAM] for text in (content, joined) for at in range(0, len(text), _STRIDE)}
        suspects = {secret.name: secret for secret in map(self._of_gram.get, grams) if secret is not None}
        return [name for name, secret in suspects.items() if secret.is_in(content)]


def leaks(fleet: Fleet) -> list[str]:
    """Return where a secret of this fleet is found: logs, requests and answers, the database, files, /proc."""
    needles = Needles(list(secrets_of(fleet.first)))
    found = []
    for place, content in _places(fleet):
        found += [f"{place}: {name}" for name in needles.found_in(content)]
        found += [f"{place}: PEM of a key"] * (b"PRIVATE KEY" in content)
    return found


def _places(fleet: Fleet) -> Iterator[tuple[str, bytes]]:
    yield "ledger", fleet.ca.log_path.read_bytes()
    yield "requests and answers", b"\n".join(map(_said, list(fleet.proxy.exchanges)))
    yield "database", _dump(fleet.url)
    for rig in fleet.rigs:
        yield str(rig.worker.log_path), rig.worker.said().encode()
        if rig.worker.process is not None:
            yield "command line", rig.worker.command_line().encode()
        for path in Path(rig.box.environ["CERTWORKER_DATA_DIR"]).rglob("*"):
            if path.is_file():
                # By another process: whoever closes a file drops this process's locks on it, those of SQLite too.
                yield str(path), subprocess.run(["cat", path], check=True, capture_output=True).stdout


def _said(exchange: Exchange) -> bytes:
    answer = b"" if exchange.answer is None else exchange.answer.body
    return exchange.body + b"\n" + repr(exchange.payload).encode() + answer


def _dump(url: str) -> bytes:
    path = sqlite_path(url)
    if path is not None:
        with closing(sqlite3.connect(path)) as db:
            return "\n".join(db.iterdump()).encode()
    return subprocess.run([postgres_binaries() / "pg_dump", url], check=True, capture_output=True).stdout


# -- O7, O12 and what the logs say ---------------------------------------------------------------------

_BUGS = re.compile(r'"event": "([a-z]+\.bug|issuance\.refused|issuance\.quarantined|step\.failed)".*')


def bugs(fleet: Fleet) -> list[str]:
    """Return what the workers themselves call a fault of their own."""
    found = [match.group()[:300] for worker in fleet.workers for match in _BUGS.finditer(worker.said())]
    # A step that meets a database that is away is run again.
    return [line for line in found if not (line.startswith('"event": "step.failed"') and "the database" in line)]


def crashes(fleet: Fleet) -> list[str]:
    """Return the tracebacks in the logs: whatever was met is told in one line."""
    return [worker.log_path.parent.name for worker in fleet.workers if "Traceback" in worker.said()]
