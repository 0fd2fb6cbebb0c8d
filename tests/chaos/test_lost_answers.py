"""Answers of the CA that get lost on the way, one on each route: one account, one certificate, nothing else lost."""

import pytest

from tests.flow.box import until

from .oracles import OneActive, assert_all_well
from .proxy import Fault, close_after, misstate_length, reset_after, reset_before, trickle, truncate
from .worker import Rig

pytestmark = pytest.mark.pebble

NAME = "lost.chaos.test"
REPEATED = ["newAccount", "newOrder", "order", "authorization", "certificate"]
"""Asked again until an answer comes: all losses meet one issuance, one after the other."""
ONE_EACH = ["challenge", "finalize", "directory"]
"""What the CA has done is found by a look, and not asked for again; a third lost directory opens the breaker."""
UNHEARD: dict[str, Fault] = {"reset": reset_after, "truncated": truncate, "closed": close_after}
CASES = [(route, "reset truncated closed") for route in REPEATED]
CASES += [("newNonce", "reset closed")]  # has no body to truncate
CASES += [(route, loss) for route in ONE_EACH for loss in UNHEARD]
ON_SQLITE = [("sqlite", *case) for case in CASES]
ON_POSTGRESQL = [("postgresql", *case) for case in CASES if case[0] in ("newOrder", "finalize", "certificate")]
DAMAGES: dict[str, Fault] = {"length too small": misstate_length(-20), "byte by byte": trickle(0.0005)}


@pytest.mark.parametrize(("rig", "route", "losses"), ON_SQLITE + ON_POSTGRESQL, indirect=["rig"])
def test_answers_are_lost(rig: Rig, route: str, losses: str) -> None:
    """A request that the CA never saw, then answers that never came: what the CA did is found, and not done again."""
    unheard = [UNHEARD[loss] for loss in losses.split()]
    rules = [rig.proxy.on(route, fault) for fault in (reset_before, *unheard)]
    rig.want(NAME)
    issue_in_spite(rig)

    assert [rule.met for rule in rules] == [1] * len(rules)
    assert rig.accounts() == 1
    # An order whose URL nobody has heard is left to expire; a CA with order reuse gives it out again.
    assert rig.orders() == (1 + len(unheard) if route == "newOrder" else 1)
    rig.worker.stop()


@pytest.mark.parametrize("rig", ["sqlite"], indirect=True)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("route", ["newOrder", "finalize", "certificate"])
def test_an_answer_is_damaged(rig: Rig, route: str, damage: str) -> None:
    """Too short by its own length, or so slow that it comes in a thousand pieces."""
    rule = rig.proxy.on(route, DAMAGES[damage])
    rig.want(NAME)
    issue_in_spite(rig)

    assert rule.met == 1
    assert rig.accounts() == 1
    assert rig.orders() == (2 if (route, damage) == ("newOrder", "length too small") else 1)
    rig.worker.stop()


def issue_in_spite(rig: Rig) -> None:
    """Run the worker until all is well, with one issuance."""
    with OneActive(rig.url):
        rig.worker.start()
        until(lambda: tries_until_active(rig))
        assert_all_well(rig)
    assert len(rig.issuances(NAME)) == 1


def tries_until_active(rig: Rig) -> bool:
    """Say whether it is active; what waits after a failure is tried again now, and not in 5 s."""
    if any(issuance.error is not None and issuance.lease_until is None for issuance in rig.issuances(NAME)):
        rig.end_waits()
    return rig.serial(NAME) is not None
