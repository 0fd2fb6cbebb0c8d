"""Group commit: what several threads write at the same time is one transaction, and nobody's trouble is another's."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sqlalchemy import text

from certworker.errors import LeaseLost, SealError, StoreError
from certworker.store import settings_kv
from certworker.store.database import Database, Transaction
from certworker.store.journal import Journal, Kind


class Diary:
    """A kind of write that can be held, and that notes in which company items were written."""

    def __init__(self, turn: int = 0) -> None:
        self.kind = Kind(turn, self.write)
        self.companies: list[list[str]] = []
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def write(self, tx: Transaction, items: Sequence[str]) -> list[str]:
        self.entered.set()
        assert self.go_on.wait(20)
        self.companies.append(list(items))
        for item in items:
            if item == "lost":
                raise LeaseLost("another worker has it")
            if item == "sealed":
                raise SealError("with another key")  # a StoreError, but the database is there
            if item == "gone":
                raise StoreError("it does not answer")
            settings_kv.put(tx, item, "written")
        return [item.upper() for item in items]


def written(db: Database) -> set[str]:
    return {row[0] for row in db.read(lambda tx: tx.execute(text("SELECT key FROM settings_kv")).all())}


def together(journal: Journal, diary: Diary, first: str, *others: str) -> list[Any]:
    """Write `first`, hold it, and let the others come meanwhile; return what each got, an error too."""

    def attempt(item: str) -> Any:
        try:
            return journal.write(diary.kind, item)
        except Exception as error:  # noqa: BLE001 - whatever it is
            return error

    diary.go_on.clear()
    diary.entered.clear()
    with ThreadPoolExecutor(1 + len(others)) as threads:
        answers = [threads.submit(attempt, first)]
        assert diary.entered.wait(20)
        answers += [threads.submit(attempt, item) for item in others]
        wait_until(lambda: len(journal._entries) == len(others))
        diary.go_on.set()
        return [answer.result(20) for answer in answers]


def wait_until(there: Callable[[], bool]) -> None:
    for _ in range(4000):
        if there():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it never came")


def test_one_alone_is_a_transaction_like_any_other(db: Database) -> None:
    """Nobody waits for company."""
    diary = Diary()

    assert Journal(db).write(diary.kind, "a") == "A"

    assert diary.companies == [["a"]]
    assert "a" in written(db)


def test_those_who_come_meanwhile_are_written_together(db: Database) -> None:
    """Each gets its own answer, and what it wrote is there."""
    diary = Diary()

    answers = together(Journal(db), diary, "a", "b", "c", "d")

    assert answers == ["A", "B", "C", "D"]
    assert [sorted(company) for company in diary.companies] == [["a"], ["b", "c", "d"]]
    assert {"a", "b", "c", "d"} <= written(db)


def test_one_that_fails_stops_no_other(db: Database) -> None:
    """Nothing of the set is kept that failed; each is written alone, and only the culprit is told."""
    diary = Diary()

    answers = together(Journal(db), diary, "a", "b", "lost", "d")

    assert [answers[0], answers[1], answers[3]] == ["A", "B", "D"]
    assert isinstance(answers[2], LeaseLost)
    assert sorted(diary.companies[2:]) == [["b"], ["d"], ["lost"]]
    assert written(db) >= {"a", "b", "d"}
    assert "lost" not in written(db)


def test_one_that_does_not_open_stops_no_other(db: Database) -> None:
    """The database is there for the others."""
    answers = together(Journal(db), Diary(), "a", "b", "sealed", "d")

    assert [answers[0], answers[1], answers[3]] == ["A", "B", "D"]
    assert isinstance(answers[2], SealError)


def test_kinds_have_turns(db: Database) -> None:
    """Whoever comes first: all workers lock in the same order."""
    order: list[str] = []

    def kind(turn: int, name: str) -> Kind[str, None]:
        def write(_tx: Transaction, items: Sequence[str]) -> list[None]:
            order.append(name)
            return [None for _ in items]

        return Kind(turn, write)

    journal, first, last, early = Journal(db), Diary(), kind(9, "last"), kind(0, "early")
    first.go_on.clear()
    with ThreadPoolExecutor(3) as threads:
        answers = [threads.submit(journal.write, first.kind, "a")]
        assert first.entered.wait(20)
        answers.append(threads.submit(journal.write, last, "x"))
        wait_until(lambda: len(journal._entries) == 1)
        answers.append(threads.submit(journal.write, early, "y"))
        wait_until(lambda: len(journal._entries) == 2)
        first.go_on.set()
        for answer in answers:
            answer.result(20)

    assert order == ["early", "last"]


def test_a_database_that_is_gone_is_told_to_all_at_once(db: Database) -> None:
    """Nobody tries it again for each of them."""
    diary = Diary()

    first, *others = together(Journal(db), diary, "a", "gone", "b")

    assert first == "A"
    assert [type(answer) for answer in others] == [StoreError, StoreError]
    assert len(diary.companies) == 2
