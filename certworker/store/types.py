"""Column types that mean the same on SQLite and PostgreSQL, and read the same by other programs.

| type      | PostgreSQL    | SQLite                                            |
|-----------|---------------|---------------------------------------------------|
| Uuid      | uuid          | 36 characters, lower case, with dashes            |
| UtcTime   | timestamptz   | `YYYY-MM-DDTHH:MM:SS.ffffffZ`                     |
| Json      | jsonb         | text holding JSON                                 |
| TextArray | text[]        | text holding a JSON array of strings              |

On SQLite every form is a CHECK (`form_checks`), so that a row another program wrote in some other
form is refused instead of silently never matching a join or a due-comparison. On PostgreSQL an
instant that Python has no word for (`infinity`, years before Christ) is refused: one such row would
make every query that meets it fail.

The types are part of the storage format: migrations import them, so a change here is a new type.
"""

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    Integer,
    Text,
    TypeDecorator,
    Uuid,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import FunctionElement
from sqlalchemy.types import TypeEngine

_SHOWN = 200
"""So much is left of a value that cannot be read."""


class UuidText(TypeDecorator[str]):
    """A UUID, in Python always the 36-character lower-case text."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(Uuid(as_uuid=False))
        return dialect.type_descriptor(Text())


class UtcTime(TypeDecorator[datetime]):
    """An instant: aware in, aware UTC out. A naive datetime is refused."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(DateTime(timezone=True))
        return dialect.type_descriptor(Text())

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"a naive datetime cannot be stored: {value!r}")
        value = value.astimezone(UTC)
        if dialect.name == "postgresql":
            return value
        # Not strftime: its %Y leaves out the zeros of the year 999, which would sort after 2026.
        return value.isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if dialect.name == "postgresql":
            return value.astimezone(UTC)  # type: ignore[no-any-return]
        return datetime.fromisoformat(value)


class TextArray(TypeDecorator[list[str]]):
    """An ordered list of texts. Search it with `store.policies.wanting`, never with LIKE."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(ARRAY(Text()))
        return dialect.type_descriptor(Text())

    def process_bind_param(self, value: list[str] | None, dialect: Dialect) -> Any:
        if value is None:
            return None
        return list(value) if dialect.name == "postgresql" else json.dumps(list(value), ensure_ascii=False)

    def process_result_value(self, value: Any, dialect: Dialect) -> list[str] | None:
        if value is None:
            return None
        read = value if dialect.name == "postgresql" else read_json(value)
        return list(read) if isinstance(read, list) else [read]


def read_json(text: str | bytes) -> Any:
    """Return what JSON says, or the beginning of the text itself where Python cannot read what a database takes.

    That is a number of thousands of digits, or lists a thousand deep. One such row of another program would
    make every query that meets it fail; as a text it is refused by whoever looks at it, like any wrong value.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return (text if isinstance(text, str) else text.decode(errors="replace"))[:_SHOWN]


class Json(TypeDecorator[Any]):
    """Any JSON value; Python None is SQL NULL."""

    impl = JSON
    cache_ok = True

    def __init__(self) -> None:
        super().__init__(none_as_null=True)

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            from sqlalchemy.dialects.postgresql import JSONB  # slow to import, and loaded by then

            return dialect.type_descriptor(JSONB(none_as_null=True))
        return dialect.type_descriptor(JSON(none_as_null=True))


BigKey = BigInteger().with_variant(Integer(), "sqlite")
"""A 64-bit key the database numbers itself; SQLite numbers only a column of exactly INTEGER."""


class db_now(FunctionElement[datetime]):  # noqa: N801 - reads like the SQL function it is
    """The database's present time, which all workers share: leases and heartbeats, nothing else.

    PostgreSQL's `clock_timestamp()`, because `now()` stands still inside a transaction. SQLite has
    milliseconds only.
    """

    type = UtcTime()
    inherit_cache = True


class server_time(FunctionElement[datetime]):  # noqa: N801
    """The default of a time column, for rows that other programs write without naming it."""

    type = UtcTime()
    inherit_cache = True


class seconds_from_now(FunctionElement[datetime]):  # noqa: N801
    """`seconds_from_now(literal(60))`: the database's time so many whole seconds ahead."""

    type = UtcTime()
    inherit_cache = True


def _spell(element: type[FunctionElement[datetime]], dialect: str, sql: str) -> None:
    def spelled(element: FunctionElement[datetime], compiler: SQLCompiler, **kw: Any) -> str:
        return sql.format(compiler.process(element.clauses, **kw)) if "{0}" in sql else sql

    compiles(element, dialect)(spelled)


_spell(db_now, "postgresql", "clock_timestamp()")
_spell(db_now, "sqlite", "strftime('%Y-%m-%dT%H:%M:%f000Z', 'now')")
_spell(server_time, "postgresql", "CURRENT_TIMESTAMP")
_spell(server_time, "sqlite", "(strftime('%Y-%m-%dT%H:%M:%f000Z', 'now'))")
_spell(seconds_from_now, "postgresql", "(clock_timestamp() + make_interval(secs => {0}))")
_spell(seconds_from_now, "sqlite", "strftime('%Y-%m-%dT%H:%M:%f000Z', 'now', {0} || ' seconds')")

_UUID_FORM = (
    "length({0}) = 36 AND {0} GLOB '????????-????-????-????-????????????'"
    " AND replace({0}, '-', '') NOT GLOB '*[^0-9a-f]*'"
)
_DIGITS = {n: "[0-9]" * n for n in (2, 4, 6)}
_TIME_FORM = (
    "{0} GLOB '"
    f"{_DIGITS[4]}-{_DIGITS[2]}-{_DIGITS[2]}T{_DIGITS[2]}:{_DIGITS[2]}:{_DIGITS[2]}.{_DIGITS[6]}Z"
    # SQLite reads 31 February as 3 March and 24:00 as the next day; Python reads neither.
    # Adding nothing makes it count; IS, because what it cannot read at all is NULL.
    "' AND strftime('%Y-%m-%dT%H:%M:%S', substr({0}, 1, 19), '+0 days') IS substr({0}, 1, 19) AND {0} > '0001'"
)
_FORMS: dict[str, dict[type, str]] = {
    "sqlite": {
        UuidText: _UUID_FORM,
        UtcTime: _TIME_FORM,
        TextArray: "json_valid({0}) AND json_type({0}) = 'array'",
        Json: "json_valid({0})",
        Boolean: "{0} IN (0, 1)",
    },
    "postgresql": {UtcTime: "{0} >= '0001-01-01 00:00:00+00' AND {0} < '10000-01-01 00:00:00+00'"},
}


def form_checks(columns: Iterable[Column[Any]], dialects: Iterable[str] = tuple(_FORMS)) -> list[CheckConstraint]:
    """Return the CHECKs that hold a database to the forms above, as far as its own types do not."""
    return [
        CheckConstraint(_form(column, dialect), name=f"{column.name}_form").ddl_if(dialect=dialect)
        for column in columns
        for dialect in dialects
        if type(column.type) in _FORMS[dialect]
    ]


def _form(column: Column[Any], dialect: str) -> str:
    form = _FORMS[dialect][type(column.type)].format(column.name)
    # Said outright: json_valid(NULL) is 0, not NULL, in older SQLite.
    return f"{column.name} IS NULL OR ({form})" if column.nullable else form
