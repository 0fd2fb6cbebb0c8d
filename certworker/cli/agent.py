"""`agent`: a node on a gateway machine, until SIGTERM or SIGINT. Imports nothing that knows a database."""

import logging
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path

import click

from certworker import outpost
from certworker.cli.logs import start_logging
from certworker.cli.main import settings_of
from certworker.cli.process import set_limits, stop_signal
from certworker.core.transit import EnrolmentToken, read_enrolment_token
from certworker.errors import UsageError
from certworker.outpost import Outpost
from certworker.settings import Settings, read_command

_STEP = timedelta(seconds=15)
"""How long a stop waits for a step of the agent."""
_MOST = 4096

_log = logging.getLogger(__name__)


def _command(_context: click.Context, _option: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    try:
        return None if value is None else read_command(value)
    except ValueError as fault:
        raise click.BadParameter(str(fault)) from None


@click.command()
@click.option("--enroll", "token", metavar="TOKEN", help="Enrol first, once; - reads the token from standard input.")
@click.option(
    "--folder", type=click.Path(file_okay=False, path_type=Path), help="The node's files; default: <DATA_DIR>/agent."
)
@click.option("--proxy", type=click.Choice(["haproxy", "nginx"]), default="haproxy", show_default=True)
@click.option("--reload", callback=_command, metavar="COMMAND", help="The proxy is your own, and reloads by this.")
@click.option("--check", callback=_command, metavar="COMMAND", help="Checks the configuration of your own proxy.")
@click.option("--keep-proxy", is_flag=True, help="Leave the proxy running at the end; the next start takes it over.")
@click.pass_context
def agent(
    ctx: click.Context,
    token: str | None,
    folder: Path | None,
    proxy: str,
    reload: tuple[str, ...] | None,
    check: tuple[str, ...] | None,
    keep_proxy: bool,
) -> int:
    """A node on a gateway machine: takes versions and certificates from NODE_LISTEN of the control plane."""
    settings = _with_commands(settings_of(ctx), reload, check)
    start_logging(settings)
    set_limits()
    with stop_signal() as await_signal:
        running = outpost.make_outpost(settings, folder or settings.data_dir / "agent", proxy, _read(token))
        thread = threading.Thread(target=running.loop.run, name="agent", daemon=True)
        thread.start()
        _log.info("agent.started", extra={"node": running.name})
        number = await_signal()
        _stop(running, thread, keep_proxy=keep_proxy)
    return 130 if number == signal.SIGINT else 0


def _with_commands(settings: Settings, reload: tuple[str, ...] | None, check: tuple[str, ...] | None) -> Settings:
    given = {"proxy_reload": reload or settings.proxy_reload, "proxy_check": check or settings.proxy_check}
    if given["proxy_check"] and not given["proxy_reload"]:
        raise UsageError("--check is for a proxy of your own: say --reload too")
    return settings.model_copy(update=given)


def _read(token: str | None) -> EnrolmentToken | None:
    if token == "-":  # noqa: S105
        token = sys.stdin.read(_MOST)
    return None if token is None else read_enrolment_token(token.strip())


def _stop(running: Outpost, thread: threading.Thread, *, keep_proxy: bool) -> None:
    running.loop.stop()
    running.line.close()
    thread.join(_STEP.total_seconds())
    if thread.is_alive():
        # Its step would start the proxy again behind our back: leave both as they are.
        _log.warning("agent.still_busy")
        return
    if not keep_proxy:
        running.agent.stop()
    running.agent.close()
