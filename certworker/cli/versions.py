"""`config diff`, `publish`, `rollback` and `versions`: which configuration the gateway serves, and which it served."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import groupby
from typing import Any

import click

from certworker import wiring
from certworker.cli.main import settings_of
from certworker.cli.output import count, json_option, print_json, print_table
from certworker.core.diff import Change, Value, compare
from certworker.core.gateway import Fault, build
from certworker.core.snapshot import Snapshot, read_snapshot
from certworker.errors import CertworkerError, InputError
from certworker.steps.publish import Published, draft, publish_draft, roll_back
from certworker.steps.publish import publish as publish_rows
from certworker.store import gateway, versions
from certworker.store.database import Transaction
from certworker.store.versions import VersionRow
from certworker.wiring import App

_PUBLISHED, _ROWS = "published", "rows"
_MAX_NUMBER = 2**63 - 1
_SIGNS = {"added": "+", "removed": "-", "changed": "~"}

_Number = click.IntRange(1, _MAX_NUMBER)


class _Side(click.ParamType[int | str]):
    """One side of a comparison: a version's number, `published`, or `rows`."""

    name = "version"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value in (_PUBLISHED, _ROWS):
            return str(value)
        try:
            return _Number.convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{value!r} must be a version's number, {_PUBLISHED}, or {_ROWS}", param, ctx)


@click.command()
@click.argument("a", type=_Side(), default=_PUBLISHED)
@click.argument("b", type=_Side(), default=_ROWS)
@json_option
@click.pass_context
def diff(ctx: click.Context, a: int | str, b: int | str, as_json: bool) -> None:
    """Show what changes from A to B: a version's number, `published`, or `rows` (the tables as they are now).

    By default from what is published to the rows.
    """
    app = wiring.open_app(settings_of(ctx))
    try:
        document, changes, faults, names = app.db.read(lambda tx: _compare(tx, app, a, b), at_one_moment=True)
    finally:
        app.close()
    _warn([f"left out: {fault}" for fault in faults])
    if as_json:
        print_json(document)
        return
    kinds = [change.kind for change in changes]
    told = ", ".join(f"{kinds.count(kind)} {kind}" for kind in _SIGNS if kind in kinds) or "no difference"
    click.echo(f"{_title(document['from'])} -> {_title(document['to'])}: {told}")
    for table, of_table in groupby(changes, key=lambda change: change.table):
        click.echo(f"\n{table}")
        for change in of_table:
            _print_change(change, names)


@click.command()
@click.argument("number", type=_Number, required=False)
@click.option("--draft", "as_draft", is_flag=True, help="Store the rows as a draft; nodes are told nothing.")
@json_option
@click.pass_context
def publish(ctx: click.Context, number: int | None, as_draft: bool, as_json: bool) -> int:
    """Publish the rows as they are now, or the draft NUMBER as it is.

    What is published already is not published again.
    """
    if as_draft and number is not None:
        raise click.UsageError("--draft makes a draft of the rows, NUMBER publishes one: give one of them")
    app, by = wiring.open_app(settings_of(ctx)), wiring.operator()
    try:
        if number is not None:
            done = publish_draft(app.db, app.clock, app.defaults, number, created_by=by)
        else:
            act = draft if as_draft else publish_rows
            done = act(app.db, app.clock, app.defaults, created_by=by, leave_out=app.leave_out)
    finally:
        app.close()
    return _tell(done, as_json=as_json)


@click.command()
@click.argument("number", type=_Number, required=False)
@json_option
@click.pass_context
def rollback(ctx: click.Context, number: int | None, as_json: bool) -> int:
    """Publish again what the archived version NUMBER holds, as a new version.

    By default what was published before. The rows stay as they are, and are not published by themselves any
    more until `config publish`, or until they say again what is published.
    """
    app = wiring.open_app(settings_of(ctx))
    try:
        done = roll_back(app.db, app.clock, app.defaults, number, created_by=wiring.operator())
    finally:
        app.close()
    return _tell(done, as_json=as_json)


@click.command("versions")
@json_option
@click.pass_context
def list_versions(ctx: click.Context, as_json: bool) -> None:
    """Show every version that is kept, the newest first."""
    app = wiring.open_app(settings_of(ctx))
    try:
        found, nodes = app.db.read(lambda tx: (versions.list_all(tx), versions.serving(tx)), at_one_moment=True)
    finally:
        app.close()
    if as_json:
        print_json([{**_document(one), "nodes": nodes.get(one.id, [])} for one in found])
        return
    rows = [
        (one.number, one.status, one.created_at, _printable(one.created_by), one.restores, nodes.get(one.id, []))
        for one in found
    ]
    columns = ("number", "status", "created", "by", "brings back", "served by")
    print_table(count(len(rows), "version"), columns, rows)


def _compare(
    tx: Transaction, app: App, a: int | str, b: int | str
) -> tuple[dict[str, Any], tuple[Change, ...], tuple[Fault, ...], Mapping[str, str]]:
    built = build(gateway.read(tx), app.defaults) if _ROWS in (a, b) else None
    rows = None if built is None else built.snapshot
    faults = () if built is None else built.faults
    (before, old), (after, new) = (_side(tx, side, rows) for side in (a, b))
    changes = compare(old, new)
    document = {
        "from": before, "to": after, "changes": [change.document() for change in changes],
        "faults": [asdict(fault) for fault in faults],
    }  # fmt: skip
    return document, changes, faults, gateway.names(tx)


def _side(tx: Transaction, side: int | str, rows: Snapshot | None) -> tuple[Any, Snapshot | None]:
    """Return how one side is named, and what it holds; None for the gateway before its first version."""
    if side == _ROWS:
        return _ROWS, rows
    found = versions.find_published(tx) if isinstance(side, str) else versions.find(tx, side)
    if found is None and side == _PUBLISHED:
        return None, None
    if found is None:
        raise InputError(f"version {side}: there is none; see `certworker config versions`")
    try:
        return _document(found), read_snapshot(found.snapshot_json)
    except InputError as error:
        raise InputError(f"version {found.number or found.id}: this release cannot read it: {error}") from None


def _document(version: VersionRow) -> dict[str, Any]:
    return {
        "number": version.number, "id": version.id, "status": version.status, "created_by": version.created_by,
        "created_at": version.created_at, "restores": version.restores, "digest": version.digest,
    }  # fmt: skip


def _title(side: Any) -> str:
    if side is None:
        return "nothing published"
    return "the rows as they are now" if side == _ROWS else f"version {side['number'] or side['id']} ({side['status']})"


def _print_change(change: Change, names: Mapping[str, str]) -> None:
    name = f" {names[change.row_id]!r}" if change.row_id in names else ""
    click.echo(f"  {_SIGNS[change.kind]} {change.row_id}{name}")
    for field, (before, after) in change.fields.items():
        if change.kind == "changed":
            click.echo(f"      {field}: {_value(before, names)} -> {_value(after, names)}")
        else:
            click.echo(f"      {field}: {_value(after if change.kind == 'added' else before, names)}")


def _value(value: Value, names: Mapping[str, str]) -> str:
    if value is None:
        return "none"
    return f"{value} ({names[value]!r})" if isinstance(value, str) and value in names else str(value)


def _tell(done: Published, *, as_json: bool) -> int:
    """Say what came of it, and return the exit code: 1 while a row breaks a rule."""
    if done.refused and not as_json:
        listed = "; ".join(map(str, done.faults[:5]))
        more = f"; and {len(done.faults) - 5} more" if len(done.faults) > 5 else ""
        raise CertworkerError(
            f"nothing is published, {count(len(done.faults), 'fault')}: {listed}{more}; "
            "correct the rows, or set ON_BAD_ROW=leave_out"
        )
    _warn([*done.warnings, *(f"left out: {fault}" for fault in done.faults if not done.refused)])
    if as_json:
        print_json(_published(done))
    else:
        click.echo(_outcome(done))
        if done.hold is not None:
            click.echo(str(done.hold))
    return 1 if done.faults else 0


def _published(done: Published) -> dict[str, Any]:
    return {
        "version": None if done.version is None else _document(done.version),
        "changed": done.changed,
        "refused": done.refused,
        "faults": [asdict(fault) for fault in done.faults],
        "warnings": done.warnings,
        "hold": None if done.hold is None else asdict(done.hold),
    }


def _outcome(done: Published) -> str:
    version = done.version
    if version is None:
        return "there are no rows: nothing to publish"
    named = f"version {version.number}"
    if version.status == "draft":
        return f"{named} is a draft" + ("" if done.changed else " of these rows already: nothing to do")
    if not done.changed:
        return f"{named} is published already: nothing to do"
    return f"{named} is published" + (f" and brings back version {version.restores}" if version.restores else "")


def _printable(text: str) -> str:
    """Return a text that another program may have written, as a terminal may show it."""
    return text if text.isprintable() else repr(text)


def _warn(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(f"warning: {line}", err=True)
