"""Ctrl-C during the demo: it ends everything that was started, and is obeyed once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Turns the first signal into KeyboardInterrupt, between enter and exit."""

    def __init__(self) -> None:
        self._held = 0
        self._pending = False
        self._over = False

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._arrived) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let a signal wait: a process that was started must be known before anything can end the demo."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self._pending:
            self._raise()

    def ignore(self) -> None:
        """From now on nothing disturbs the end, which takes a bounded time."""
        self._over = True

    def _arrived(self, _number: int, _frame: object) -> None:
        if self._held:
            self._pending = True
        else:
            self._raise()

    def _raise(self) -> None:
        if not self._over:
            self._over = True
            raise KeyboardInterrupt
