"""What the commands that run for long ask of their process: signals, and limits."""

import ctypes
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from threading import Thread

_log = logging.getLogger(__name__)

_OPEN_FILES = 8192
_M_ARENA_MAX = -8
"""mallopt(3)."""
_ARENAS = 2
_STOP_LIMIT = 28.0
"""Seconds; an orderly stop takes less."""
_ECHO = 1
"""Seconds within which a signal is still the same one: timeout(1) sends it to a process, and again to its group."""


@contextmanager
def stop_signal(limit: float = _STOP_LIMIT) -> Iterator[Callable[[], int]]:
    """Give a function that waits for SIGTERM or SIGINT and returns its number, also of one that came before.

    From then on a second one ends the process at once, and so does a stop that takes longer than `limit` seconds: a
    database that neither answers nor hangs up would hold it for ever. It costs no more than `kill -9` does.

    The interpreter writes the number into a socket. A Python handler that sets an Event would be too late
    for a signal that comes just before the main thread falls asleep in `wait`: it would sleep on.
    """
    reader, writer = socket.socketpair()
    first = SimpleQueue[int]()
    watch = Thread(target=_watch, args=[reader, first.put, limit], name="stop-signal", daemon=True)
    with reader, writer:
        writer.setblocking(False)
        before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
        signal.set_wakeup_fd(writer.fileno())
        watch.start()
        try:
            yield first.get
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            writer.shutdown(socket.SHUT_WR)
            watch.join()


def _watch(signals: socket.socket, hand_over: Callable[[int], object], limit: float) -> None:
    """Hand over the first signal, and see to it that the stop it asks for has an end; return when it is over."""
    if not (number := signals.recv(1)):
        return
    asked_at = time.monotonic()
    hand_over(number[0])
    signals.settimeout(limit)
    try:
        while number := signals.recv(1):
            if time.monotonic() - asked_at > _ECHO:
                os._exit(128 + number[0])
    except TimeoutError:
        _log.error("service.stop_given_up", extra={"seconds": limit})
        os._exit(1)


def share_memory() -> None:
    """Let threads take memory from the same places: call it before they are started.

    glibc gives each thread a place of its own, and each keeps what its busiest moment took: a sixth of all that
    a worker holds. Python's threads hardly ever want memory at the same time. Other C libraries have no such thing.
    """
    with suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _ARENAS)


def set_limits() -> None:
    """Keys are in memory, so no core dump; a thousand CA connections want more files than a shell's usual limit."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
