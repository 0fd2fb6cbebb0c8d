"""HAProxy's sockets: one command per connection, an answer within a time limit.

Over the admin socket certificates change without a reload. HAProxy keeps that in memory only, so
the files are written first: a reload, whenever it comes, leads to the same state.

Sources: HAProxy 2.6 management guide §9.3 (`new|set|commit|del ssl cert`, `add|del ssl crt-list`,
`add|set|del map`) and §9.4 (the master's socket).
"""

import re
import socket
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from certworker.errors import CommandRefused
from certworker.render.files import ServedFile

ANSWER_LIMIT = timedelta(seconds=10)

_COMMAND = re.compile(r"[ -:<-~]+")
"""One line without `;`, which would begin a second command."""
_CHUNK = 65536


class RuntimeSocket:
    """One of HAProxy's command sockets."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def ask(self, command: str, payload: str = "", limit: timedelta = ANSWER_LIMIT) -> str:
        """Send one command and return the answer, or raise `CommandRefused` if none comes.

        The payload ends at its first blank line, so it must have none.
        """
        if not _COMMAND.fullmatch(command) or re.search(r"\n\s*\n", payload):
            raise CommandRefused(f"haproxy command {command[:80]!r}: not one line, or a blank line in what follows")
        text = f"{command} <<\n{payload.rstrip()}\n\n" if payload else f"{command}\n"
        try:
            return self._exchange(text.encode("ascii"), limit)
        except OSError as failed:
            raise CommandRefused(f"haproxy socket {self._path}, {command!r}: {failed}") from None

    def _exchange(self, request: bytes, limit: timedelta) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(limit.total_seconds())
            connection.connect(str(self._path))
            connection.sendall(request)
            # Without it, the master's socket keeps the connection open and waits for more.
            connection.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: connection.recv(_CHUNK), b""))
        return answer.decode("utf-8", "replace").strip()

    def _tell(self, command: str, success: str, payload: str = "") -> None:
        answer = self.ask(command, payload)
        if success not in answer:
            raise CommandRefused(f"haproxy command {command!r}: {' '.join(answer.split())[:300] or 'no answer'}")

    def load_certificate(self, file: str, pem: str) -> None:
        """Make the content of `file` known to the running process."""
        self._tell(f"new ssl cert {file}", "New empty certificate store")
        self._tell(f"set ssl cert {file}", "Transaction created", pem)
        self._tell(f"commit ssl cert {file}", "Success!")

    def drop_certificate(self, file: str) -> None:
        """Forget `file`, which no crt-list may name any more."""
        self._tell(f"del ssl cert {file}", "deleted!")

    def add_line(self, crt_list: str, line: ServedFile) -> None:
        """Let a loaded certificate answer the line's names from the next handshake on."""
        self._tell(f"add ssl crt-list {crt_list}", "Success!", f"{line.file} {' '.join(line.dns_names)}")

    def drop_line(self, crt_list: str, file: str) -> None:
        """Take a certificate's only line out of a crt-list."""
        self._tell(f"del ssl crt-list {crt_list} {file}", "deleted")

    def list_lines(self, crt_list: str) -> frozenset[ServedFile]:
        """Return the lines of a crt-list as the running process has them."""
        rows = (row.split() for row in self.ask(f"show ssl crt-list {crt_list}").splitlines())
        return frozenset(ServedFile(row[0], tuple(row[1:])) for row in rows if row and row[0] != "#")

    def change_rows(self, path: str, before: Mapping[str, str], after: Mapping[str, str]) -> None:
        """Bring a map of the running process from one content to another."""
        for key in sorted(before.keys() - after.keys()):
            self._tell_map(f"del map {path} {key}")
        for key, value in sorted(after.items() - before.items()):
            verb = "set" if key in before else "add"
            self._tell_map(f"{verb} map {path} {key} {value}")

    def _tell_map(self, command: str) -> None:
        # Success says nothing.
        if answer := self.ask(command):
            raise CommandRefused(f"haproxy command {command!r}: {' '.join(answer.split())[:300]}")

    def list_rows(self, path: str) -> Mapping[str, str] | None:
        """Return the rows of a map as the running process has them, None if it does not know the map."""
        rows = [row.split() for row in self.ask(f"show map {path}").splitlines()]
        return {row[1]: row[2] for row in rows} if all(len(row) == 3 for row in rows) else None
