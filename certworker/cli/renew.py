"""`renew`: one shot."""

import logging
import sys
from datetime import timedelta

import click

from certworker import wiring
from certworker.cli.logs import start_logging
from certworker.cli.main import settings_of
from certworker.cli.output import json_option, print_json
from certworker.cli.process import share_memory
from certworker.oneshot import Renewal, Watcher
from certworker.oneshot import renew as run_renewal
from certworker.steps.renew import Outcome, Ticket
from certworker.steps.session import Session


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME...]")
@click.option("--force", is_flag=True, help="Renew even what is not due.")
@click.option("--dry-run", is_flag=True, help="Only say what would be renewed; asks no CA.")
@click.option(
    "--timeout", type=click.FloatRange(min=0), default=300, show_default=True, metavar="SECS",
    help="After this, what is left is reported as waiting.",
)  # fmt: skip
@json_option
@click.pass_context
def renew(ctx: click.Context, names: tuple[str, ...], force: bool, dry_run: bool, timeout: float, as_json: bool) -> int:
    """One shot: everything due, or the names given; ends when nothing due is left."""
    settings = settings_of(ctx)
    start_logging(settings, at_least=logging.ERROR)
    share_memory()
    app = wiring.open_app(settings)
    try:
        done = run_renewal(
            app, names, force=force, dry_run=dry_run, timeout=timedelta(seconds=timeout), watch=_Progress()
        )
    finally:
        app.close()
    if as_json:
        print_json(done.document())
    else:
        _print(done)
    return 0 if done.succeeded else 1


class _Progress(Watcher):
    """Says on stderr how the work goes; silent when nobody watches."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()

    def moved(self, session: Session) -> None:
        row = session.issuance
        said = f": {row.error['detail']} (again at {row.error['retry_at']})" if row.error else ""
        self._say(f"  {session.lineage.dns_names[0]}  {row.state}{said}")

    def reached(self, ticket: Ticket, state: str) -> None:
        self._say(f"  {ticket.name}  {state}")

    def ended(self, outcome: Outcome) -> None:
        self._say(f"{outcome.ticket.name}  {outcome.result}")

    def _say(self, line: str) -> None:
        if self._shown:
            click.echo(line, err=True)


def _print(done: Renewal) -> None:
    if done.dry_run:
        for name, reason in done.would_renew:
            click.echo(f"would renew {name} ({reason})")
        click.echo(f"{len(done.would_renew)} would be renewed, {done.unchanged} unchanged")
        return
    for one in done.outcomes:
        click.echo(_line(one))
    counts = ", ".join(f"{len(done.of(kind))} {kind}" for kind in ("renewed", "failed", "waiting"))
    click.echo(f"{counts}, {done.unchanged} unchanged")


def _line(one: Outcome) -> str:
    name = ", ".join([name for name in one.ticket.dns_names if name not in one.left_out][:5])
    if one.result == "renewed":
        served = {True: ", served", False: ", not yet served by every node", None: ""}[one.served]
        expires = "" if one.expires_at is None else f", valid until {one.expires_at:%Y-%m-%d %H:%M}Z"
        without = f", without {', '.join(one.left_out)} (see `certworker status`)" if one.left_out else ""
        return f"renewed {name}: serial {one.serial}{expires}{served}{without}"
    if one.error is None:
        return f"{one.result} {name}"
    error = one.error
    again = f"; next attempt {error['retry_at']}" if error.get("retry_at") else ""
    return f"{one.result} {name}: {error['class']}: {error['detail']}; {error.get('hint')}{again}"
