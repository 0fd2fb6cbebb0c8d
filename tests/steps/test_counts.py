"""What a certificate costs, in requests, statements and commits: held to what it costs today.

Seconds belong to `make bench`; these numbers are the same on every machine.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, event

from certworker.steps.barrier import Barrier
from certworker.steps.issue import advance
from certworker.steps.reconcile import reconcile
from certworker.steps.scan import scan
from certworker.steps.session import Bench, Session
from certworker.store.database import Database
from certworker.store.journal import Journal
from tests.store.plans import statements

from .life import Wire
from .test_crew import until
from .world import NODE_SILENT, World

REQUESTS = 7
"""newOrder, authorization, challenge, order, finalize, order, certificate: none can be spared (RFC 8555 §7.4, §7.5)."""
STATEMENTS = 20
"""Of an issuance from its claim to the certificate that serves."""
COMMITS = 5
"""order_intent, ordered, validating, finalizing, done: each before the act that rests on it."""
TOGETHER = 16
FETCH = "SELECT challenges.key_authorization"
"""What the CA of these tests is answered with; the responder answers from memory."""


@contextmanager
def commits(db: Database) -> Iterator[list[str]]:
    """Collect the transactions that changed something."""
    done: list[str] = []

    def sent(connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.lstrip().startswith(("INSERT", "UPDATE", "DELETE")):
            connection.info["changed"] = statement

    def committed(connection: Connection) -> None:
        if (statement := connection.info.pop("changed", None)) is not None:
            done.append(statement)

    event.listen(db.engine, "before_cursor_execute", sent)
    event.listen(db.engine, "commit", committed)
    yield done
    event.remove(db.engine, "before_cursor_execute", sent)
    event.remove(db.engine, "commit", committed)


class Gathered(Journal):
    """A journal that is written when so many have come: what happens by chance under load, made to happen."""

    def __init__(self, db: Database, company: int) -> None:
        super().__init__(db)
        self._company = company

    def _write_all(self) -> None:
        until(lambda: len(self._entries) == self._company)
        super()._write_all()


def issue(world: World, bench: Bench, sessions: list[Session]) -> None:
    """Take all of them through their lives in step."""
    with ThreadPoolExecutor(len(sessions)) as threads:
        while any(session.issuance.is_open for session in sessions):
            list(threads.map(lambda session: advance(bench, session), sessions))
            world.clock.move(timedelta(seconds=1))


def claimed(world: World, count: int) -> tuple[Bench, list[Session], Wire]:
    """Return so many issuances of an account that is there, and what is asked of the CA for them."""
    world.issue("before.test")
    world.add_policy(*(f"n{number}.test" for number in range(count)))
    world.take_over()
    wire = Wire(world)
    proxies = Barrier(world.db, NODE_SILENT, stopwatch=lambda: 0.0)
    assert proxies.why_not(["n0.test"], "thumbprint") is None  # known for as long as this clock stands still
    bench = replace(world.bench(wire), unready=proxies.why_not)
    bench.accounts.used()
    bench.client.directory()
    bench.client._keep_nonce(bench.client._fetch_nonce())
    wire.sent.clear()
    return bench, world.claim(), wire


def test_a_certificate_alone(world: World) -> None:
    """Seven requests and five commits; one more statement is a reason to look again."""
    bench, sessions, wire = claimed(world, 1)

    with statements(world.db) as sent, commits(world.db) as changed:
        issue(world, bench, sessions)

    assert len(wire.sent) == REQUESTS, [one.path for one in wire.sent]
    assert len(changed) == COMMITS, changed
    ours = [statement for statement in sent if not statement.startswith(FETCH)]
    assert len(ours) <= STATEMENTS, "\n".join(ours)


def test_sixteen_cost_what_one_costs(world: World) -> None:
    """What comes together is written together: statements and commits do not grow with it."""
    bench, sessions, wire = claimed(world, TOGETHER)

    with statements(world.db) as sent, commits(world.db) as changed:
        issue(world, replace(bench, journal=Gathered(world.db, TOGETHER)), sessions)

    assert len(world.ca.issued) == 1 + TOGETHER
    assert len(changed) == COMMITS, changed
    ours = [statement for statement in sent if not statement.startswith(FETCH)]
    assert len(ours) <= STATEMENTS, "\n".join(ours)
    assert len([one for one in wire.sent if one.method == "POST"]) == REQUESTS * TOGETHER  # and a nonce for each thread


@pytest.mark.parametrize("count", [1, 100])
def test_policies_are_taken_and_queued_together(world: World, count: int) -> None:
    """One new policy or a hundred: as many statements."""
    for number in range(count):
        world.add_policy(f"n{number}.test")

    with statements(world.db) as sent:
        reconcile(world.db, world.clock, world.wanted, world.sealer)
        assert scan(world.db, world.clock).queued == count

    assert len(sent) <= 50, sent
