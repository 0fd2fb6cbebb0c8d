"""From settings to working parts: the only place that constructs things.

`open_app` is what every command needs; the rest is made when a command asks for it, so that a short one
does not pay for what a long one uses.
"""

import hashlib
import os
import pwd
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

from certworker.api.node import NodeApi, make_tls
from certworker.ca.client import Client, ExternalAccount
from certworker.ca.transport import Transport
from certworker.clock import DatabaseClock, system_clock
from certworker.core.delivery import EVERYTHING, collect_changes
from certworker.core.gateway import Defaults
from certworker.core.rollout import CertificateChanges, Cursor, Heartbeat
from certworker.core.snapshot import read_snapshot
from certworker.errors import CertworkerError, SealError, SettingsError
from certworker.node.agent import Agent
from certworker.node.control import PublishedVersion
from certworker.node.folder import Folder
from certworker.node.patience import Patience
from certworker.outpost import make_proxy
from certworker.resolver import look_up, look_up_caa
from certworker.responder import Responder
from certworker.settings import Settings
from certworker.steps import barrier
from certworker.steps.deliver import read_changes
from certworker.steps.fleet import Fleet
from certworker.steps.gate import Gate
from certworker.steps.identity import take_identity
from certworker.steps.reconcile import Wanted
from certworker.steps.register import Accounts, Registration
from certworker.steps.session import Bench, Session
from certworker.store import (
    challenges,
    nodes,
    settings_kv,
    versions,
    workers,
)
from certworker.store.database import (
    SCHEMA_REVISION,
    Database,
    Transaction,
    open_database,
    schema_revision,
    sqlite_path,
)
from certworker.store.lineages import Issuer
from certworker.store.listen import Listener
from certworker.store.role import Place, WorkerRole
from certworker.store.seal import Sealer, make_kek, read_kek

_KEK_WORD = "certworker"


@dataclass(frozen=True, slots=True)
class App:
    """What every command works with."""

    settings: Settings
    db: Database
    sealer: Sealer
    clock: DatabaseClock

    def close(self) -> None:
        """Close the database."""
        self.db.close()

    @property
    def wanted(self) -> Wanted:
        """What certificates are made for."""
        s = self.settings
        return Wanted(Issuer(s.acme_directory_url, s.acme_profile or "", s.key_type), s.acme_private_ca)

    @property
    def defaults(self) -> Defaults:
        """What the gateway's rows leave open."""
        s = self.settings
        own = (s.api_listen, s.responder_listen, *s.responder_addresses)
        return Defaults(
            timedelta(seconds=s.health_check_interval_secs),
            timedelta(milliseconds=s.health_check_timeout_ms),
            tuple(s.responder_addresses),
            own if s.node_listen is None else (*own, s.node_listen),
        )

    @property
    def leave_out(self) -> bool:
        """Whether the gateway is published without the rows that break a rule."""
        return self.settings.on_bad_row == "leave_out"


Upgrade = Callable[[Database], tuple[str | None, str | None]]
"""`store.schema.upgrade`: returns the revisions before and after. Handed in, because it is slow to import."""


def initialise(settings: Settings, upgrade: Upgrade) -> list[str]:
    """Make data folder, database and key-encryption key; return a line for each thing that was made.

    Safe to repeat: what is there stays.
    """
    made = []
    if not settings.data_dir.is_dir():
        settings.data_dir.mkdir(parents=True, mode=0o700)
        made.append(f"data folder {settings.data_dir}")
    db = open_database(settings.database_url)
    try:
        kek_file = kek_path(settings)
        # First the key, then the schema: a database without its key must not look finished.
        if settings.seal == "on" and not kek_file.exists():
            _refuse_new_key_for_old_database(db, kek_file)
            make_kek(kek_file)
            made.append(f"key-encryption key {kek_file}: keep a copy of it apart from the database's backups")
        made += _upgrade(settings, db, upgrade)
        _check_kek(db, make_sealer(settings))
    finally:
        db.close()
    return made


def _upgrade(settings: Settings, db: Database, upgrade: Upgrade) -> list[str]:
    """Migrate unless there is nothing to do; on SQLite only while no worker runs."""
    if db.read(schema_revision) == SCHEMA_REVISION:
        return []
    path = sqlite_path(settings.database_url)
    role = None if path is None else WorkerRole.take(path, system_clock())
    try:
        before, after = upgrade(db)
    finally:
        if role is not None:
            role.give_up()
    return [f"database schema {after}" + (f" (was {before})" if before else "")]


def open_app(settings: Settings) -> App:
    """Open the database and the key, or say in one error what is missing; no work is done before."""
    path = sqlite_path(settings.database_url)
    if path is not None and not path.exists():
        raise SettingsError(f"there is no database {path} yet: run `certworker init`, or check DATA_DIR")
    db = open_database(settings.database_url)
    try:
        db.check_schema()
        sealer = make_sealer(settings)
        _check_kek(db, sealer)
        return App(settings, db, sealer, DatabaseClock(db.now))
    except CertworkerError:
        db.close()
        raise


def operator() -> str:
    """Return who calls, for versions and audit rows: whoever called sudo, else the user of this process.

    It is a note, no proof: whoever may write to the database may write any name.
    """
    try:
        name = os.environ.get("SUDO_USER") or pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a user id without an entry, as in some containers
        name = ""
    return name[:100] if name.isprintable() and name else "operator"


def kek_path(settings: Settings) -> Path:
    """Return where the key-encryption key is."""
    return settings.kek_file or settings.data_dir / "kek"


def make_sealer(settings: Settings) -> Sealer:
    """Return what seals and opens keys; with SEAL=off a key file that is there still opens old values."""
    sealing = settings.seal == "on"
    path = kek_path(settings)
    return Sealer(read_kek(path) if sealing or path.exists() else None, sealing=sealing)


def take_role(app: App) -> WorkerRole | None:
    """Take the worker role of an embedded database; None for PostgreSQL, which needs none."""
    path = sqlite_path(app.settings.database_url)
    return None if path is None else WorkerRole.take(path, app.clock())


def take_place(app: App) -> Place | None:
    """Take the place of this data folder, by which the next worker in it knows that this one is dead."""
    return None if app.db.embedded else Place.take(app.settings.data_dir)


def make_listener(app: App, on_notice: Callable[[str], object]) -> Listener | None:
    """Return what hears of new rows, not started; an embedded database has one worker, which knows."""
    return None if app.db.embedded else Listener(app.settings.database_url, on_notice)


def refuse_other_issuer(app: App) -> None:
    """Raise SettingsError if a live service works with another CA, profile or key type on this database.

    A command whose settings are incomplete would otherwise move every policy to the default CA.
    """
    used, ours = app.db.read(lambda tx: settings_kv.find(tx, settings_kv.ISSUER)), app.wanted.fingerprint
    if used not in (None, ours) and app.db.read(workers.alive):
        raise SettingsError(
            f"the service on this database issues from {used}, these settings say {ours}: "
            "give the command the service's settings, or stop the service to change them"
        )


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
        app.db, accounts.client, accounts, make_gate(app, worker_id), s.acme_rate_limits, app.sealer, app.clock,
        random.SystemRandom().random, lambda name: look_up(name, s.dns_resolver),
        lambda name: look_up_caa(name, s.dns_resolver),
        lambda names, thumbprint: app.db.read(lambda tx: barrier.why_not(tx, names, thumbprint, s.node_silent)),
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


def make_node_api(app: App) -> NodeApi | None:
    """Return the node API, not started; None without NODE_LISTEN."""
    s = app.settings
    if s.node_listen is None:
        return None
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
        return PublishedVersion(found.id, found.number or 0, read_snapshot(found.snapshot_json))

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


def _refuse_new_key_for_old_database(db: Database, kek_file: Path) -> None:
    """A new key beside a database that was sealed with another one would hide that the old one is lost."""

    def sealed_before(tx: Transaction) -> bool:
        return settings_kv.is_there(tx) and settings_kv.find(tx, settings_kv.KEK_CHECK) is not None

    if db.read(sealed_before):
        raise SealError(
            f"the database was sealed with a key-encryption key that is not at {kek_file}: "
            "restore that file from your backup, or set KEK_FILE to it"
        )


def _check_kek(db: Database, sealer: Sealer) -> None:
    """Open a word that was sealed when the database was made: a wrong key is found before any work."""
    place = {"table": "settings_kv", "column": "value", "row_id": settings_kv.KEK_CHECK}
    sealed = db.read(lambda tx: settings_kv.find(tx, settings_kv.KEK_CHECK))
    if sealed is not None:
        sealer.open(sealed, **place)
    elif sealer.sealing:
        db.write(lambda tx: settings_kv.put(tx, settings_kv.KEK_CHECK, sealer.seal(_KEK_WORD, **place)))
