"""Requests that reach the CA after their sender has died: all that they do was going to be done."""

import pytest

from tests.flow.box import until

from .oracles import OneActive, assert_all_well
from .proxy import Hold
from .worker import Rig

pytestmark = pytest.mark.pebble

NAME = "late.chaos.test"


@pytest.mark.parametrize("rig", ["sqlite"], indirect=True)
@pytest.mark.parametrize(("route", "orders"), [("newAccount", 1), ("newOrder", 2), ("challenge", 1), ("finalize", 1)])
def test_a_request_of_the_dead(rig: Rig, route: str, orders: int) -> None:
    """It arrives when everything is done without it: one account, one certificate, at most an order too many."""
    late = Hold(outlive=True)
    rig.proxy.on(route, late)
    rig.want(NAME)
    with OneActive(rig.url):
        rig.worker.start()
        until(lambda: late.reached)
        rig.worker.kill()
        rig.worker.start()
        until(lambda: rig.serial(NAME) is not None)
        late.release()
        until(lambda: rig.proxy.seen(route)[0].answer is not None)
        assert_all_well(rig)

    assert (rig.accounts(), rig.orders()) == (1, orders)
    rig.worker.stop()


def test_the_ca_looks_when_nobody_answers(rig: Rig) -> None:
    """Killed with the challenge on its way: that order is dead, the next one is made when its time has come."""
    late = Hold(outlive=True)
    rig.proxy.on("challenge", late)
    rig.want(NAME)
    rig.worker.start()
    until(lambda: late.reached)
    rig.worker.kill()
    late.release()
    (authorization,) = rig.proxy.seen("authorization")
    looked = f"authz {authorization.path.rpartition('/')[2]} set INVALID"
    until(lambda: looked in rig.ca.log_path.read_text())

    rig.worker.start()
    until(lambda: rig.issuance(NAME).state == "failed")
    failed = rig.issuance(NAME)
    assert failed.error["class"] == "validation"
    assert failed.error["retry_at"] > failed.error["at"]
    assert rig.orders() == 1
    rig.look_again()
    until(lambda: rig.serial(NAME) is not None)

    assert_all_well(rig)
    assert (rig.accounts(), rig.orders()) == (1, 2)
    asked = [exchange for exchange in rig.proxy.seen("order") if failed.order_url.endswith(exchange.path)]
    assert len(asked) == 1
    rig.worker.stop()
