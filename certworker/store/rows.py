"""Between rows and values: ids, dataclasses filled from columns of the same names, rows that may be there."""

import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import ColumnElement, Connection, Table, bindparam
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import KeyedColumnElement
from sqlalchemy.sql.expression import FunctionElement

from certworker.store.prepared import Prepared
from certworker.store.types import TextArray, UuidText

if TYPE_CHECKING:
    from sqlalchemy.dialects import postgresql, sqlite

T = TypeVar("T")


def new_id() -> str:
    """Return a fresh row id: a UUID of version 7, which rows made together lie together by.

    Random ones would each dirty a page of every index that has them.
    """
    return id_of(time.time_ns() // 1_000_000, os.urandom(10))


def id_of(milliseconds: int, noise: bytes) -> str:
    """Return the UUID of version 7 (RFC 9562 §5.7) of this Unix time and ten random bytes, 36 lower-case characters."""
    made = milliseconds << 80 | int.from_bytes(noise) & ~_VERSION_AND_VARIANT
    return str(uuid.UUID(int=made | 0x7 << 76 | 0b10 << 62))


_VERSION_AND_VARIANT = 0xF << 76 | 0b11 << 62


@cache
def columns_of(cls: type, table: Table) -> tuple[KeyedColumnElement[Any], ...]:
    """Return the columns that fill `cls`."""
    return tuple(table.c[field.name] for field in fields(cls))


def to_value(cls: Callable[..., T], row: Sequence[Any]) -> T:
    """Return the dataclass that a row of `columns_of(cls, ...)` holds."""
    return cls(*row)


def insert_new(tx: Connection, table: Table, **values: Any) -> bool:
    """Insert a row unless it breaks a unique index; say whether it was inserted.

    Asking first is not enough on PostgreSQL: two transactions would both find nothing. Here the second
    waits for the first to commit, and its next statement sees the first one's row.
    """
    row = _insert(tx.dialect.name)(table).values(**values).on_conflict_do_nothing()
    return tx.execute(row.returning(*table.primary_key)).first() is not None


def insert_new_all(tx: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
    """The same for many rows at once, without saying which were inserted."""
    _insert_unless_there(table, tx.dialect.name).run(tx, rows)


def put_row(tx: Connection, table: Table, **values: Any) -> None:
    """Insert a row, or let it take the place of the one with the same primary key."""
    tx.execute(
        _insert(tx.dialect.name)(table)
        .values(**values)
        .on_conflict_do_update(index_elements=[*table.primary_key], set_=values)
    )


def put_rows(tx: Connection, table: Table, rows: list[dict[str, Any]], unique: tuple[str, ...] = ()) -> None:
    """The same for many rows at once, which name the same columns; with the same `unique` columns, if that is another.

    A row that is there keeps its primary key.
    """
    _insert_or_replace(table, tx.dialect.name, tuple(rows[0]), unique).run(tx, rows)


@cache
def _insert_unless_there(table: Table, dialect: str) -> Prepared:
    return Prepared(_insert(dialect)(table).on_conflict_do_nothing())


@cache
def _insert_or_replace(table: Table, dialect: str, columns: tuple[str, ...], unique: tuple[str, ...]) -> Prepared:
    insert, primary = _insert(dialect)(table), [column.name for column in table.primary_key]
    taken_over = {name: insert.excluded[name] for name in columns if name not in (*primary, *unique)}
    return Prepared(insert.on_conflict_do_update(index_elements=unique or primary, set_=taken_over))


@cache
def _insert(dialect: str) -> "Callable[[Table], postgresql.Insert | sqlite.Insert]":
    """Return the INSERT that a database has of its own: the other one's is slow to import."""
    insert: Callable[[Table], postgresql.Insert | sqlite.Insert]
    insert = import_module(f"sqlalchemy.dialects.{dialect}").insert
    return insert


class among(FunctionElement[Any]):  # noqa: N801 - reads like the operator it is
    """`among(column, "ids")`: the column is one of the texts or UUIDs that the parameter `ids` lists, however many.

    The statement has the same text for one and for hundreds, so that it is prepared once. SQLAlchemy's own IN has
    another text for each number of them, which is written, read and planned anew.
    """

    inherit_cache = True  # and of no type: as a Boolean, SQLite would be asked whether it `= 1`, without an index

    def __init__(self, column: ColumnElement[Any], name: str) -> None:
        super().__init__(column, bindparam(name, type_=TextArray()))


@compiles(among, "sqlite")
def _among_sqlite(element: among, compiler: SQLCompiler, **kw: Any) -> str:
    column, listed = (compiler.process(part, **kw) for part in element.clauses)
    return f"{column} IN (SELECT value FROM json_each({listed}))"  # noqa: S608 - parts that SQLAlchemy has written


@compiles(among, "postgresql")
def _among_postgresql(element: among, compiler: SQLCompiler, **kw: Any) -> str:
    column, listed = (compiler.process(part, **kw) for part in element.clauses)
    kind = "uuid" if isinstance(next(iter(element.clauses)).type, UuidText) else "text"
    return f"{column} = ANY (CAST({listed} AS {kind}[]))"


def pages(ids: list[str], size: int = 500) -> list[list[str]]:
    """Return `ids` in parts that one statement can name."""
    return [ids[start : start + size] for start in range(0, len(ids), size)]
