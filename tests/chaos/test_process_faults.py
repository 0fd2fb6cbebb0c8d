"""A worker that is told to stop, held up, or denied what it needs: space, files, a log, rows that it can read."""

import os
import re
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Row, Table, select, text

from certworker.core.issuance import State
from certworker.store.rows import new_id
from certworker.store.tables import certificates, tls_policies, workers
from tests.flow.box import until

from .oracles import OneActive, assert_all_well, keys_lost
from .proxy import Hold
from .worker import Rig

pytestmark = pytest.mark.pebble

NAME = "process.chaos.test"
ON_SQLITE = pytest.mark.parametrize("rig", ["sqlite"], indirect=True)
AFTER_ECHO = 1.1
"""Seconds after which a signal is not taken for the one before it."""


def hold_at(rig: Rig, route: str, *, answered: bool = False) -> Hold:
    """Start an issuance, and return when this request of it is held."""
    hold = Hold(answered=answered)
    rig.proxy.on(route, hold)
    rig.want(NAME)
    rig.worker.start()
    until(lambda: hold.reached)
    return hold


def told_to_stop(rig: Rig) -> None:
    rig.worker.send(signal.SIGTERM)
    until(lambda: "service.stopping" in rig.worker.said())


def assert_goes_on(rig: Rig, left: Row[Any]) -> None:
    """The next start makes one certificate of what the last one left."""
    rig.worker.start()
    until(lambda: rig.serial(NAME) is not None)
    assert_made_once(rig, left)
    rig.worker.stop()


def assert_made_once(rig: Rig, left: Row[Any]) -> None:
    done = rig.issuance(NAME)
    assert (done.id, done.spki_sha256) == (left.id, left.spki_sha256)
    assert (rig.accounts(), rig.orders(), len(rig.ledger())) == (1, 1, 1)
    assert keys_lost(rig) == []


# -- B03, G10: SIGTERM while the CA is asked -----------------------------------------------------------

RECORDED = [
    ("sqlite", "newOrder", State.ORDERED),
    ("sqlite", "challenge", State.FINALIZING),  # what the CA validates is seen through
    ("postgresql", "finalize", State.FINALIZING),
    ("sqlite", "certificate", State.DONE),
]
"""What is committed at least: the crew is told to stop a moment after the service."""


@pytest.mark.parametrize(("rig", "route", "recorded"), RECORDED, indirect=["rig"])
def test_a_stop_finishes_the_action_under_way(rig: Rig, route: str, recorded: State) -> None:
    """It is recorded, the lease is given back, and the next start asks for nothing twice."""
    hold = hold_at(rig, route)
    told_to_stop(rig)
    hold.release()

    assert rig.worker.wait() == 0
    left = rig.issuance(NAME)
    assert (left.lease_owner, left.crashes) == (None, 0)
    assert list(State).index(State(left.state)) >= list(State).index(recorded)
    assert rig.db.read(lambda tx: tx.execute(select(workers)).all()) == []
    if left.state == State.DONE:
        assert_made_once(rig, left)
    else:
        assert_goes_on(rig, left)
    for act in ("newAccount", "newOrder", "challenge", "finalize"):
        assert len(rig.proxy.seen(act)) == 1


@ON_SQLITE
def test_a_stop_does_not_wait_for_a_ca_that_hangs(rig: Rig) -> None:
    """The CA has issued, and its answer never comes: the lease is given back all the same."""
    hold_at(rig, "finalize", answered=True)
    rig.worker.send(signal.SIGTERM)

    assert rig.worker.wait(30) == 0
    left = rig.issuance(NAME)
    assert (left.state, left.lease_owner, left.crashes) == (State.FINALIZING, None, 0)
    assert_goes_on(rig, left)


# -- B04: a second signal, and a stop without the database ---------------------------------------------


@pytest.mark.parametrize("rig", ["postgresql-guarded"], indirect=True)
def test_a_second_signal_ends_it_at_once(rig: Rig) -> None:
    """Even when the database says nothing more; the lease is freed by the next start in the same place."""
    hold_at(rig, "finalize", answered=True)
    rig.guard.stall()
    told_to_stop(rig)
    time.sleep(AFTER_ECHO)
    rig.worker.send(signal.SIGTERM)

    assert rig.worker.wait(5) == 128 + signal.SIGTERM
    rig.guard.resume()
    left = rig.issuance(NAME)
    assert (left.state, left.lease_owner is None) == (State.FINALIZING, False)
    assert_goes_on(rig, left)


@pytest.mark.parametrize("rig", ["postgresql-guarded"], indirect=True)
def test_a_stop_without_the_database(rig: Rig) -> None:
    """It ends in order, says that the leases were not given back, and they are found by the next start."""
    hold = hold_at(rig, "finalize")
    rig.guard.refuse()
    rig.worker.send(signal.SIGTERM)
    hold.release()

    assert rig.worker.wait() == 0
    assert "leases.not_given_back" in rig.worker.said()
    rig.guard.resume()
    assert_goes_on(rig, rig.issuance(NAME))


# -- B07, B08, B09: nothing can be written -------------------------------------------------------------


@contextmanager
def limited(pid: int, what: int, soft: int) -> Iterator[None]:
    """Lower a limit of a process that runs, and give it back what it had."""
    before, hard = resource.prlimit(pid, what, (soft, resource.prlimit(pid, what)[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, what, (before, hard))


def failed_steps(rig: Rig) -> int:
    return rig.worker.said().count('"step.failed"')


@ON_SQLITE
def test_no_order_without_space_for_it(rig: Rig) -> None:
    """The files of SQLite cannot grow: nothing more is sent to the CA until they can."""
    hold = hold_at(rig, "newAccount")
    wal, log = Path(f"{rig.db.engine.url.database}-wal"), rig.worker.log_path
    most = wal.stat().st_size
    assert log.stat().st_size < most // 2  # it has room for what is said meanwhile
    with limited(rig.worker.pid, resource.RLIMIT_FSIZE, most), OneActive(rig.url):
        hold.release()
        until(lambda: "issuers.database" in rig.worker.said())
        posts, failed = rig.proxy.posts(), failed_steps(rig)
        until(lambda: failed_steps(rig) >= failed + 3)
        assert (rig.orders(), rig.proxy.posts()) == (0, posts)
    until(lambda: rig.serial(NAME) is not None)
    assert_all_well(rig)
    assert (rig.accounts(), rig.orders()) == (1, 1)
    rig.worker.stop()


@ON_SQLITE
def test_a_log_that_cannot_be_written(rig: Rig) -> None:
    """Whoever reads it has no space left: certificates are issued, and the exit code is that of the work."""
    rig.worker.under = ("sh", "-c", 'exec "$@" 2> /dev/full', "sh")
    rig.want(NAME)
    rig.worker.start()
    until(lambda: rig.serial(NAME) is not None)
    assert_all_well(rig)

    rig.worker.stop()
    assert rig.worker.said() == ""


@ON_SQLITE
@pytest.mark.parametrize("read_only", ["certworker.db", "."])
def test_a_database_that_is_read_only(rig: Rig, read_only: str) -> None:
    """The start is refused in one line, and the CA hears nothing."""
    path = Path(rig.box.environ["CERTWORKER_DATA_DIR"]) / read_only
    mode = path.stat().st_mode
    rig.want(NAME)
    if os.geteuid() == 0:  # who else is held to a file's mode
        rig.worker.under = ("setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override")
    path.chmod(mode & ~0o222)
    try:
        rig.worker.start()
        assert rig.worker.wait() == 1
    finally:
        path.chmod(mode)

    said = rig.worker.said()
    assert said.splitlines()[-1].startswith("certworker: cannot ")
    assert re.search("check who owns (its|the) file and (its )?folder, and how they are mounted$", said)
    assert "Traceback" not in said
    assert rig.proxy.exchanges == []


# -- B17, B22: too little time, too few descriptors ----------------------------------------------------


@pytest.mark.parametrize("rig", ["postgresql"], indirect=True)
def test_a_worker_that_is_slow(rig: Rig) -> None:
    """It stands still for half a second again and again: late everywhere, and not too late anywhere."""
    rig.want(NAME)
    rig.worker.start()
    for route in ("newAccount", "newOrder", "authorization", "challenge", "order", "finalize", "certificate"):
        stand_still(rig, route)
    until(lambda: rig.serial(NAME) is not None)
    assert_all_well(rig)

    assert (rig.accounts(), rig.orders(), rig.issuance(NAME).claims) == (1, 1, 1)
    assert "lease_lost" not in rig.worker.said()
    rig.worker.stop()


def stand_still(rig: Rig, route: str) -> None:
    """Stop the worker for half a second once it has asked for this."""
    until(lambda: rig.proxy.seen(route))
    rig.worker.freeze()
    time.sleep(0.5)
    rig.worker.thaw()


@ON_SQLITE
def test_no_descriptor_is_left(rig: Rig) -> None:
    """The CA looks while the worker can take no connection: it waits for a moment, and the name is not lost."""
    rig.worker.under = ("prlimit", "--nofile=64:64")
    hold = hold_at(rig, "challenge")
    with limited(rig.worker.pid, resource.RLIMIT_NOFILE, 1):
        hold.release()
        until(lambda: f"Attempting to validate w/ HTTP: http://{NAME}" in rig.ca.log_path.read_text())
        time.sleep(1)  # long enough for a loop that runs hot to be seen
        assert rig.serial(NAME) is None
    until(lambda: rig.serial(NAME) is not None)

    assert_all_well(rig)
    assert (rig.accounts(), rig.orders(), len(rig.issuances(NAME))) == (1, 1, 1)
    assert "out of system resource" not in rig.worker.said()
    rig.worker.stop()


# -- B19: a bug in one job -----------------------------------------------------------------------------


@ON_SQLITE
def test_rows_that_cannot_be_read(rig: Rig) -> None:
    """Bytes for a chain, a number without end for a name: each is told of at its row, and the neighbours are issued."""
    far = "2036-01-01T00:00:00.000000Z"
    strange = {"id": new_id(), "pem": b"\xff\x00", "far": far}
    endless = {"id": new_id(), "domains": f"[1{'0' * 5000}]"}
    write(rig, "INSERT INTO certificates (id, domain, cert_pem, key_pem, expires_at, status) "
          "VALUES (:id, 'strange.test', :pem, :pem, :far, 'active')", strange)  # fmt: skip
    write(rig, "INSERT INTO tls_policies (id, mode, domains, status) "
          "VALUES (:id, 'auto', :domains, 'pending')", endless)  # fmt: skip
    rig.want(NAME)
    rig.worker.start()
    until(lambda: rig.serial(NAME) is not None)
    rig.want(f"later.{NAME}")
    until(lambda: rig.serial(f"later.{NAME}") is not None)

    assert status_of(rig, certificates, strange) == "error"
    assert status_of(rig, tls_policies, endless) == "error"
    assert rig.worker.said().count('"reconcile.bug"') == 1
    assert "1000000" in rig.box.run("status").stdout
    rig.worker.stop()


def write(rig: Rig, statement: str, values: dict[str, object]) -> None:
    """Write a row as another program may."""
    rig.db.write(lambda tx: tx.execute(text(statement), values))


def status_of(rig: Rig, table: Table, values: dict[str, object]) -> object:
    return rig.db.read(lambda tx: tx.execute(select(table.c.status).where(table.c.id == values["id"])).scalar())
