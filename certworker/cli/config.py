"""`config`: the gateway's tables as one document, and the versions that are made of them."""

import json
import sys
import tomllib
from collections.abc import Hashable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import tomli_w
import yaml

from certworker import wiring
from certworker.cli.main import settings_of
from certworker.cli.output import json_option, print_json
from certworker.cli.versions import diff, list_versions, publish, rollback
from certworker.core.document import complete
from certworker.core.gateway import Fault, build, show
from certworker.errors import InputError
from certworker.steps.publish import find_hold
from certworker.store import audit, gateway
from certworker.store.database import Transaction
from certworker.store.rows import new_id
from certworker.wiring import App

_LARGEST = 10 * 1024 * 1024


@click.group()
def config() -> None:
    """The gateway's tables as one document, and its versions."""


for _command in (diff, publish, rollback, list_versions):
    config.add_command(_command)

_form_option = click.option(
    "--format", "form", type=click.Choice(["toml", "yaml", "json"]), help="Default: by FILE's ending, else TOML."
)


@config.command()
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True, path_type=Path))
@_form_option
@json_option
@click.pass_context
def apply(ctx: click.Context, file: Path, form: str | None, as_json: bool) -> None:
    """Make the tables that FILE (TOML, YAML or JSON; - for standard input) names hold exactly its rows.

    Tables it does not name stay as they are. Anything wrong in it changes nothing.
    """
    document = _read(file, form or _form_of(file))
    app = wiring.open_app(settings_of(ctx))
    # Read and written at one moment: another program's rows, half of them seen, would be faults.
    changed = app.db.write(lambda tx: _apply(tx, app, document), at_one_moment=True)
    built = app.db.read(lambda tx: build(gateway.read(tx), app.defaults), at_one_moment=True)
    hold = app.db.read(find_hold)
    app.close()
    for warning in built.warnings:
        click.echo(f"warning: {warning}", err=True)
    if hold is not None:
        click.echo(f"warning: {hold}", err=True)
    if as_json:
        print_json({"changed": changed})
    else:
        click.echo(", ".join(f"{table}: {count} changed" for table, count in changed.items()) or "nothing named")


@config.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), required=False)
@_form_option
@click.pass_context
def export(ctx: click.Context, file: Path | None, form: str | None) -> None:
    """Print the tables, or write them to FILE, as `apply` reads them."""
    app = wiring.open_app(settings_of(ctx))
    document = app.db.read(gateway.export)
    app.close()
    text = _print(document, form or _form_of(file))
    if file is None:
        sys.stdout.write(text)
        return
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror}") from None


def _apply(tx: Transaction, app: App, document: dict[str, Any]) -> dict[str, int]:
    rows = complete(document, gateway.export(tx), new_id, private_ca=app.settings.acme_private_ca)
    now = app.clock()
    # What another program wrote wrong must not keep a person from mending something else.
    known = set(build(gateway.read(tx), app.defaults).faults)
    changed = gateway.replace(tx, rows, now)
    faults = [fault for fault in build(gateway.read(tx), app.defaults).faults if fault not in known]
    if faults:
        numbers = {row["id"]: number for table in rows.values() for number, row in enumerate(table, 1)}
        raise InputError("; ".join(_say(fault, numbers) for fault in faults[:5]))  # rolls the transaction back
    if any(changed.values()):
        audit.record(tx, "config.applied", {"changed": changed}, now, actor=wiring.operator())
    return changed


def _say(fault: Fault, numbers: Mapping[str, int]) -> str:
    """Name a faulty row by its place in the document: an id that was made a moment ago helps nobody."""
    number = numbers.get(fault.row_id)
    return str(fault if number is None else replace(fault, row_id=str(number)))


def _read(file: Path, form: str) -> dict[str, Any]:
    try:
        with nullcontext(sys.stdin) if str(file) == "-" else file.open(encoding="utf-8") as source:
            content = source.read(_LARGEST + 1)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"cannot read {file}: it is not UTF-8 text") from None
    if len(content) > _LARGEST:
        raise InputError(f"{file}: has more than {_LARGEST} characters")
    try:
        document = _parse(content, form)
    except RecursionError:
        raise InputError(f"{file}: is nested too deep") from None
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{file}: is not {form.upper()}: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise InputError(f"{file}: must hold tables by name")
    return document


def _parse(content: str, form: str) -> Any:
    match form:
        case "toml":
            return tomllib.loads(content)
        case "yaml":
            return yaml.load(content, _Yaml)  # noqa: S506 - a SafeLoader
        case _:
            return json.loads(content, object_pairs_hook=_object)


def _object(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Refuse a key that is given twice: the first table of that name would be lost without a word."""
    made: dict[Any, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"{show(key)} is given twice")
        made[key] = value
    return made


class _Yaml(yaml.SafeLoader):
    """YAML without what only surprises: repeated keys, and aliases, which can blow up."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases are not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if any(not isinstance(key, Hashable) for key in keys):
            raise ValueError("a key must be text")
        _object((key, None) for key in keys)
        return super().construct_mapping(node, deep=deep)


def _form_of(file: Path | None) -> str:
    suffix = "" if file is None else file.suffix.lower()
    return {".json": "json", ".yaml": "yaml", ".yml": "yaml"}.get(suffix, "toml")


def _print(document: dict[str, Any], form: str) -> str:
    if form == "json":
        return json.dumps(document, indent=2) + "\n"
    if form == "yaml":
        return str(yaml.safe_dump(document, sort_keys=False))
    return tomli_w.dumps({name: [_without_null(row) for row in table] for name, table in document.items()})


def _without_null(value: Any) -> Any:
    """TOML has no null: what is left out is null."""
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_null(item) for item in value if item is not None]
    return value
