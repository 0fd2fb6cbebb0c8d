"""A worker's steps in this process, against a real Pebble behind the fault proxy, in a time that tests move.

Database, transport, responder and CA are real; only waiting is not.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from certworker.ca.transport import Transport
from certworker.cli.pebble import HOST, Issued, Pebble
from certworker.responder import Responder
from certworker.steps.reconcile import Wanted
from certworker.steps.register import Registration
from certworker.store import challenges
from certworker.store.database import Database
from certworker.store.lineages import Issuer
from tests.steps.life import MINUTE, Life, unsynced
from tests.steps.world import World

from .proxy import Exchange, FaultProxy

_REAL_PAUSE = 0.03
"""Seconds that a CA has for its own work wherever an issuance waits for it."""


class Behind:
    """A CA on the network, as far as a `World` wants to know it."""

    def __init__(self, directory_url: str, transport: Transport) -> None:
        self.directory_url = directory_url
        self.http = transport
        self.request = transport.request


class Lab(Life):
    """A life against a real CA; the world's clock is right when it begins."""

    def __init__(self, world: World, ca: Pebble, proxy: FaultProxy, transport: Transport) -> None:
        world.clock.now = datetime.now(UTC)
        super().__init__(world)
        self.ca = ca
        self.proxy = proxy
        self._issued_before = len(ca.ledger())
        self.ask_at(proxy.directory_url, transport)

    def ask_at(self, directory_url: str, transport: Transport) -> None:
        """Be a worker with other settings: this CA, asked like this."""
        self.world.ca = Behind(directory_url, transport)  # type: ignore[assignment]
        self.world.wanted = Wanted(Issuer(directory_url, "", "ecdsa-p256"), private_ca=True)
        self.world.registration = Registration(directory_url, terms_agreed=True, private_ca=True)
        self.restart()

    def wait(self, until: datetime) -> None:
        super().wait(until)
        time.sleep(_REAL_PAUSE)

    def want(self, *names: str) -> None:
        """Want a certificate for each of these, and let it be queued."""
        self.world.add_policy(*names)
        self.world.take_over()

    def issue(self, name: str, within: timedelta = timedelta(minutes=2)) -> None:
        """Want a certificate and work on it until it serves, but no longer than this."""
        self.want(name)
        give_up_at = self.clock() + within
        while self.clock() < give_up_at and not self.is_active(name):
            self.run(MINUTE)

    def make_due(self) -> None:
        """Let everything be tried now: a CA's orders live by its own clock, so days cannot pass here."""
        self.world.execute("UPDATE lineages SET renew_at = created_at, next_check_at = created_at")

    def ledger(self) -> list[Issued]:
        """Return what the CA issued since this began."""
        return self.ca.ledger()[self._issued_before :]

    def is_active(self, name: str) -> bool:
        return self.world.lineage(name).status == "active"

    def error(self, name: str) -> dict[str, Any]:
        """Return what an operator is shown of a name."""
        return self.world.lineage(name).error or {}

    def seen(self, route: str) -> list[Exchange]:
        return self.proxy.seen(route)


@contextmanager
def lab_at(db: Database, ca: Pebble, proxy: FaultProxy, time_limit: timedelta = timedelta(seconds=30)) -> Iterator[Lab]:
    """Make a lab on an SQLite database; its responder listens where the CA looks."""
    world, transport = unsynced(db), Transport(proxy.ca_bundle, time_limit=time_limit)

    def find(token: str) -> str | None:
        return db.read(lambda tx: challenges.find_key_authorization(tx, token))

    responder = Responder(HOST, ca.http_port, find, lambda _token: None)
    responder.start()
    try:
        yield Lab(world, ca, proxy, transport)
    finally:
        responder.stop()
        transport.close()
