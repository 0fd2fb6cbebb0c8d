"""The database goes away while the CA is asked, or a COMMIT is carried out and nobody hears of it."""

import pytest

from certworker.core.issuance import State
from tests.flow.box import until

from .oracles import OneActive, assert_all_well
from .pgproxy import parameter
from .proxy import Hold
from .worker import Rig

pytestmark = [pytest.mark.pebble, pytest.mark.parametrize("rig", ["postgresql-guarded"], indirect=True)]

NAME = "commit.chaos.test"


@pytest.mark.parametrize("state", [State.ORDER_INTENT, State.ORDERED, State.FINALIZING, State.DONE])
def test_a_commit_of_unknown_outcome(rig: Rig, state: State) -> None:
    """Carried out, the connection gone: the worker finds its own work there and goes on; nothing is done twice."""
    loss = rig.guard.lose_commit(parameter(state))
    rig.want(NAME)
    with OneActive(rig.url):
        rig.worker.start()
        until(lambda: loss.reached)
        until(lambda: rig.serial(NAME) is not None)
        assert_all_well(rig)

    assert [issuance.claims for issuance in rig.issuances(NAME)] == [1]
    assert (rig.accounts(), rig.orders()) == (1, 1)
    rig.worker.stop()


@pytest.mark.parametrize("route", ["newOrder", "finalize", "certificate"])
def test_connections_are_cut_while_the_ca_works(rig: Rig, route: str) -> None:
    """What the CA has said is not lost with them: it is written on a new connection."""
    hold = Hold(answered=True)
    rig.proxy.on(route, hold)
    rig.want(NAME)
    with OneActive(rig.url):
        rig.worker.start()
        until(lambda: hold.reached)
        rig.guard.cut()
        hold.release()
        until(lambda: rig.serial(NAME) is not None)
        assert_all_well(rig)

    assert (rig.accounts(), rig.orders()) == (1, 1)
    assert len(rig.proxy.seen(route)) == 1
    rig.worker.stop()
