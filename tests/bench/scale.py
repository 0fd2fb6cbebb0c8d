"""Many lineages: what is due is found, claimed and passed over; the service starts.

The rows are written in bulk, past certworker, as it would have left them after issuing them all: a policy, a lineage, a
certificate and a finished issuance for each name, 500 of them due, the others planned over the next weeks. What is
timed is certworker's own code on them, each figure the median of REPEATS.
"""

import json
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import psycopg
from cryptography import x509
from sqlalchemy import bindparam, delete, event, select, update

from certworker import wiring
from certworker.ca.csr import key_to_pem, make_csr, make_key
from certworker.cli.pebble import free_ports
from certworker.clock import system_clock
from certworker.core.delivery import EVERYTHING, collect_changes
from certworker.core.rollout import CertificateChanges, Cursor
from certworker.core.transit import ChangesAnswer
from certworker.settings import Settings, load
from certworker.steps.deliver import Scopes, read_changes
from certworker.steps.expire import expire
from certworker.steps.publish import publish_changes
from certworker.steps.reap import reap
from certworker.steps.reconcile import reconcile
from certworker.steps.scan import scan
from certworker.steps.verify import count_overdue, verify
from certworker.store import counters, report, schema, settings_kv
from certworker.store import issuances as open_ones
from certworker.store import lineages as those
from certworker.store.database import open_database, sqlite_path
from certworker.store.rows import new_id
from certworker.store.tables import certificates, changes, issuances, lineages
from tests.bench.contestants import ROOT
from tests.bench.race import resident, tree_cpu
from tests.ca.fake_issuer import issue, make_hierarchy, to_pem

DUE = 500
REPEATS = 7
OFTEN = 50
"""Repeats of what takes a millisecond: the median of seven is that of a connection that warms up."""
NODE = 10_000
"""Certificates that a node takes."""
DIRECTORY = "https://127.0.0.1:1/dir"
"""Nobody is there, and nobody is asked."""
IDLE = 10.0
"""Seconds after which a service that has started is looked at again."""
_METRICS = "rows counted for /metrics, seldom, ms"
_DEAR = frozenset([_METRICS])
_PEM = "-----BEGIN CERTIFICATE-----\n" + ("A" * 64 + "\n") * 20 + "-----END CERTIFICATE-----\n"
_SEALED = "cw1." + "A" * 380
_TABLES = ("tls_policies", "lineages", "lineage_names", "policy_lineages", "certificates", "issuances")

Figures = dict[str, float]


def measure(folder: Path, database_url: str, count: int) -> Figures:
    """Fill an empty database with `count` lineages and return milliseconds, seconds and MiB by what was measured."""
    (api, responder) = free_ports(2)
    environ = {
        "DATA_DIR": str(folder / "data"), "DATABASE_URL": database_url, "ACME_DIRECTORY_URL": DIRECTORY,
        "ACME_PRIVATE_CA": "true", "ACME_TOS_AGREED": "true", "API_LISTEN": f"127.0.0.1:{api}",
        "RESPONDER_LISTEN": f"127.0.0.1:{responder}", "LOG_LEVEL": "warning",
    }  # fmt: skip
    settings = load({f"CERTWORKER_{name}": value for name, value in environ.items()})
    wiring.initialise(settings, schema.upgrade)
    bare = _start(settings)
    began = time.monotonic()
    fill(settings, count)
    app = wiring.open_app(settings)
    figures = {"rows written in bulk, s": time.monotonic() - began} | _look(app)
    app.db.write(lambda tx: _put_off(tx, app.clock()))
    figures |= _passes(app)
    figures |= _give(app, min(NODE, count))
    app.close()
    full = _start(settings)
    figures |= {f"`certworker run`: {name}": value for name, value in full.items()}
    figures["... more MiB than with no lineage, when ready"] = full["MiB when ready"] - bare["MiB when ready"]
    figures[f"... and {IDLE:g} s later"] = full[f"MiB {IDLE:g} s later"] - bare[f"MiB {IDLE:g} s later"]
    figures["... s to be ready with no lineage"] = bare["s until ready"]
    return figures


# -- rows -------------------------------------------------------------------------------------------


def rows(count: int, now: datetime) -> Iterator[dict[str, dict[str, Any]]]:
    """Give the rows of one lineage after the other, by table."""
    step = max(1, count // DUE)
    for number in range(count):
        digest = sha256(str(number).encode()).hexdigest()
        policy_id, lineage_id, certificate_id, issuance_id = (_uuid(digest[at : at + 16], at) for at in (0, 16, 32, 48))
        name, is_due = f"n{number:07d}.example.test", number % step == 0 and number < step * DUE
        # The others are of all ages that a certificate of 90 days has before it is renewed.
        since = now - timedelta(days=61 if is_due else number % 59, seconds=number % 86400)
        until, renew_at = since + timedelta(days=90), since + timedelta(days=60)
        names, hashed = [name], sha256(name.encode()).hexdigest()
        stamps = {"created_at": since, "updated_at": since}
        of_leaf = {"serial": digest[:32], "fingerprint": digest, "not_before": since}
        yield {
            "tls_policies": {"id": policy_id, "mode": "auto", "domains": names, "status": "active", **stamps},
            "lineages": {
                "id": lineage_id, "dns_names": names, "names_hash": hashed, "directory_url": DIRECTORY, "profile": "",
                "key_type": "ecdsa-p256", "status": "active", "certificate_id": certificate_id,
                "issuance_id": issuance_id, "not_before": since, "not_after": until, "renew_at": renew_at,
                "next_check_at": now - timedelta(seconds=1) if is_due else renew_at, "served_at": since,
                "ari_check_at": now + timedelta(hours=6), **stamps,
            },
            "lineage_names": {"dns_name": name, "lineage_id": lineage_id},
            "policy_lineages": {"policy_id": policy_id, "lineage_id": lineage_id, "lineage_status": "active"},
            "certificates": {
                "id": certificate_id, "domain": name, "cert_pem": _PEM, "key_pem": _SEALED, "expires_at": until,
                "status": "active", "lineage_id": lineage_id, "dns_names": names, "revision": number + 1, **of_leaf,
                **stamps,
            },
            "issuances": {
                "id": issuance_id, "lineage_id": lineage_id, "reason": "missing", "state": "done", "state_at": since,
                "attempt_at": since, "key_pem": _SEALED, "csr_der": b"csr", "chain_pem": _PEM, "names_hash": hashed,
                "spki_sha256": digest, "closed_at": since, "dns_names": names, "not_after": until,
                "created_at": since, **of_leaf,
            },
        }  # fmt: skip


def _uuid(digits: str, version: int) -> str:
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-8000-{version:012x}"


def fill(settings: Settings, count: int) -> None:
    """Write the rows of `count` lineages, and what was noted of them away."""
    path, now = sqlite_path(settings.database_url), datetime.now(UTC)
    if path is None:
        _fill_postgresql(settings.database_url, count, now)
    else:
        _fill_sqlite(path, count, now)
    app = wiring.open_app(settings)
    kept = {settings_kv.ISSUER: app.wanted.fingerprint, settings_kv.LAST_SWEEP_AT: now.isoformat()}
    for key, value in kept.items():
        app.db.write(lambda tx: settings_kv.put(tx, key, value))  # noqa: B023
    app.close()


def _fill_sqlite(path: Path, count: int, now: datetime) -> None:
    connection = sqlite3.connect(path)
    for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-4000000", "foreign_keys=OFF"):
        connection.execute(f"PRAGMA {pragma}")
    with connection:
        every = rows(count, now)
        while page := list(islice(every, 10_000)):
            for table in _TABLES:
                columns = page[0][table]
                marks = ", ".join("?" * len(columns))
                values = [[_for_sqlite(value) for value in row[table].values()] for row in page]
                connection.executemany(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", values)
            connection.execute("DELETE FROM changes")
        connection.execute("UPDATE counters SET value = ? WHERE name = 'revision'", (count,))
    connection.execute("PRAGMA analysis_limit=1000")
    connection.execute("ANALYZE")
    connection.commit()
    connection.execute("PRAGMA journal_mode=WAL")
    connection.close()


def _for_sqlite(value: Any) -> Any:
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%dT%H:%M:%S.%f}Z"
    return json.dumps(value) if isinstance(value, list) else value


def _fill_postgresql(url: str, count: int, now: datetime) -> None:
    with ExitStack() as stack:
        copies = {table: stack.enter_context(_copy(stack, url, table, now)) for table in _TABLES}
        for row in rows(count, now):
            for table, copy in copies.items():
                copy.write_row(list(row[table].values()))
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("UPDATE counters SET value = %s WHERE name = 'revision'", (count,))
        connection.execute("VACUUM ANALYZE")
        connection.execute("CHECKPOINT")


def _copy(stack: ExitStack, url: str, table: str, now: datetime) -> AbstractContextManager[psycopg.Copy]:
    """Return a COPY of its own connection."""
    connection = stack.enter_context(psycopg.connect(url))
    connection.execute("SET session_replication_role = replica")  # no triggers, no checks of foreign keys
    return connection.cursor().copy(f"COPY {table} ({', '.join(next(rows(1, now))[table])}) FROM STDIN")


# -- figures ----------------------------------------------------------------------------------------


def _look(app: wiring.App) -> Figures:
    """Find, queue and claim the 500 that are due, again and again."""
    figures: dict[str, list[float]] = {}
    for _ in range(REPEATS):
        _look_once(app, figures)
    return {name: statistics.median(values) for name, values in figures.items()}


def _look_once(app: wiring.App, figures: dict[str, list[float]]) -> None:
    now, worker = app.clock(), new_id()
    _time(figures, f"{DUE} due found, ms", lambda: app.db.read(lambda tx: those.due(tx, now, DUE)), DUE)
    queued = _time(figures, f"{DUE} due queued (scan), ms", lambda: scan(app.db, app.clock))
    assert queued.queued == DUE, queued
    soon = app.clock() + timedelta(seconds=1)

    def claim(count: int) -> list[open_ones.Issuance]:
        return app.db.write(lambda tx: open_ones.claim(tx, worker, soon, count))

    _time(figures, f"{DUE} claimed, ms", lambda: claim(DUE), DUE)
    app.db.write(lambda tx: _again(tx, now))


def _time(figures: dict[str, list[float]], name: str, act: Callable[[], Any], expected: int | None = None) -> Any:
    began = time.perf_counter()
    done = act()
    figures.setdefault(name, []).append((time.perf_counter() - began) * 1000)
    assert expected is None or len(done) == expected, (name, len(done))
    return done


def _again(tx: Any, now: datetime) -> None:
    """Take back what the scan queued."""
    tx.execute(delete(issuances).where(open_ones._OPEN))
    later = lineages.c.next_check_at.between(now, now + timedelta(hours=2))
    tx.execute(update(lineages).where(later).values(next_check_at=now - timedelta(seconds=1)))


def _put_off(tx: Any, now: datetime) -> None:
    """Let nothing be due."""
    tx.execute(update(lineages).where(lineages.c.next_check_at <= now).values(next_check_at=now + timedelta(days=1)))


def _passes(app: wiring.App) -> Figures:
    """Time what the timetable does when there is nothing to do."""
    figures: dict[str, list[float]] = {}
    steps: Mapping[str, Callable[[], Any]] = {
        "nothing due: the query, ms": lambda: app.db.read(lambda tx: those.due(tx, app.clock(), DUE)),
        "nothing due: scan, ms": lambda: scan(app.db, app.clock),
        "nothing due: claim, ms": lambda: app.db.write(lambda tx: open_ones.claim(tx, new_id(), app.clock(), 16)),
        "nothing noted: reconcile, ms": lambda: reconcile(app.db, system_clock, app.wanted, app.sealer),
        "nothing ended: expire, ms": lambda: expire(app.db, app.clock),
        "no node: verify, ms": lambda: verify(app.db, app.clock, Scopes(), app.settings.node_silent),
        "no node: count_overdue, ms": lambda: count_overdue(app.db, app.clock),
        "nothing to forget: reap, ms": lambda: reap(app.db, app.clock),
        "nothing changed: publish, ms": lambda: publish_changes(app.db, app.clock, app.defaults),
        _METRICS: lambda: app.db.read(report.counts),
    }
    for name, act in steps.items():
        for _ in range(REPEATS if name in _DEAR else OFTEN):
            _time(figures, name, act)
    found = {name: statistics.median(values) for name, values in figures.items()}
    return found if app.db.embedded else found | {"nothing due: scan, ms in the server": _served(app.settings)}


def _served(settings: Settings) -> float:
    """Return how many milliseconds PostgreSQL says that its own work for a scan took, COMMIT and disk included."""
    spent = list[float]()
    db = open_database(settings.database_url)

    def listen(connection: Any, _record: Any) -> None:
        connection.add_notice_handler(lambda said: spent.append(float(said.message_primary.split()[1])))
        connection.execute("SET log_duration = on")
        connection.execute("SET client_min_messages = log")  # "duration: 0.061 ms", of each step of each statement
        connection.commit()

    event.listen(db.engine, "connect", listen)
    scan(db, system_clock)
    each = list[float]()
    for _ in range(OFTEN):
        spent.clear()
        scan(db, system_clock)
        each.append(sum(spent))
    db.close()
    return statistics.median(each)


def _give(app: wiring.App, count: int) -> Figures:
    """Give a node that is behind by `count` certificates all of them, page by page, keys opened, as JSON."""
    _make_real(app, count)
    figures: dict[str, list[float]] = {}
    epoch, newest = app.db.read(lambda tx: (counters.value(tx, counters.EPOCH), counters.value(tx, counters.REVISION)))
    sent = 0

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        nonlocal sent
        sent += not statement.startswith("BEGIN")

    def read_page(after: Cursor, continued: bool) -> CertificateChanges:
        page = app.db.read(lambda tx: read_changes(tx, app.sealer, after, EVERYTHING, continued=continued))
        ChangesAnswer(changes=page).model_dump_json()
        return page

    event.listen(app.db.engine, "before_cursor_execute", note)
    behind = Cursor(epoch, newest - count)
    for _ in range(REPEATS):
        given = _time(figures, f"a node takes {NODE}, ms", lambda: collect_changes(read_page, behind))
        assert len(given.changed) == count
    event.remove(app.db.engine, "before_cursor_execute", note)
    figures[f"a node takes {NODE}, statements"] = [sent / REPEATS]
    return {name: statistics.median(values) for name, values in figures.items()}


def _make_real(app: wiring.App, count: int) -> None:
    """Let the newest certificates be such, with keys that fit: a node is given no others."""
    now = app.clock()
    _, issuer = make_hierarchy(now)
    newest = select(certificates.c.id, certificates.c.domain).order_by(certificates.c.revision.desc()).limit(count)
    rows = []
    for row_id, name in app.db.read(lambda tx: tx.execute(newest).all()):
        key = make_key("ecdsa-p256")
        leaf = issue(issuer, x509.load_der_x509_csr(make_csr(key, [name])), now, timedelta(days=90))
        sealed = app.sealer.seal(key_to_pem(key), table="certificates", column="key_pem", row_id=row_id)
        rows.append({"row_id": row_id, "chain": to_pem(leaf, issuer.certificate), "key": sealed})
    real = update(certificates).where(certificates.c.id == bindparam("row_id"))
    real = real.values(cert_pem=bindparam("chain"), key_pem=bindparam("key"))
    app.db.write(lambda tx: tx.execute(real, rows))
    app.db.write(lambda tx: tx.execute(delete(changes)))


def _start(settings: Settings) -> Figures:
    """Start the service; return how long until it is ready, and what it holds then and later."""
    environ = {f"CERTWORKER_{name.upper()}": str(getattr(settings, name)) for name in (
        "data_dir", "database_url", "acme_directory_url", "acme_private_ca", "acme_tos_agreed", "api_listen",
        "responder_listen", "log_level",
    )}  # fmt: skip
    began = time.monotonic()
    argv = [sys.executable, "-m", "certworker", "run"]
    with subprocess.Popen(argv, cwd=ROOT, env=os.environ | environ, stderr=subprocess.DEVNULL) as process:
        try:
            while not _is_ready(settings.api_listen):
                assert process.poll() is None, "the service has ended"
                assert time.monotonic() < began + 120, "the service is not ready"
                time.sleep(0.02)
            ready, memory = time.monotonic() - began, resident(process.pid)
            used = tree_cpu(process.pid)
            time.sleep(IDLE)
            later = resident(process.pid)
            idle = (tree_cpu(process.pid) - used) / IDLE * 100
        finally:
            process.send_signal(signal.SIGTERM)
    mib = 2**20
    return {
        "s until ready": ready, "MiB when ready": memory / mib, f"MiB {IDLE:g} s later": later / mib,
        "% of a core in between": idle,
    }  # fmt: skip


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/readyz", timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.HTTPError):
        return False
