"""Where waiting nodes are told that there is something new.

One look at the database for all of them, every second at most and at once when somebody pokes. Who waits
holds a coroutine: no thread, and no connection to the database.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import timedelta

from certworker.core.delivery import Standing
from certworker.errors import StoreError

LOOK = timedelta(seconds=1)
"""What nobody announced (another worker's doing, an outage of LISTEN) is seen after so long."""

_log = logging.getLogger(__name__)


class Board:
    """The newest `Standing`, and who waits for a newer one. Everything but `poke` belongs to one event loop."""

    def __init__(self, look: Callable[[], Awaitable[Standing]]) -> None:
        self._look = look
        self._standing: Standing | None = None
        self._changed = asyncio.Event()
        self._poked = asyncio.Event()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None

    @asynccontextmanager
    async def kept_up_to_date(self) -> AsyncIterator[None]:
        """Look again and again while the context lasts."""
        self._loop = asyncio.get_running_loop()
        looking = asyncio.create_task(self._keep_looking())
        try:
            yield
        finally:
            looking.cancel()

    def poke(self) -> None:
        """Look now. From any thread."""
        self._call(self._poked.set)

    def close(self) -> None:
        """Let nobody wait any more. From any thread."""
        self._call(self._close)

    async def wait(self, is_news: Callable[[Standing], bool], limit: timedelta) -> None:
        """Return when there is news, `limit` is over, or the board is closed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(limit.total_seconds()):
                while not self._closed and (self._standing is None or not is_news(self._standing)):
                    await self._changed.wait()

    def _call(self, what: Callable[[], None]) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended, and everybody's wait with it
                self._loop.call_soon_threadsafe(what)

    def _close(self) -> None:
        self._closed = True
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _keep_looking(self) -> None:
        while True:
            self._poked.clear()
            try:
                standing = await self._look()
            except StoreError as error:
                _log.warning("node_api.no_look", extra={"error": str(error)})
            except Exception:  # noqa: BLE001 - who waits must be told of the next news all the same
                _log.exception("node_api.bug")
            else:
                if standing != self._standing:
                    self._standing = standing
                    self._tell()
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK.total_seconds()):
                    await self._poked.wait()
