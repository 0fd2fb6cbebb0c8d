"""The gateway's tables as one document: what a person writes becomes complete rows.

    upstream_pools = [{name = "web", policy = "round_robin"}]
    upstream_targets = [{pool_id = "web", address = "10.0.0.5:8080"}]

Arrays are named as the tables, keys as the columns. A row may name another by its `name` (pools,
listeners) or its id. A row without an id keeps the id of the row it means: a pool of the same name, a
listener of the same port and protocol, a target of the same pool and address, a policy of the same
domains, a route of the same listener, type, match and priority.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any
from uuid import UUID

from certworker.core.gateway import show
from certworker.core.names import check_names
from certworker.errors import InputError

_DEEPEST = 10
"""Levels in a JSON column; what the columns mean needs two."""
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
"""PostgreSQL stores no NUL, and half a surrogate pair is no text."""

Row = dict[str, Any]
Tables = Mapping[str, list[Row]]


@dataclass(frozen=True, slots=True)
class _Shape:
    """One table: its columns with their types, what may be left out, and what tells its rows apart."""

    columns: Mapping[str, tuple[type, ...]]
    defaults: Mapping[str, Any]
    identity: tuple[str, ...]
    refers: Mapping[str, str] = field(default_factory=dict)
    unique: bool = False
    """Whether the database allows no two rows that `identity` cannot tell apart."""


_KINDS: Mapping[type, str] = {
    str: "text", int: "a whole number", bool: "true or false", dict: "a table", list: "an array", type(None): "nothing",
}  # fmt: skip


_SHAPES: Mapping[str, _Shape] = {
    "upstream_pools": _Shape(
        {"id": (str,), "name": (str,), "policy": (str,), "health_check": (dict, type(None))},
        {"policy": "round_robin", "health_check": None},
        ("name",),
        unique=True,
    ),
    "upstream_targets": _Shape(
        {"id": (str,), "pool_id": (str,), "address": (str,), "weight": (int,), "enabled": (bool,)},
        {"weight": 1, "enabled": True},
        ("pool_id", "address"),
        {"pool_id": "upstream_pools"},
    ),
    "tls_policies": _Shape(
        {"id": (str,), "mode": (str,), "domains": (list,), "shared": (bool,)},
        {"mode": "auto", "shared": False},
        ("mode", "domains"),
    ),
    "listeners": _Shape(
        {"id": (str,), "name": (str, type(None)), "port": (int,), "protocol": (str,),
         "tls_policy_id": (str, type(None)), "enabled": (bool,), "challenge": (str, type(None))},
        {"name": None, "tls_policy_id": None, "enabled": True, "challenge": None},
        ("port", "protocol"),
        unique=True,
    ),
    "routes": _Shape(
        {"id": (str,), "listener_id": (str,), "type": (str,), "match_expr": (dict,), "priority": (int,),
         "upstream_pool_id": (str,), "enabled": (bool,)},
        {"type": "path", "match_expr": {}, "priority": 100, "enabled": True},
        ("listener_id", "type", "match_expr", "priority"),
        {"listener_id": "listeners", "upstream_pool_id": "upstream_pools"},
    ),
}  # fmt: skip

_CHOICES = {
    ("upstream_pools", "policy"): ("round_robin", "least_conn", "weighted"),
    ("tls_policies", "mode"): ("auto", "manual"),
    ("listeners", "protocol"): ("http", "https"),
    ("listeners", "challenge"): ("forward", "stateless"),
    ("routes", "type"): ("port", "path", "ws"),
}


def complete(document: Mapping[Any, object], held: Tables, new_id: Callable[[], str], *, private_ca: bool) -> Tables:
    """Return the document's rows with every column, id and reference; `held` are the rows that are there.

    Raises InputError naming table, row (counted from 1), field, value and rule for the first fault.
    """
    if unknown := _unknown(document, _SHAPES):
        raise InputError(f"{unknown}: there is no such table; known are {', '.join(_SHAPES)}")
    tables: dict[str, list[Row]] = {}
    for name, shape in _SHAPES.items():
        if name not in document:
            continue
        rows = [_read_row(name, number, row) for number, row in enumerate(_rows_of(document, name), 1)]
        meant = {target: _by_reference(tables.get(target, held.get(target, []))) for target in shape.refers.values()}
        for number, row in enumerate(rows, 1):
            _resolve(name, number, row, meant)
            if name == "tls_policies":
                _check_domains(number, row, private_ca)
        _identify(name, shape, rows, held.get(name, []), new_id)
        tables[name] = rows
    _check_left_alone(tables, held)
    return tables


def _rows_of(document: Mapping[Any, object], name: str) -> list[object]:
    rows = document[name]
    if not isinstance(rows, list):
        raise InputError(f"{name}: must be an array of tables")
    return rows


def _read_row(name: str, number: int, given: object) -> Row:
    shape, where = _SHAPES[name], f"{name} {number}"
    if not isinstance(given, dict):
        raise InputError(f"{where}: must be a table of columns")
    if unknown := _unknown(given, shape.columns):
        raise InputError(f"{where}: {unknown}: there is no such column; known are {', '.join(shape.columns)}")
    row = {**shape.defaults, **given}
    for column, types in shape.columns.items():
        if column == "id" and column not in row:
            continue
        if column not in row:
            raise InputError(f"{where}: {column}: is missing")
        _check_type(where, column, row[column], types)
        choices = _CHOICES.get((name, column))
        if choices and row[column] not in (None, *choices):
            raise InputError(f"{where}: {column} {show(row[column])}: must be one of {', '.join(choices)}")
    return row


def _unknown(given: Mapping[Any, object], known: Collection[str]) -> str | None:
    """Return the first key that is not known, as it may be shown; YAML's need not even be text."""
    unknown = sorted(str(key) for key in given if key not in known)
    return None if not unknown else unknown[0] if unknown[0].isidentifier() else show(unknown[0])


def _check_type(where: str, column: str, value: object, types: tuple[type, ...]) -> None:
    shown = f"{where}: {column} {show(value)}"
    # A bool is an int to Python, not to a database.
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise InputError(f"{shown}: must be {' or '.join(_KINDS[kind] for kind in types)}")
    if isinstance(value, int) and abs(value) >= 2**31:
        raise InputError(f"{shown}: is too large")
    if isinstance(value, str):
        _check_text(shown, value)
    if isinstance(value, dict):
        _check_json(shown, value)
    if column in ("id", "tls_policy_id") and value is not None:
        _check_id(where, column, str(value))


def _check_text(shown: str, value: str) -> None:
    if _UNSTORABLE.search(value):
        raise InputError(f"{shown}: holds a character that no database stores")


def _check_json(shown: str, value: object, depth: int = 0) -> None:
    """TOML and YAML know more than JSON, which is what is stored: dates, not-a-number, keys that are no text."""
    if depth > _DEEPEST:
        raise InputError(f"{shown}: is nested more than {_DEEPEST} levels deep")
    match value:
        case dict():
            for key, inner in value.items():
                if not isinstance(key, str):
                    raise InputError(f"{shown}: key {show(key)} must be text")
                _check_text(shown, key)
                _check_json(shown, inner, depth + 1)
        case list():
            for inner in value:
                _check_json(shown, inner, depth + 1)
        case str():
            _check_text(shown, value)
        case float() if not isfinite(value):
            raise InputError(f"{shown}: {value} is no number that JSON knows")
        case None | bool() | int() | float():
            pass
        case _:
            raise InputError(f"{shown}: {show(value)} is nothing that JSON knows")


def _check_id(where: str, column: str, value: str) -> None:
    try:
        fits = str(UUID(value)) == value
    except ValueError:
        fits = False
    if not fits:
        raise InputError(f"{where}: {column} {show(value)}: must be a UUID in lower case with dashes")


def _by_reference(rows: list[Row]) -> Mapping[str, list[str]]:
    """Return the ids of the rows that a reference may mean, by what it says: an id or a name."""
    meant: dict[str, list[str]] = {}
    for row in rows:
        for word in {row["id"], row.get("name")}:
            meant.setdefault(word, []).append(row["id"])
    return meant


def _resolve(name: str, number: int, row: Row, meant: Mapping[str, Mapping[str, list[str]]]) -> None:
    """Replace names of other rows by their ids."""
    for column, table in _SHAPES[name].refers.items():
        named = meant[table].get(row[column], [])
        if len(named) != 1:
            trouble = "there is none" if not named else f"{len(named)} have this name, give an id"
            raise InputError(f"{name} {number}: {column} {show(row[column])}: must name one of {table}; {trouble}")
        row[column] = named[0]


def _check_left_alone(tables: Tables, held: Tables) -> None:
    """Refuse to remove what a row of a table that is not named still refers to."""
    for name, shape in _SHAPES.items():
        for column, target in shape.refers.items():
            if name in tables or target not in tables:
                continue
            kept = {row["id"] for row in tables[target]}
            for row in held.get(name, []):
                if row[column] not in kept:
                    raise InputError(f"{target}: {row[column]} is left out, but {name} {row['id']} still names it: "
                                     f"keep it, or give {name} too")  # fmt: skip


def _check_domains(number: int, row: Row, private_ca: bool) -> None:
    manual = row["mode"] == "manual"
    try:
        checked = check_names(
            row["domains"], private_ca=private_ca or manual, wildcard=manual, shared=bool(row["shared"])
        )
    except InputError as error:
        raise InputError(f"tls_policies {number}: domains: {error}") from None
    row["domains"] = list(checked)


def _identify(name: str, shape: _Shape, rows: list[Row], held: list[Row], new_id: Callable[[], str]) -> None:
    """Give every row its id: its own, that of the row it means, or a new one. No two rows may mean the same."""
    by_identity = {_identity(shape, row): row["id"] for row in held}
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        identity = _identity(shape, row)
        # Two rows with ids of their own may look the same, where the table allows it.
        marks = [] if "id" in row and not shape.unique else [identity]
        row.setdefault("id", by_identity.get(identity) or new_id())
        for mark in [*marks, row["id"]]:
            if mark in seen:
                raise InputError(f"{name} {number}: is the same row as {name} {seen[mark]}")
        seen |= {identity: number, row["id"]: number}


def _identity(shape: _Shape, row: Row) -> str:
    return json.dumps([row[column] for column in shape.identity], sort_keys=True)
