"""Hears what PostgreSQL notifies, so that a worker need not wait for its next look.

It wakes, and nothing more: a notice may be lost, doubled or made up by somebody else, and whoever is woken
asks the database what there is to do. SQLite has one worker and no notices.
"""

import logging
import random
import select
import socket
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from certworker.store.database import driver_arguments, first_line

if TYPE_CHECKING:
    from psycopg import Connection

_log = logging.getLogger(__name__)

CHANNEL = "certworker"
COUNTERS = "counters"
TABLES = frozenset({"issuances", "changes", COUNTERS})
"""What notices say: a row was inserted here, or a counter raised."""

_FIRST_WAIT, _LONGEST_WAIT = 0.2, 10.0
"""Seconds between two tries to connect; each is twice as long as the one before."""
_END = 1.0
"""How many seconds a stop waits for the thread; one that is still connecting ends by itself."""


class Listener:
    """Calls `on_notice` with the name of a table in which there is something new, from a thread of its own."""

    def __init__(self, database_url: str, on_notice: Callable[[str], object]) -> None:
        """Listen to the PostgreSQL at the SQLAlchemy `database_url`, by a connection outside every pool."""
        self._database_url = database_url
        self._on_notice = on_notice
        self._lost = False
        self._stopping = threading.Event()
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="listener", daemon=True)

    def start(self) -> None:
        """Start to listen; the database may be away."""
        self._thread.start()

    def stop(self) -> None:
        """Call back no more; harmless if it was never started, or twice."""
        self._stopping.set()
        self._wake.close()
        if self._thread.is_alive():
            self._thread.join(_END)
        if not self._thread.is_alive():
            self._woken.close()

    def _run(self) -> None:
        import psycopg  # 9 MiB that a worker on SQLite does without

        wait = _FIRST_WAIT
        while not self._stopping.is_set():
            try:
                with psycopg.connect(**driver_arguments(self._database_url), autocommit=True) as connection:
                    connection.execute(f"LISTEN {CHANNEL}")
                    wait = _FIRST_WAIT
                    self._back()
                    self._listen(connection)
            except Exception as error:  # noqa: BLE001 - whatever it is, the next try may do better
                self._say_lost(error)
                self._stopping.wait(wait * random.uniform(0.5, 1))  # noqa: S311
                wait = min(wait * 2, _LONGEST_WAIT)

    def _back(self) -> None:
        if self._lost:
            self._lost = False
            _log.info("listener.back")
        # Nobody knows what was notified before.
        self._tell(TABLES)

    def _say_lost(self, error: Exception) -> None:
        if not self._lost and not self._stopping.is_set():
            _log.warning("listener.lost", extra={"error": first_line(error)})
        self._lost = True

    def _listen(self, connection: "Connection") -> None:
        poll = select.poll()
        for end in (connection, self._woken):
            poll.register(end, select.POLLIN)
        while not self._stopping.is_set():
            poll.poll()
            # One call for each table, however many were inserted at once.
            self._tell({notice.payload for notice in connection.notifies(timeout=0)} & TABLES)

    def _tell(self, tables: Iterable[str]) -> None:
        for table in tables:
            if self._stopping.is_set():
                return
            try:
                self._on_notice(table)
            except Exception:  # noqa: BLE001 - the thread must outlive what it calls
                _log.exception("listener.bug")
