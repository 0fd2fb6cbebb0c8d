"""What must hold whatever has died: nothing lost, nothing twice, nothing stuck, nothing told.

Each takes the database as it is, and what the CA itself says; none asks the program.
"""

import re
import sqlite3
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

import psycopg
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.verification import PolicyBuilder, Store
from psycopg import sql
from sqlalchemy import func, select, update

from certworker.ca.csr import spki_sha256
from certworker.store.database import Database, open_database, sqlite_path
from certworker.store.seal import Sealer, read_kek
from certworker.store.tables import acme_accounts, audit_logs, certificates, challenges, issuances, lineages
from tests.flow.box import until
from tests.test_leaks import Secret

from .worker import Rig, kek_path

_SAMPLE = 0.2
_LEASE = timedelta(seconds=60)


class OneActive:
    """O1: sampled while the block lasts, no lineage has two active certificates, nor none after its first."""

    def __init__(self, url: str) -> None:
        self._db = open_database(url)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="one-active")
        self.samples = 0
        self.faults: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._db.close()
        assert kind is not None or self.faults == []

    def _watch(self) -> None:
        served: set[str] = set()
        while not self._over.wait(_SAMPLE):
            active = self._sample()
            self.faults += [f"lineage {one}: {count} active certificates" for one, count in active.items() if count > 1]
            self.faults += [f"lineage {one}: no active certificate any more" for one in served - set(active)]
            served |= set(active)
            self.samples += 1

    def _sample(self) -> dict[str, int]:
        query = select(certificates.c.lineage_id, func.count()).group_by(certificates.c.lineage_id)
        active = query.where(certificates.c.status == "active", certificates.c.lineage_id.is_not(None))
        return {row[0]: row[1] for row in self._db.read(lambda tx: tx.execute(active).all())}


def assert_pairs(rig: Rig) -> None:
    """O2: every certificate fits its key, has the names of its lineage, and leads to the CA's root."""
    query = select(certificates, lineages.c.dns_names.label("wanted")).join(
        lineages, lineages.c.id == certificates.c.lineage_id
    )
    trusted = Store(x509.load_pem_x509_certificates(rig.ca.root_pem().encode()))
    for row in rig.db.read(lambda tx: tx.execute(query).all()):
        assert set(re.findall(r"-----BEGIN (.*?)-----", row.cert_pem)) == {"CERTIFICATE"}
        leaf, *intermediates = x509.load_pem_x509_certificates(row.cert_pem.encode())
        for name in row.wanted:
            PolicyBuilder().store(trusted).build_server_verifier(x509.DNSName(name)).verify(leaf, intermediates)
        san = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert sorted(san.get_values_for_type(x509.DNSName)) == sorted(row.wanted)
        assert _fits(rig.sealer, "certificates", row.id, row.key_pem, leaf)


def keys_lost(rig: Rig) -> list[str]:
    """O3: return the serials in the CA's ledger for which the database has no key that fits."""
    kept = list(_kept_serials(rig))
    return [issued.serial for issued in rig.ledger() if int(issued.serial, 16) not in kept]


def _kept_serials(rig: Rig) -> Iterator[int]:
    query = select(issuances.c.id, issuances.c.chain_pem, issuances.c.key_pem).where(issuances.c.chain_pem.is_not(None))
    for row in rig.db.read(lambda tx: tx.execute(query).all()):
        leaf = x509.load_pem_x509_certificates(row.chain_pem.encode())[0]
        if _fits(rig.sealer, "issuances", row.id, row.key_pem, leaf):
            yield leaf.serial_number


def _fits(sealer: Sealer, table: str, row_id: str, key_pem: str, leaf: x509.Certificate) -> bool:
    opened = sealer.open(key_pem, table=table, column="key_pem", row_id=row_id)
    key = load_pem_private_key(opened.encode(), None)
    return spki_sha256(key.public_key()) == spki_sha256(leaf.public_key())  # type: ignore[arg-type]


def assert_nothing_stuck(db: Database) -> None:
    """O4: what is open has its next attempt ahead, no lease outlives its owner, no token its issuance."""
    now = datetime.now(UTC)
    is_open = issuances.c.closed_at.is_(None)
    overdue = select(issuances.c.id).where(is_open, issuances.c.attempt_at <= now)
    stale = select(issuances.c.id).where(issuances.c.lease_until < now - 2 * _LEASE)
    dangling = select(challenges.c.token).join(issuances).where(~is_open)
    for query in (overdue, stale, dangling):
        assert db.read(lambda tx, query=query: tx.execute(query).all()) == []  # type: ignore[misc]


def assert_audited(db: Database) -> None:
    """O7: every activation has one row in the audit log, and there is none of something that was not."""
    activated = db.read(lambda tx: tx.execute(select(issuances.c.serial).where(issuances.c.state == "done")).scalars())
    flips = select(audit_logs.c.diff).where(audit_logs.c.action == "certificate.active")
    noted = db.read(lambda tx: [row.diff["after"]["serial"] for row in tx.execute(flips)])
    assert Counter(noted) == Counter(activated)


def assert_quiet(rig: Rig) -> None:
    """O12: one more scan of everything sends no POST and queues nothing."""
    posts, moment = rig.proxy.posts(), datetime.now(UTC)
    due = lineages.c.next_check_at.is_not(None)
    rig.db.write(lambda tx: tx.execute(update(lineages).where(due).values(next_check_at=moment)))
    unscanned = select(func.count()).where(lineages.c.next_check_at <= moment)
    until(lambda: rig.db.read(lambda tx: tx.execute(unscanned).scalar()) == 0)
    still_open = select(func.count()).where(issuances.c.closed_at.is_(None))
    assert rig.db.read(lambda tx: tx.execute(still_open).scalar()) == 0
    assert rig.proxy.posts() == posts


def assert_all_well(rig: Rig, wanted: int = 1) -> None:
    """O2 to O5, O7 and O12 of a rig that runs: so many certificates of the CA's, and nothing else."""
    assert_quiet(rig)
    assert len(rig.ledger()) == wanted
    assert keys_lost(rig) == []
    assert_pairs(rig)
    assert_nothing_stuck(rig.db)
    assert_audited(rig.db)
    assert leaks(rig) == []


# -- O5 -----------------------------------------------------------------------------------------------


def leaks(rig: Rig) -> list[str]:
    """O5: return where a secret of this rig is found: logs, requests and answers, the database, files, /proc."""
    secrets = list(secrets_of(rig))
    found = []
    for place, content in _places(rig):
        found += [f"{place}: {secret.name}" for secret in secrets if secret.is_in(content)]
        found += [f"{place}: PEM of a key"] * (b"PRIVATE KEY" in content)
    return found


def secrets_of(rig: Rig) -> Iterator[Secret]:
    """Return everything of this rig that must be nowhere in plain form."""
    yield Secret.of_bytes("key-encryption key", read_kek(kek_path(rig)))
    for table in (certificates, issuances):
        query = select(table.c.id, table.c.key_pem).where(table.c.key_pem.is_not(None))
        for row in rig.db.read(lambda tx, query=query: tx.execute(query).all()):  # type: ignore[misc]
            pem = rig.sealer.open(row.key_pem, table=table.name, column="key_pem", row_id=row.id)
            yield Secret.of_key(f"{table.name} {row.id}", pem)
    for row in rig.db.read(lambda tx: tx.execute(select(acme_accounts)).all()):
        sealed = row.credentials_json["key"]
        pem = rig.sealer.open(sealed, table="acme_accounts", column="credentials_json", row_id=row.id)
        yield Secret.of_key(f"account {row.id}", pem)


def _places(rig: Rig) -> Iterator[tuple[str, bytes]]:
    yield "log", rig.worker.said().encode()
    yield "ledger", rig.ca.log_path.read_bytes()
    if rig.worker.process is not None:
        yield "command line", rig.worker.command_line().encode()
    for exchange in list(rig.proxy.exchanges):
        said = b"" if exchange.answer is None else exchange.answer.body
        yield f"{exchange.method} {exchange.path}", exchange.body + b"\n" + repr(exchange.payload).encode() + said
    yield "database", _dump(rig.url)
    for path in Path(rig.box.environ["CERTWORKER_DATA_DIR"]).rglob("*"):
        # The pairs of a proxy are where they belong.
        if path.is_file() and path.parent.name != "certs":
            # By another process: whoever closes a file drops this process's locks on it, those of SQLite too.
            yield str(path), subprocess.run(["cat", path], check=True, capture_output=True).stdout


def _dump(url: str) -> bytes:
    """Return the whole database as text."""
    path = sqlite_path(url)
    if path is not None:
        with closing(sqlite3.connect(path)) as db:
            return "\n".join(db.iterdump()).encode()
    with psycopg.connect(url) as pg:
        tables = [name for (name,) in pg.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]
        pieces = []
        for table in tables:
            with pg.cursor().copy(sql.SQL("COPY {} TO STDOUT").format(sql.Identifier(table))) as rows:
                pieces += [bytes(row) for row in rows]
    return b"\n".join(pieces)
