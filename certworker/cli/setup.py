"""`init` and `db`: from nothing to a database that fits, and from an old one to a new one."""

from datetime import datetime
from pathlib import Path

import click

from certworker import wiring
from certworker.cli.main import settings_of
from certworker.cli.output import json_option, print_json
from certworker.clock import system_clock
from certworker.errors import SettingsError
from certworker.settings import Settings
from certworker.store import audit, counters, schema
from certworker.store.database import Transaction, open_database, schema_revision, sqlite_path
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
    """The database: bring its schema up to date, check that it fits, say that it was restored."""


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


@db.command()
@click.pass_context
def restored(ctx: click.Context) -> None:
    """Say that the database was restored from a backup, before the first start: nodes may know more than it does."""
    app = wiring.open_app(settings_of(ctx))
    try:
        epoch = app.db.write(lambda tx: _start_over(tx, app.clock()))
    finally:
        app.close()
    click.echo(f"epoch {epoch}: every node compares what it holds with this database")


def _start_over(tx: Transaction, now: datetime) -> int:
    epoch = counters.start_over(tx, now)
    audit.record(tx, "database.restored", {"epoch": epoch}, now, actor=wiring.operator())
    return epoch


def _existing(settings: Settings) -> Path | None:
    """Return the database's file, None on PostgreSQL; what is not there is not made by the way."""
    path = sqlite_path(settings.database_url)
    if path is not None and not path.exists():
        raise SettingsError(f"there is no database {path} yet: run `certworker init`, or check DATA_DIR")
    return path
