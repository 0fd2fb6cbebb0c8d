"""An agent in motion on a gateway machine: step, wait for news, step again, until it is stopped.

While the control plane is away the proxy serves on, and is looked after with every try.
"""

import logging
import random
import threading
from datetime import timedelta

from certworker.core.rollout import Heartbeat
from certworker.errors import CertworkerError
from certworker.node.agent import Agent
from certworker.node.remote import RemoteSource

FIRST_PAUSE, LONGEST_PAUSE = timedelta(seconds=1), timedelta(seconds=15)
"""After a failure, and after many in a row; twice as long each time, and half of it by chance: a fleet must
not come back in step."""

_log = logging.getLogger(__name__)


class Loop:
    """Runs an agent until `stop`, whatever it meets."""

    def __init__(self, agent: Agent, source: RemoteSource, chance: random.Random) -> None:
        self._agent = agent
        self._source = source
        self._chance = chance
        self._stopping = threading.Event()
        self._failures = 0
        self._said: str | None = None
        self._served: tuple[str | None, int] | None = None

    def run(self) -> None:
        """Step until `stop` is called from another thread."""
        while not self._stopping.is_set():
            self._stopping.wait(self._turn().total_seconds())

    def stop(self) -> None:
        """Let the step under way be the last one."""
        self._stopping.set()

    def _turn(self) -> timedelta:
        """Take one step, wait for news, and return how long to pause before the next one."""
        try:
            heartbeat = self._agent.step()
            self._failures = 0
            self._note(heartbeat)
            if heartbeat.error is not None:
                return self._source.heartbeat_every  # the same news would come back at once
            self._source.wait(heartbeat.cursor)
        except CertworkerError as error:
            return self._pause(str(error))
        except Exception as error:  # noqa: BLE001 - the loop must outlive what it met
            _log.exception("agent.bug")
            return self._pause(repr(error))
        return timedelta()

    def _pause(self, trouble: str) -> timedelta:
        self._say(trouble)
        longest: timedelta = min(LONGEST_PAUSE, FIRST_PAUSE * 2**self._failures)
        self._failures = min(self._failures + 1, 10)
        return longest * self._chance.uniform(0.5, 1)

    def _note(self, heartbeat: Heartbeat) -> None:
        self._say(heartbeat.error)
        served = (heartbeat.version_id, heartbeat.cursor.revision)
        if served != self._served:
            self._served = served
            serves = {"version": heartbeat.version_number, "revision": heartbeat.cursor.revision}
            _log.info("agent.serves", extra=serves)

    def _say(self, trouble: str | None) -> None:
        """Log what is wrong once, and once that it is not any more."""
        if trouble == self._said or self._stopping.is_set():
            return
        if trouble is None:
            _log.info("agent.well")
        else:
            _log.error("agent.trouble", extra={"error": trouble})
        self._said = trouble
