"""`run`: the service, until SIGTERM or SIGINT."""

import resource
import signal
import threading

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
    asked = threading.Event()
    interrupted: list[int] = []

    def stop(number: int, _frame: object) -> None:
        interrupted.append(number)
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    app = wiring.open_app(settings)
    try:
        service = Service(app)
        service.start()
        asked.wait()
        service.stop()
    finally:
        app.close()
    return 130 if interrupted and interrupted[0] == signal.SIGINT else 0


def _set_limits() -> None:
    """Keys are in memory, so no core dump; a thousand CA connections want more files than a shell's usual limit."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
