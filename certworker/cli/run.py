"""`run`: the service, until SIGTERM or SIGINT."""

import resource
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from certworker import wiring
from certworker.cli.logs import start_logging
from certworker.cli.main import settings_of
from certworker.service import Service

_OPEN_FILES = 8192


@click.command()
@click.pass_context
def run(ctx: click.Context) -> int:
    """The service: scheduler, issuers, responder, API; SIGTERM drains within 30 s."""
    settings = settings_of(ctx)
    start_logging(settings)
    _set_limits()
    with stop_signal() as await_signal:
        app = wiring.open_app(settings)
        try:
            service = Service(app)
            service.start()
            number = await_signal()
            service.stop()
        finally:
            app.close()
    return 130 if number == signal.SIGINT else 0


@contextmanager
def stop_signal() -> Iterator[Callable[[], int]]:
    """Give a function that waits for SIGTERM or SIGINT and returns its number, also of one that came before.

    The interpreter writes the number into a socket. A Python handler that sets an Event would be too late
    for a signal that comes just before the main thread falls asleep in `wait`: it would sleep on.
    """
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
        signal.set_wakeup_fd(writer.fileno())
        try:
            yield lambda: reader.recv(1)[0]
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)


def _set_limits() -> None:
    """Keys are in memory, so no core dump; a thousand CA connections want more files than a shell's usual limit."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
