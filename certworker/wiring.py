"""From settings to an App: the open database and its key, which every command needs; `parts` makes the rest of it."""

import os
import pwd
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from certworker.clock import DatabaseClock, system_clock
from certworker.core.gateway_rows import Defaults
from certworker.errors import CertworkerError, SealError, SettingsError
from certworker.settings import Settings
from certworker.steps.reconcile import Wanted
from certworker.store import settings_kv, workers
from certworker.store.database import (
    SCHEMA_REVISION,
    Database,
    Transaction,
    open_database,
    schema_revision,
    sqlite_path,
)
from certworker.store.lineages import Issuer
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
        return Defaults(
            timedelta(seconds=s.health_check_interval_secs),
            timedelta(milliseconds=s.health_check_timeout_ms),
            tuple(s.responder_addresses),
            s.own_addresses,
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
