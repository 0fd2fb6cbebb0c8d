"""What a worker is made of: CA, gate, bench, responder, listener, node API and embedded node, from an App.

Only what issues or serves imports this: a command that reads the database starts in half the time without it.
"""

import hashlib
import os
import random
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING

from certworker.ca.client import Client, ExternalAccount
from certworker.ca.transport import Transport
from certworker.core.delivery import EVERYTHING, collect_changes
from certworker.core.rollout import CertificateChanges, Cursor, Heartbeat
from certworker.core.snapshot import read_snapshot
from certworker.errors import InputError, VersionRefused
from certworker.node.agent import Agent
from certworker.node.control import PublishedVersion
from certworker.node.folder import Folder
from certworker.node.patience import Patience
from certworker.outpost import make_proxy
from certworker.resolver import look_up, look_up_caa
from certworker.responder import Responder
from certworker.settings import Settings
from certworker.steps.barrier import Barrier
from certworker.steps.deliver import read_changes
from certworker.steps.fleet import Fleet
from certworker.steps.gate import Gate
from certworker.steps.identity import take_identity
from certworker.steps.pace import Pace, Paces
from certworker.steps.register import Accounts, Registration
from certworker.steps.session import Bench, Session
from certworker.store import challenges, nodes, versions
from certworker.store.journal import Journal
from certworker.store.listen import Listener
from certworker.wiring import App

if TYPE_CHECKING:
    from certworker.api.node import NodeApi


def make_listener(app: App, on_notice: Callable[[str], object]) -> Listener | None:
    """Return what hears of new rows, not started; an embedded database has one worker, which knows."""
    return None if app.db.embedded else Listener(app.settings.database_url, on_notice)


def make_accounts(app: App) -> Accounts:
    """Return the accounts at the CA of the settings."""
    s = app.settings
    client = Client(s.acme_directory_url, Transport(s.acme_ca_bundle, os.environ), app.clock)
    external = ExternalAccount(s.acme_eab_kid, _eab_secret(s)) if s.acme_eab_kid else None
    registration = Registration(
        s.acme_directory_url, tuple(s.acme_contact), s.acme_tos_agreed, external, s.acme_private_ca,
        s.acme_rate_limits,
    )  # fmt: skip
    return Accounts(app.db, client, app.sealer, app.clock, registration)


def _eab_secret(settings: Settings) -> str:
    return settings.acme_eab_hmac_key.get_secret_value() if settings.acme_eab_hmac_key else ""


def make_gate(app: App, worker_id: str) -> Gate:
    """Return this worker's side of the circuit breaker at the CA of the settings."""
    s = app.settings
    made_with = [s.acme_directory_url, *s.acme_contact, str(s.acme_tos_agreed), s.acme_eab_kid or "", _eab_secret(s)]
    fingerprint = hashlib.sha256("\0".join(made_with).encode()).hexdigest()
    return Gate(app.db, s.acme_directory_url, app.clock, random.SystemRandom().random, worker_id, fingerprint)


def make_bench(app: App, worker_id: str, moved: Callable[[Session], None]) -> Bench:
    """Return what issuances are made with."""
    s, accounts = app.settings, make_accounts(app)
    return Bench(
        app.db, Journal(app.db), accounts.client, accounts, make_gate(app, worker_id), s.acme_rate_limits, app.sealer,
        app.clock, Paces(Pace(), Pace()), random.SystemRandom().random, lambda name: look_up(name, s.dns_resolver),
        lambda name: look_up_caa(name, s.dns_resolver),
        Barrier(app.db, s.node_silent).why_not,
        moved,
    )  # fmt: skip


def make_responder(app: App, on_fetch: Callable[[str], object]) -> Responder:
    """Return the responder, not started; it answers any live token of the database."""
    host, _, port = app.settings.responder_listen.rpartition(":")
    return Responder(
        host.strip("[]"),
        int(port),
        lambda token: app.db.read(lambda tx: challenges.find_key_authorization(tx, token)),
        on_fetch,
    )


def make_node_api(app: App) -> "NodeApi | None":
    """Return the node API, not started; None without NODE_LISTEN."""
    s = app.settings
    if s.node_listen is None:
        return None
    from certworker.api.node import NodeApi, make_tls  # FastAPI is slow to import, and few have a node API

    identity = take_identity(app.db, app.sealer)
    tls = make_tls(identity.certificate_pem, identity.key_pem)
    return NodeApi(s.node_listen, Fleet(app.db, app.sealer, app.clock, s.node_silent), tls)


def make_agent(app: App) -> Agent | None:
    """Return the embedded node's agent, None if this machine has no proxy to manage."""
    s = app.settings
    if s.embedded_node == "none":
        return None
    folder, patience = Folder(s.data_dir / "node"), Patience()
    proxy = make_proxy(s.embedded_node, s, folder, patience)
    return Agent(s.node_name, DatabaseSource(app), folder, proxy, patience, random.SystemRandom())


class DatabaseSource:
    """What an embedded node asks: the database itself. A `node.control.Source`."""

    def __init__(self, app: App) -> None:
        self._app = app

    def published(self) -> PublishedVersion | None:
        found = self._app.db.read(versions.find_published)
        if found is None:
            return None
        try:
            return PublishedVersion(found.id, found.number or 0, read_snapshot(found.snapshot_json))
        except InputError as refused:
            raise VersionRefused(
                f"version {found.number} cannot be read: {refused}; another program or a newer release wrote it, "
                "`certworker config publish` serves the rows instead"
            ) from None

    def changes_after(self, cursor: Cursor) -> CertificateChanges:
        db, sealer = self._app.db, self._app.sealer
        return collect_changes(
            lambda after, continued: db.read(
                lambda tx: read_changes(tx, sealer, after, EVERYTHING, continued=continued)
            ),
            cursor,
        )

    def report(self, heartbeat: Heartbeat) -> None:
        self._app.db.write(lambda tx: nodes.record(tx, heartbeat, f"certworker {version('certworker')}"))
