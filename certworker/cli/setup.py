"""`init` and `db`: from nothing to a database that fits, and from an old one to a new one."""

from pathlib import Path

import click

from certworker import wiring
from certworker.cli.main import settings_of
from certworker.cli.output import json_option, print_json
from certworker.clock import system_clock
from certworker.errors import SettingsError
from certworker.settings import Settings
from certworker.store import schema
from certworker.store.database import open_database, schema_revision, sqlite_path
from certworker.store.role import WorkerRole


@click.command()
@click.pass_context
def init(ctx: click.Context) -> None:
    """Make data folder, database and key-encryption key; safe to repeat."""
    made = wiring.initialise(settings_of(ctx), schema.upgrade)
    for line in made:
        click.echo(f"made {line}")
    if not made:
        click.echo("nothing to do: everything is there")


@click.group()
def db() -> None:
    """Migrations: bring the schema up to date, check that it fits."""


@db.command()
@click.pass_context
def upgrade(ctx: click.Context) -> None:
    """Bring the schema up to date. On SQLite no worker may run meanwhile."""
    settings = settings_of(ctx)
    path = _existing(settings)
    role = None if path is None else WorkerRole.take(path, system_clock())
    database = open_database(settings.database_url)
    try:
        before, after = schema.upgrade(database)
    finally:
        database.close()
        if role is not None:
            role.give_up()
    click.echo(f"schema {after}" if before == after else f"schema {before or 'empty'} -> {after}")


@db.command()
@json_option
@click.pass_context
def check(ctx: click.Context, as_json: bool) -> int:
    """Say whether the schema is the one this release works with."""
    settings = settings_of(ctx)
    _existing(settings)
    database = open_database(settings.database_url)
    try:
        differences = schema.differences(database)
        revision = database.read(schema_revision)
    finally:
        database.close()
    if as_json:
        print_json({"revision": revision, "fits": not differences, "differences": differences})
    else:
        click.echo(f"schema {revision} fits" if not differences else "\n".join(differences))
    return 1 if differences else 0


def _existing(settings: Settings) -> Path | None:
    """Return the database's file, None on PostgreSQL; what is not there is not made by the way."""
    path = sqlite_path(settings.database_url)
    if path is not None and not path.exists():
        raise SettingsError(f"there is no database {path} yet: run `certworker init`, or check DATA_DIR")
    return path
