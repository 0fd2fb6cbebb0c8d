"""The node of a worker's own machine: the agent in a thread beside the rest, for `run` and for `renew`."""

import logging
import threading
from collections.abc import Callable
from datetime import timedelta

from certworker.core.rollout import Cursor
from certworker.errors import CertworkerError
from certworker.node.agent import Agent

_log = logging.getLogger(__name__)

_LOOK = timedelta(seconds=5)
"""How often it looks for what nobody announced."""
_STEP = timedelta(seconds=8)
"""How long a stop waits for a step."""


class EmbeddedNode:
    """The agent of this machine's proxy, in a thread of its own."""

    def __init__(self, agent: Agent, proved: Callable[[], object]) -> None:
        """Run `agent`; `proved` is called when it has proved certificates that it had not before."""
        self._agent = agent
        self._proved = proved
        self._cursor: Cursor | None = None
        self._answers = False
        self._wake = threading.Event()
        self._stopping = False
        self._said: str | None = None
        self._found_serving = agent.serving
        self._thread = threading.Thread(target=self._run, name="node", daemon=True)

    def start(self) -> None:
        """Take the first step here, so that the listeners are up before the first challenge; then go on."""
        self._step()
        self._thread.start()

    @property
    def answers(self) -> bool:
        """Whether the proxy serves a version, and with it the challenge route; true while there is none to serve."""
        return self._answers

    def poke(self) -> None:
        """Look now."""
        self._wake.set()

    def stop(self, *, as_found: bool = False) -> None:
        """End the thread and the proxy that it manages; `as_found` lets one run on that ran before the start."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(_STEP.total_seconds())
        if self._thread.is_alive():
            # Its step would start the proxy again behind our back: leave both as they are.
            _log.warning("node.still_busy")
            return
        if not (as_found and self._found_serving):
            self._agent.stop()
        self._agent.close()

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait(_LOOK.total_seconds())
            self._wake.clear()
            if not self._stopping:
                self._step()

    def _step(self) -> None:
        try:
            heartbeat = self._agent.step()
            error = heartbeat.error
            self._answers = heartbeat.version_id is not None or error is None
            if heartbeat.cursor != self._cursor:
                self._proved()
            self._cursor = heartbeat.cursor
        except CertworkerError as fault:
            error = str(fault)
        except Exception as fault:  # noqa: BLE001 - the thread must outlive what it met
            _log.exception("node.bug")
            error = repr(fault)
        if error != self._said:
            self._said = error
            if error is not None:
                _log.error("node.trouble", extra={"error": error})
