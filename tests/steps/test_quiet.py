"""What the service does by itself when there is nothing to do costs nothing that grows with the fleet."""

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, event

from certworker.core.gateway import Defaults
from certworker.steps.deliver import Scopes
from certworker.steps.expire import expire
from certworker.steps.publish import figures, publish_changes
from certworker.steps.reap import reap
from certworker.steps.reconcile import reconcile
from certworker.steps.refresh_ari import refresh_ari
from certworker.steps.roll_back import take_back_certificates, take_back_version
from certworker.steps.scan import scan
from certworker.steps.verify import count_overdue, verify
from certworker.store import issuances

from .world import NODE_SILENT, World

FLEET = (
    "tls_policies", "lineages", "lineage_names", "policy_lineages", "certificates", "issuances", "removed_certificates",
    "thumbprints", "rate_buckets", "audit_logs", "changes",
)  # fmt: skip
"""Tables with a row or more for each certificate."""
SHORT = ("ix_issuances_due", "ix_issuances_urgent", "uq_issuances_open", "ix_lineages_unserved")
"""Indexes of what is under way: SQLite may walk these."""
_UNLESS = rf"(?! USING (?:COVERING )?INDEX (?:{'|'.join(SHORT)})\b)"
_WALK = re.compile(rf"(?:Seq Scan on|SCAN) (?:{'|'.join(FLEET)})\b{_UNLESS}.*")
DEFAULTS = Defaults(timedelta(seconds=10), timedelta(seconds=2), ())

STEPS: dict[str, Callable[[World], Any]] = {
    "reconcile": lambda world: reconcile(world.db, world.clock, world.wanted, world.sealer),
    "scan": lambda world: scan(world.db, world.clock),
    "expire": lambda world: expire(world.db, world.clock),
    "verify": lambda world: verify(world.db, world.clock, Scopes(), NODE_SILENT),
    "count_overdue": lambda world: count_overdue(world.db, world.clock),
    "take_back_version": lambda world: take_back_version(world.db, world.clock, DEFAULTS, NODE_SILENT),
    "take_back_certificates": lambda world: take_back_certificates(
        world.db, world.clock, world.sealer, lambda: 0.5, NODE_SILENT
    ),
    "refresh_ari": lambda world: refresh_ari(world.db, world.bench().client, world.clock, lambda: 0.5),
    "reap": lambda world: reap(world.db, world.clock),
    "publish": lambda world: publish_changes(world.db, world.clock, DEFAULTS),
    "figures": lambda world: world.db.read(figures),
    "claim": lambda world: world.claim(),
    "next attempt": lambda world: world.db.read(
        lambda tx: issuances.next_attempt_at(tx, directory_url=world.ca.directory_url)
    ),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_quiet_step_walks_no_table_of_the_fleet(world: World, step: str) -> None:
    """Every statement that it sends finds its rows by an index."""
    world.issue("a.test")
    STEPS[step](world)  # what there was to do is done

    assert _walks(world, lambda: STEPS[step](world)) == {}


def test_an_issuance_walks_no_table_of_the_fleet(world: World) -> None:
    """Neither the first one of a name nor a renewal, from its claim to the certificate that serves."""
    world.add_policy("a.test", "b.test", shared=True)
    world.take_over()

    assert _walks(world, world.work) == {}
    world.clock.move(timedelta(days=80))
    world.take_over()
    assert _walks(world, world.work) == {}


def _walks(world: World, act: Callable[[], Any]) -> dict[str, list[str]]:
    """Return what `act` has sent that reads a table of the fleet whole, and which."""
    sent: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, values: Any, _context: Any, many: bool) -> None:
        if re.match(r"\s*(SELECT|UPDATE|DELETE|WITH)", statement):
            sent.append((statement, values[0] if many else values))

    event.listen(world.db.engine, "before_cursor_execute", note)
    act()
    event.remove(world.db.engine, "before_cursor_execute", note)
    walks = {statement: _WALK.findall(_plan(world, statement, values)) for statement, values in sent}
    assert sent
    return {statement: tables for statement, tables in walks.items() if tables}


def _plan(world: World, statement: str, values: Any) -> str:
    def explain(tx: Connection) -> str:
        word = "EXPLAIN QUERY PLAN " if world.db.embedded else "EXPLAIN "
        if not world.db.embedded:
            tx.exec_driver_sql("SET LOCAL enable_seqscan = off")  # or it would read a small table whole
        return "\n".join(str(row[-1]) for row in tx.exec_driver_sql(word + statement, values))

    return world.db.write(explain)
