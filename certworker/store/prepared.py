"""Statements that every certificate needs: what SQLAlchemy works out at each execution is worked out once.

Its compiler says what the text is, in which order the parameters come and how values are converted, for each database.
After that a statement costs little more than what the driver makes of it. Who listens to SQLAlchemy's event
`before_cursor_execute` hears of it all the same, and what the driver raises becomes what SQLAlchemy makes of it.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter, methodcaller
from typing import Any, NoReturn, TypeVar, cast

from sqlalchemy import Connection, Delete, Dialect, Insert, Select, TextualSelect, Update
from sqlalchemy.exc import DBAPIError

_T = TypeVar("_T")
Row = Sequence[Any]
_Convert = Callable[[Any], Any]
_Statement = Select[Any] | Insert | Update | Delete | TextualSelect


class Prepared:
    """A Core statement whose text depends on nothing but which parameters it is given."""

    def __init__(self, statement: _Statement) -> None:
        self._statement = statement
        self._spelled: dict[tuple[str, ...], _Spelled] = {}

    def fetch(self, tx: Connection, **values: Any) -> list[Row]:
        """Execute it, and return the rows that it selects or returns."""
        spelled = self._spell(tx.dialect, values)
        return spelled.read(_execute(tx, spelled.text, spelled.bind(values), _all_rows))

    def run(self, tx: Connection, rows: Sequence[Mapping[str, Any]]) -> int:
        """Execute it with each of `rows`, which give the same parameters; return how many rows that has changed."""
        if not rows:
            return 0
        spelled = self._spell(tx.dialect, rows[0])
        # One is no pipeline: psycopg might be stopped in the middle of it, where PostgreSQL does not end what is idle.
        if len(rows) == 1:
            return _execute(tx, spelled.text, spelled.bind(rows[0]), _row_count)
        return _execute(tx, spelled.text, [spelled.bind(row) for row in rows], _row_count, many=True)

    def _spell(self, dialect: Dialect, given: Mapping[str, Any]) -> "_Spelled":
        key = (dialect.name, *given)
        spelled = self._spelled.get(key)
        if spelled is None:
            spelled = self._spelled[key] = _Spelled(self._statement, dialect, [*given])
        return spelled


class _Spelled:
    """A statement as one driver wants it, for one set of parameters."""

    def __init__(self, statement: _Statement, dialect: Dialect, given: list[str]) -> None:
        compiled = statement.compile(dialect=dialect, column_keys=given)
        binds = {name: bind for bind, name in compiled.bind_names.items()}
        self.text = compiled.string
        self._named = not compiled.positional
        self._binds: list[tuple[str, _Convert | None]] = []
        self._own: dict[str, Any] = {}
        """What the statement says itself."""
        for name in compiled.positiontup or binds:
            convert = binds[name].type.dialect_impl(dialect).bind_processor(dialect)
            self._binds.append((name, convert))
            if name not in given:
                self._own[name] = binds[name].effective_value
        columns = [column.type.dialect_impl(dialect) for column in statement.exported_columns]
        converts = [column.result_processor(dialect, None) for column in columns]
        self._reads = [(index, convert) for index, convert in enumerate(converts) if convert is not None]

    def bind(self, given: Mapping[str, Any]) -> Any:
        """Return the values as the driver takes them, by name or in the order of the text."""
        values = {**self._own, **given} if self._own else given
        if self._named:
            return {name: values[name] if to is None else to(values[name]) for name, to in self._binds}
        return tuple([values[name] if to is None else to(values[name]) for name, to in self._binds])

    def read(self, rows: list[tuple[Any, ...]]) -> list[Row]:
        """Return rows of the driver as the types of the columns have them."""
        if not self._reads:
            return cast("list[Row]", rows)
        read = [[*row] for row in rows]
        for row in read:
            for index, convert in self._reads:
                row[index] = convert(row[index])
        return cast("list[Row]", read)


_all_rows: Callable[[Any], list[tuple[Any, ...]]] = methodcaller("fetchall")
_row_count: Callable[[Any], int] = attrgetter("rowcount")


def _execute(tx: Connection, text: str, values: Any, read: Callable[[Any], _T], *, many: bool = False) -> _T:
    """Execute it, with several sets of values if there are `many`; return what `read` makes of the cursor."""
    connection = tx.connection.dbapi_connection
    assert connection is not None
    assert tx.in_transaction(), "nothing has begun that could be committed"
    cursor = connection.cursor()
    for listener in tx.dispatch.before_cursor_execute:
        listener(tx, cursor, text, values, None, many)
    try:
        (cursor.executemany if many else cursor.execute)(text, values)
        return read(cursor)
    except cast("type[Exception]", tx.dialect.loaded_dbapi.Error) as error:
        _raise(tx, error)
    finally:
        cursor.close()


def _raise(tx: Connection, error: Exception) -> NoReturn:
    """Raise what SQLAlchemy makes of an error of the driver; a connection that is lost is given up."""
    dbapi = tx.dialect.loaded_dbapi
    is_lost = tx.dialect.is_disconnect(cast("Any", error), tx.connection, None)
    if is_lost:
        tx.invalidate(error)
    raise DBAPIError.instance(
        None, None, error, dbapi.Error, hide_parameters=True, connection_invalidated=is_lost, dialect=tx.dialect
    ) from error
