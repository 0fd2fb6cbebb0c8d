"""What a page of certificates costs, and whose policies it names."""

from typing import Any

import pytest
from sqlalchemy import event

from certworker.core.delivery import EVERYTHING
from certworker.core.rollout import CertificateChanges, Cursor
from certworker.steps.deliver import read_changes
from certworker.steps.reconcile import reconcile

from .world import World


def read(world: World) -> CertificateChanges:
    return world.db.read(lambda tx: read_changes(tx, world.sealer, Cursor(), EVERYTHING))


def issue_for_nobody(world: World, *names: str) -> None:
    """Leave certificates that no policy wants any more, and that serve until their end."""
    for name in names:
        world.issue(name)
    world.execute("DELETE FROM tls_policies")
    reconcile(world.db, world.clock, world.wanted, world.sealer)


def test_what_nobody_wants_may_serve_for_whoever_names_it(world: World) -> None:
    """Each certificate for the policies that have one of its names, word for word."""
    issue_for_nobody(world, "a.test", "b.test", "c.test")
    both, one = world.add_policy("a.test", "b.test", mode="manual"), world.add_policy("b.test", "x.test", mode="manual")
    wanting = {certificate.dns_names[0]: certificate.policy_ids for certificate in read(world).changed}

    assert wanting == {"a.test": {both}, "b.test": {both, one}, "c.test": frozenset()}


@pytest.mark.parametrize("wanted", [True, False])
def test_a_page_costs_as_many_statements_as_one_certificate(world: World, wanted: bool) -> None:
    """Also if no policy wants any of them: on SQLite each look for a name reads every policy."""
    names = [f"{number}.test" for number in range(5)]
    if wanted:
        for name in names:
            world.issue(name)
    else:
        issue_for_nobody(world, *names)
    sent: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, _values: Any, _context: Any, _many: bool) -> None:
        if not statement.startswith("BEGIN"):
            sent.append(statement)

    event.listen(world.db.engine, "before_cursor_execute", note)
    changes = read(world)
    event.remove(world.db.engine, "before_cursor_execute", note)

    assert len(changes.changed) == 5
    assert len(sent) == (5 if wanted else 6)
