"""Group commit: what several threads want written at the same time is written in one transaction.

A commit costs the same for one issuance as for sixteen, and so does a statement, nearly. So a thread hands in
what it has to write; whichever comes first writes for everybody who has come by then, and each returns once
its own part is durable. Nobody waits for company: with one thread it is a transaction like any other.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from certworker.errors import StoreError
from certworker.store.database import Database, Transaction

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Kind(Generic[ItemT, ResultT]):
    """Things that are written together."""

    turn: int
    """Kinds of one transaction are written in this order: every worker locks tables in the same one."""
    write: Callable[[Transaction, Sequence[ItemT]], Sequence[ResultT]]
    """Writes all items and returns a result for each, in their order; whatever it raises, nothing is written.

    May be run again from its start, as `Database.write` says; and with any one of the items alone.
    """


@dataclass(slots=True)
class _Entry:
    kind: Kind[Any, Any]
    item: Any
    done: bool = False
    result: Any = None
    error: Exception | None = None
    """Why nothing of it was written."""

    def end(self, result: Any = None, error: Exception | None = None) -> None:
        self.done, self.result, self.error = True, result, error


class Journal:
    """Writes for any number of threads."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._entries: list[_Entry] = []
        self._entering = threading.Lock()
        self._writing = threading.Lock()

    def write(self, kind: Kind[ItemT, ResultT], item: ItemT) -> ResultT:
        """Write `item` and return what became of it after the commit.

        Raises what `Database.write` raises, and what writing this very item raises.
        """
        entry = _Entry(kind, item)
        with self._entering:
            self._entries.append(entry)
        with self._writing:
            if not entry.done:
                self._write_all()
        if entry.error is not None:
            raise entry.error
        return entry.result  # type: ignore[no-any-return]

    def _write_all(self) -> None:
        with self._entering:
            entries, self._entries = self._entries, []
        try:
            _settle(entries, self._db.write(lambda tx: _write(tx, entries)))
        except Exception as error:  # noqa: BLE001 - raised where it was handed in
            if len(entries) == 1 or _is_gone(error):
                _give_up(entries, error)
            else:
                self._write_each(entries)

    def _write_each(self, entries: Sequence[_Entry]) -> None:
        """Something is wrong with one of them: write each alone, so that it shows which, and stops no other."""
        for number, entry in enumerate(entries):
            try:
                _settle([entry], self._db.write(lambda tx: _write(tx, [entry])))  # noqa: B023 - called at once
            except Exception as error:  # noqa: BLE001 - raised where it was handed in
                entry.end(error=error)
                if _is_gone(error):
                    _give_up(entries[number + 1 :], error)
                    return


def _is_gone(error: Exception) -> bool:
    """Say whether the database is not there, for nobody, rather than refusing something."""
    return type(error) is StoreError and not error.contended


def _give_up(entries: Sequence[_Entry], error: Exception) -> None:
    for entry in entries:
        entry.end(error=error)


def _write(tx: Transaction, entries: Sequence[_Entry]) -> list[Any]:
    """Write all entries, kind by kind; return their results in the order of the entries."""
    results: dict[int, Any] = {}
    for kind in sorted({entry.kind for entry in entries}, key=lambda kind: kind.turn):
        alike = [entry for entry in entries if entry.kind is kind]
        written = kind.write(tx, [entry.item for entry in alike])
        results.update((id(entry), result) for entry, result in zip(alike, written, strict=True))
    return [results[id(entry)] for entry in entries]


def _settle(entries: Sequence[_Entry], results: Sequence[Any]) -> None:
    for entry, result in zip(entries, results, strict=True):
        entry.end(result)
