"""What a worker is made of: CA, gate, bench, responder, listener, node API and embedded node, from an App.

Only what issues or serves imports this: a command that reads the database starts in half the time without it.
"""

import hashlib
import os
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from certworker.ca.client import Client, ExternalAccount
from certworker.ca.transport import Transport
from certworker.responder import Responder
from certworker.settings import Settings
from certworker.steps.barrier import Barrier
from certworker.steps.crew import Crew
from certworker.steps.gate import Gate
from certworker.steps.pace import Pace, Paces
from certworker.steps.register import Accounts, Registration
from certworker.steps.session import Bench, Session
from certworker.store import challenges
from certworker.store.journal import Journal
from certworker.store.listen import Listener
from certworker.wiring import App

if TYPE_CHECKING:
    from certworker.api.node import NodeApi
    from certworker.node.agent import Agent
    from certworker.resolver import Addresses


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
        app.clock, Paces(Pace(), Pace()), random.SystemRandom().random, lambda name: _look_up(name, s.dns_resolver),
        lambda name: _look_up_caa(name, s.dns_resolver),
        Barrier(app.db, s.node_silent).why_not,
        moved,
    )  # fmt: skip


def _look_up(dns_name: str, server: str | None) -> "Addresses":
    from certworker.resolver import look_up  # dnspython is slow to import, and only failures need it

    return look_up(dns_name, server)


def _look_up_caa(dns_name: str, server: str | None) -> str:
    from certworker.resolver import look_up_caa  # likewise

    return look_up_caa(dns_name, server)


def make_responder(app: App, crew: Crew) -> Responder:
    """Return the responder, not started; it answers any live token of the database."""
    host, _, port = app.settings.responder_listen.rpartition(":")
    return Responder(
        host.strip("[]"),
        int(port),
        lambda token: app.db.read(lambda tx: challenges.find_key_authorization(tx, token)),
        crew.fetched,
        at_hand=crew.answer,
    )


def make_node_api(app: App) -> "NodeApi | None":
    """Return the node API, not started; None without NODE_LISTEN."""
    s = app.settings
    if s.node_listen is None:
        return None
    from certworker.api.node import NodeApi, make_tls  # FastAPI is slow to import, and few have a node API
    from certworker.steps.fleet import Fleet
    from certworker.steps.identity import take_identity

    identity = take_identity(app.db, app.sealer)
    tls = make_tls(identity.certificate_pem, identity.key_pem)
    return NodeApi(s.node_listen, Fleet(app.db, app.sealer, app.clock, s.node_silent), tls)


def make_agent(app: App) -> "Agent | None":
    """Return the embedded node's agent, None if this machine has no proxy to manage."""
    s = app.settings
    if s.embedded_node == "none":
        return None
    # As slow to import as half of the rest, and the proxies of many workers are on other machines.
    from certworker.node.agent import Agent
    from certworker.node.folder import Folder
    from certworker.node.patience import Patience
    from certworker.outpost import make_proxy
    from certworker.source import DatabaseSource

    folder, patience = Folder(s.data_dir / "node"), Patience()
    proxy = make_proxy(s.embedded_node, s, folder, patience)
    return Agent(s.node_name, DatabaseSource(app), folder, proxy, patience, random.SystemRandom())
