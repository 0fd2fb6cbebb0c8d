"""`certworker`: the command line.

Exit codes: 0 done or nothing to do, 1 something failed (the rest was done), 2 wrong use or settings,
3 the embedded database is held by another process, 130 interrupted. Commands are imported when they are
called: a short one does not pay for what a long one needs.
"""

import gc
import signal
import sys
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import click

from certworker.errors import CertworkerError

if TYPE_CHECKING:
    from certworker.settings import Settings

_COMMANDS = {
    "init": ("setup", "Make data folder, database and key-encryption key; safe to repeat."),
    "db": ("setup", "The database: migrations, and what follows a restore."),
    "run": ("run", "The service: scheduler, issuers, responder, API; SIGTERM drains within 30 s."),
    "renew": ("renew", "One shot: everything due, or the names given."),
    "policy": ("policy", "TLS policies: which names are wanted."),
    "account": ("account", "ACME accounts: what orders are made with."),
    "config": ("config", "The gateway's tables as one document, and its versions."),
    "node": ("node", "The gateway machines of the fleet."),
    "agent": ("agent", "A node on a gateway machine, until SIGTERM."),
    "status": ("status", "Where everything stands."),
    "demo": ("demo", "The main job on Pebble and HAProxy on this machine."),
}


def _load(module: str) -> ModuleType:
    """Import a command and all that it is made of.

    None of that is ever garbage: to look through it while it is made takes a tenth of a command's start, and later
    again and again.
    """
    if module in sys.modules:
        return sys.modules[module]
    gc.disable()
    try:
        return import_module(module)
    finally:
        gc.freeze()
        gc.enable()


class _Commands(click.Group):
    """A group whose commands live in modules that are imported when they are needed."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, _ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command: click.Command = getattr(_load(f"certworker.cli.{_COMMANDS[name][0]}"), name)
        return command

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="certworker", prog_name="certworker")
@click.option(
    "--config",
    "config_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Settings as TOML; CERTWORKER_<NAME> in the environment wins over it.",
)
@click.pass_context
def cli(ctx: click.Context, config_file: Path | None) -> None:
    """ACME certificate automation for a fleet of reverse proxies."""
    ctx.obj = config_file


def settings_of(ctx: click.Context) -> "Settings":
    """Read the settings for a command."""
    from certworker.settings import load  # has come with the command, see `_load`

    return load(config_file=ctx.find_root().obj)


def main() -> None:
    """Run a command and end the process with its exit code."""
    # A shell that starts it in the background has SIGINT ignored; Ctrl-C and `kill -INT` work all the same.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # What another program wrote may have letters that this terminal has not; stderr is like this already.
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run a command and return its exit code; every known error is one line on stderr."""
    try:
        result = cli.main(arguments, prog_name="certworker", standalone_mode=False)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.exceptions.NoArgsIsHelpError as asked:
        asked.show()
        return 2
    except click.ClickException as error:
        click.echo(f"certworker: {_one_line(error)}", err=True)
        return 2
    except (click.Abort, KeyboardInterrupt):
        return 130
    except CertworkerError as error:
        click.echo(f"certworker: {error}", err=True)
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    return result if isinstance(result, int) else 0


def _one_line(error: click.ClickException) -> str:
    """Return what click says in three lines as one."""
    said = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    command = "certworker" if context is None else context.command_path
    return f"{said[:1].lower()}{said[1:]}; see `{command} --help`"
