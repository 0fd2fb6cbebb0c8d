"""Answers of the CA that get lost on the way, one on each route: one account, one certificate, nothing else lost."""

import pytest

from tests.flow.box import until

from .oracles import OneActive, assert_all_well
from .proxy import Fault, close_after, misstate_length, reset_after, reset_before, trickle, truncate
from .worker import Rig

pytestmark = [pytest.mark.pebble, pytest.mark.parametrize("rig", ["sqlite"], indirect=True)]

NAME = "lost.chaos.test"
ROUTES = [
    "directory", "newNonce", "newAccount", "newOrder", "order", "authorization", "challenge", "finalize", "certificate",
]  # fmt: skip
FAULTS: dict[str, Fault] = {
    "reset before": reset_before,
    "reset after": reset_after,
    "truncated": truncate,
    "closed after": close_after,
    "length too small": misstate_length(-20),
    "byte by byte": trickle(0.0005),
}
EVERYWHERE = ["reset before", "reset after", "truncated"]
CASES = [(route, fault) for route in ROUTES for fault in EVERYWHERE if (route, fault) != ("newNonce", "truncated")]
CASES += [(route, "closed after") for route in ("newNonce", "newAccount", "newOrder", "finalize")]
CASES += [(route, "length too small") for route in ("newOrder", "order", "certificate")]
CASES += [(route, "byte by byte") for route in ("newOrder", "finalize", "certificate")]


@pytest.mark.parametrize(("route", "fault"), CASES)
def test_an_answer_is_lost(rig: Rig, route: str, fault: str) -> None:
    """What the CA did is found again; only an order that nobody heard of is made a second time."""
    rule = rig.proxy.on(route, FAULTS[fault])
    rig.want(NAME)
    with OneActive(rig.url):
        rig.worker.start()
        until(lambda: tries_until_active(rig))
        assert_all_well(rig)

    assert rule.met == 1
    assert rig.accounts() == 1
    unheard_of = route == "newOrder" and fault not in ("reset before", "byte by byte")
    assert rig.orders() == (2 if unheard_of else 1)
    assert len(rig.issuances(NAME)) == 1
    rig.worker.stop()


def tries_until_active(rig: Rig) -> bool:
    """Say whether it is active; what waits after a failure is tried again now, and not in 5 s."""
    if any(issuance.error is not None and issuance.lease_until is None for issuance in rig.issuances(NAME)):
        rig.end_waits()
    return rig.serial(NAME) is not None
