"""A worker that seems dead and is not: another one takes over, and the first one's late writes hit nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flow.box import until

from .database import held_write
from .oracles import OneActive, assert_all_well
from .proxy import Hold
from .worker import Rig, Worker, successor_of

pytestmark = pytest.mark.pebble

NAME = "zombie.chaos.test"
OTHER_ADDRESS = "127.0.0.2"
"""Where the CA looks: the successor cannot listen where the first one still does."""


@pytest.fixture
def successor(rig: Rig, tmp_path: Path) -> Iterator[Worker]:
    """A second worker on the same database, whose responder is the one that the CA asks."""
    rig.ca.challtest("add-a", {"host": f"{NAME}.", "addresses": [OTHER_ADDRESS]})
    folder = tmp_path / "successor"
    folder.mkdir()
    with successor_of(rig, folder, RESPONDER_LISTEN=f"{OTHER_ADDRESS}:{rig.ca.http_port}") as worker:
        yield worker


def take_over(rig: Rig, successor: Worker) -> None:
    """Let the lease end, and another worker finish."""
    rig.end_leases()
    successor.start()
    until(lambda: rig.serial(NAME) is not None)


def is_fenced(rig: Rig) -> bool:
    return "issuance.lease_lost" in rig.worker.said()


@pytest.mark.parametrize("rig", ["postgresql"], indirect=True)
@pytest.mark.parametrize(("route", "orders"), [("newOrder", 2), ("authorization", 1)])
def test_a_worker_frozen_at_the_ca(rig: Rig, successor: Worker, route: str, orders: int) -> None:
    """SIGSTOP while the CA is asked, SIGCONT when another worker has finished: it notices, and sends no more."""
    hold = Hold()
    rig.proxy.on(route, hold)
    rig.want(NAME)
    with OneActive(rig.url):
        rig.worker.start()
        until(lambda: hold.reached)
        rig.worker.freeze()
        take_over(rig, successor)
        assert_all_well(rig)
        rig.worker.thaw()
        hold.release()
        until(lambda: is_fenced(rig))
        assert_all_well(rig)

    assert (rig.accounts(), rig.orders()) == (1, orders)
    rig.worker.stop()
    successor.stop()


@pytest.mark.parametrize("rig", ["postgresql"], indirect=True)
def test_a_worker_frozen_in_a_transaction(rig: Rig, successor: Worker) -> None:
    """Its row lock hides the issuance from every claim, until PostgreSQL ends the transaction of a silent session."""
    rig.want(NAME)
    with OneActive(rig.url):
        with held_write(rig.url, "issuances", "NEW.state = 'ordered'") as held:
            rig.worker.start()
            until(lambda: held.reached)
            rig.worker.freeze()
        take_over(rig, successor)
        rig.worker.thaw()
        until(lambda: is_fenced(rig))
        assert_all_well(rig)

    assert (rig.accounts(), rig.orders()) == (1, 2)
    rig.worker.stop()
    successor.stop()


@pytest.mark.parametrize("rig", ["postgresql-guarded"], indirect=True)
def test_a_worker_cut_off_from_the_database(rig: Rig, successor: Worker) -> None:
    """Half-open connections: what it has learnt of the CA it can tell nobody until another one has finished."""
    hold = Hold(answered=True)
    rig.proxy.on("newOrder", hold)
    rig.want(NAME)
    with OneActive(rig.url):
        rig.worker.start()
        until(lambda: hold.reached)
        rig.guard.stall()
        hold.release()
        take_over(rig, successor)
        rig.guard.resume()
        until(lambda: is_fenced(rig))
        assert_all_well(rig)

    assert (rig.accounts(), rig.orders()) == (1, 2)
    rig.worker.stop()
    successor.stop()
