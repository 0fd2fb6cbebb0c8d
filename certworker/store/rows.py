"""Between rows and values: ids, and dataclasses filled from columns of the same names."""

import uuid
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar

from sqlalchemy import Row, Table
from sqlalchemy.sql.elements import KeyedColumnElement

T = TypeVar("T")


def new_id() -> str:
    """Return a fresh row id: a random UUID, 36 lower-case characters."""
    return str(uuid.uuid4())


@cache
def columns_of(cls: type, table: Table) -> tuple[KeyedColumnElement[Any], ...]:
    """Return the columns that fill `cls`."""
    return tuple(table.c[field.name] for field in fields(cls))


def to_value(cls: Callable[..., T], row: Row[Any]) -> T:
    """Return the dataclass that a row of `columns_of(cls, ...)` holds."""
    return cls(*row)
