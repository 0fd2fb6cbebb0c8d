"""`run`: the service, until SIGTERM or SIGINT."""

import signal

import click

from certworker import wiring
from certworker.cli.logs import start_logging
from certworker.cli.main import settings_of
from certworker.cli.process import set_limits, share_memory, stop_signal
from certworker.service import Service


@click.command()
@click.pass_context
def run(ctx: click.Context) -> int:
    """The service: scheduler, issuers, responder, API; SIGTERM drains within 30 s."""
    settings = settings_of(ctx)
    start_logging(settings)
    set_limits()
    share_memory()
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
