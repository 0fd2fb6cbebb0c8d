"""`certworker run` as the demo sees it: a process, and the events it logs."""

import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

from certworker.cli.demo.stage import DRAIN_LIMIT, Stage
from certworker.errors import CertworkerError
from certworker.node.runtime import RuntimeSocket

_NAP = 0.5
_WORKER = re.compile(r"^(\d+)\s+worker\s", re.MULTILINE)


class RunningService:
    """The service; the stage ends it if nobody else does."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._changed = threading.Condition()
        self._events: list[dict[str, Any]] = []
        self._over = False
        self._process = stage.spawn("run", stdout=subprocess.DEVNULL)
        threading.Thread(target=self._read, name="service-log", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def position(self) -> int:
        """The number of events so far; `events` goes on from there."""
        return len(self._events)

    def events(self, position: int, limit: float) -> Iterator[dict[str, Any]]:
        """Give every event from `position` on as it comes; CertworkerError after `limit` seconds, or at the end."""
        give_up_at = time.monotonic() + limit
        while True:
            # In short naps: a Ctrl-C that comes just before a long one would be seen only after it.
            while not self._await_event(position, _NAP) and not self._over and time.monotonic() < give_up_at:
                pass
            if len(self._events) <= position:
                why = "ended" if self._over else f"is not as far as it should be after {limit:.0f} s"
                raise CertworkerError(f"the service {why}: {self.last_words()}")
            yield self._events[position]
            position += 1

    def proxy_workers(self) -> frozenset[str]:
        """Return the process ids of HAProxy's workers: a reload makes new ones."""
        master = RuntimeSocket(self._stage.folder / "data" / "node" / "run" / "master.sock")
        return frozenset(_WORKER.findall(master.ask("show proc")))

    def stop(self) -> int:
        """Drain it with SIGTERM and return its exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(DRAIN_LIMIT)
        except subprocess.TimeoutExpired:
            raise CertworkerError(f"the service did not drain in {DRAIN_LIMIT:.0f} s: {self.last_words()}") from None

    def last_words(self) -> str:
        """Return the last lines of its log, for an error message."""
        return (
            " / ".join(str(event.get("raw") or json.dumps(event)) for event in self._events[-3:]) or "it said nothing"
        )

    def _await_event(self, position: int, limit: float) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._over or len(self._events) > position, limit)
            return len(self._events) > position

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines, (self._stage.folder / "service.log").open("w") as log:
            for line in lines:
                log.write(line)
                log.flush()
                self._add(line)
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def _add(self, line: str) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            event = {"event": "", "raw": line.strip()}
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()
