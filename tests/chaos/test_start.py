"""A start with much to do: what was under way goes on at once, and the first new names do not wait for the others."""

import pytest
from sqlalchemy import func, insert, select

from certworker.core.issuance import State
from certworker.store.rows import new_id
from certworker.store.tables import changes, issuances, tls_policies
from tests.flow.box import until

from .proxy import Hold
from .worker import Rig

pytestmark = pytest.mark.pebble

NAME = "under-way.chaos.test"
NEW = 6000


def test_a_start_among_thousands_of_new_policies(rig: Rig) -> None:
    """Killed at finalize: its certificate, and the first of the new ones, are there while most are not taken over."""
    hold = Hold()
    rig.proxy.on("finalize", hold)
    rig.want(NAME)
    rig.worker.start()
    until(lambda: hold.reached)
    rig.worker.kill()
    want_each(rig, [f"n{number}.chaos.test" for number in range(NEW)])
    rig.worker.start()

    until(lambda: rig.serial(NAME))
    assert noted(rig) > NEW / 2
    until(lambda: done(rig) > 1)
    assert noted(rig) > NEW / 2
    assert rig.issuance(NAME).claims == 2


def want_each(rig: Rig, names: list[str]) -> None:
    """Want each of these by a policy of its own."""
    rows = [{"id": new_id(), "mode": "auto", "domains": [name], "status": "pending"} for name in names]
    rig.db.write(lambda tx: tx.execute(insert(tls_policies), rows))


def noted(rig: Rig) -> int:
    """Count the policies that are not taken over."""
    count = select(func.count()).where(changes.c.topic == "policy")
    return rig.db.read(lambda tx: tx.execute(count).scalar_one())


def done(rig: Rig) -> int:
    count = select(func.count()).where(issuances.c.state == State.DONE)
    return rig.db.read(lambda tx: tx.execute(count).scalar_one())
