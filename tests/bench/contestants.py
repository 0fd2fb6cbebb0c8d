"""Who takes part: what each is configured with, what is then run and timed, and where its certificates are afterwards.

Configuration is made before the clock starts, as an operator has it before the program is started: a Caddyfile, a shell
script, or for certworker a data folder (`certworker init`) and one row of `tls_policies` for each name.
"""

import compileall
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from sqlalchemy import func, insert, select

from certworker import wiring
from certworker.cli.pebble import Pebble, free_ports
from certworker.settings import load
from certworker.store.database import open_database
from certworker.store.rows import new_id
from certworker.store.tables import certificates, tls_policies

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".tools" / "peers" / "bin"

Pairs = Iterator[tuple[bytes, bytes]]
"""Chain and key, PEM, of each certificate that was kept."""


@dataclass(frozen=True)
class Task:
    """What a contestant is given."""

    ca: Pebble
    directory_url: str
    """Pebble's own, or that of what stands before it."""
    names: Sequence[str]
    folder: Path
    """Empty."""
    database_url: str
    """An empty PostgreSQL database; "" stands for SQLite in the folder."""


@dataclass(frozen=True)
class Job:
    """What is run and timed."""

    argv: Sequence[str]
    kept: Callable[[], Pairs]
    environ: Mapping[str, str] = field(default_factory=dict)
    stdin: str = ""
    is_done: Callable[[], bool] | None = None
    """For a program that runs on; None: it has done its work when it ends."""


@dataclass(frozen=True)
class Contestant:
    """One way to get certificates."""

    what: str
    prepare: Callable[[Task], Job]
    count: int
    """Certificates, unless told otherwise: what sleeps is given few."""
    needs: str | Path = sys.executable
    postgresql: bool = False

    @property
    def is_here(self) -> bool:
        return shutil.which(self.needs, path=f"{ROOT / '.tools' / 'bin'}:{os.environ['PATH']}") is not None


# -- certworker -------------------------------------------------------------------------------------


def certworker(task: Task, *command: str, workers: int = 1, until_active: bool = False, **settings: str) -> Job:
    """Return the run of a certworker command on a database that holds a policy for each name."""
    (api,) = free_ports(1)
    ours = {
        "DATA_DIR": str(task.folder / "data"), "ACME_DIRECTORY_URL": task.directory_url,
        "ACME_CA_BUNDLE": str(task.ca.ca_bundle), "ACME_TOS_AGREED": "true", "DNS_RESOLVER": task.ca.dns_address,
        "RESPONDER_LISTEN": f"127.0.0.1:{task.ca.http_port}", "API_LISTEN": f"127.0.0.1:{api}",
        "DATABASE_URL": task.database_url, "LOG_LEVEL": "warning", **settings,
    }  # fmt: skip
    environ = {f"CERTWORKER_{name}": value for name, value in ours.items()} | {"PYTHONPATH": str(ROOT)}
    compileall.compile_dir(ROOT / "certworker", quiet=1)  # as an installed package is
    init = [sys.executable, "-m", "certworker", "init"]
    subprocess.run(init, env=os.environ | environ, cwd=task.folder, check=True, capture_output=True)
    app = wiring.open_app(load(environ))
    add_policies(app, task.names)
    app.close()
    argv = [sys.executable, "-m", *command]
    done = _all_active(app.settings.database_url, len(task.names)) if until_active else None
    return Job(_together(argv, workers, task.ca.http_port), lambda: _kept_by_certworker(environ), environ, is_done=done)


def _together(argv: Sequence[str], workers: int, http_port: int) -> Sequence[str]:
    """Return a command that runs it so often; the CA's looks reach the first, whose responder answers for all.

    So the others begin when that listens, as proxies do that are there before any worker.
    """
    if workers == 1:
        return argv
    command, ports = shlex.join(argv), free_ports(2 * workers)
    others = [
        f"CERTWORKER_RESPONDER_LISTEN=127.0.0.1:{ports[2 * n]} CERTWORKER_API_LISTEN=127.0.0.1:{ports[2 * n + 1]} "
        f"CERTWORKER_DATA_DIR=data-{n} CERTWORKER_KEK_FILE=data/kek {command} &"
        for n in range(1, workers)
    ]
    folders = " ".join(f"data-{n}" for n in range(1, workers))
    # The shell outlives the SIGTERM that all of them get, so that what they have used is counted.
    listens = f"until : < /dev/tcp/127.0.0.1/{http_port}; do sleep 0.02; done 2> /dev/null;"
    return ["bash", "-c", " ".join([f"trap : TERM; mkdir {folders};", command, "&", listens, *others, "wait; wait"])]


def add_policies(app: wiring.App, names: Sequence[str]) -> None:
    """Write what another gateway program would: the given columns, one policy for each name."""
    rows = [{"id": new_id(), "mode": "auto", "domains": [name], "status": "pending"} for name in names]
    app.db.write(lambda tx: tx.execute(insert(tls_policies), rows))


def _all_active(database_url: str, count: int) -> Callable[[], bool]:
    """Return what looks whether so many policies are active, over one connection: what looks must not cost anything."""
    db = open_database(database_url)
    active = select(func.count()).where(tls_policies.c.status == "active")

    def look() -> bool:
        done = db.read(lambda tx: tx.execute(active).scalar_one()) >= count
        if done:
            db.close()
        return done

    return look


def _kept_by_certworker(environ: Mapping[str, str]) -> Pairs:
    app = wiring.open_app(load(environ))
    place = {"table": "certificates", "column": "key_pem"}
    rows = app.db.read(lambda tx: tx.execute(select(certificates)).all())
    for row in rows:
        assert row.key_pem.startswith("cw1."), "keys are sealed"
        yield row.cert_pem.encode(), app.sealer.open(row.key_pem, **place, row_id=row.id).encode()
    app.close()


# -- peers ------------------------------------------------------------------------------------------


def _files(folder: Path, pattern: str, key: Callable[[Path], Path] = lambda path: path.with_suffix(".key")) -> Pairs:
    for path in folder.glob(pattern):
        if not path.name.endswith(".issuer.crt") and key(path).exists():
            yield path.read_bytes(), key(path).read_bytes()


def python(script: str, at_once: int, task: Task) -> Job:
    """Run one of the scripts beside this file with the peers' interpreter."""
    argv = [str(PEERS / "python"), str(Path(__file__).with_name(script)), task.directory_url, str(task.ca.ca_bundle)]
    argv += [str(task.ca.http_port), str(task.folder), str(at_once)]
    return Job(argv, lambda: _files(task.folder, "*.crt"), stdin="\n".join(task.names))


def caddy(names_per_account: int | None, task: Task) -> Job:
    """Run Caddy until all files are there.

    It allows itself 10 orders in 10 s for each CA and account's e-mail, which no setting changes; with an account of
    their own for each 10 names the limiter never waits.
    """
    names, step = list(task.names), names_per_account or len(task.names)
    challenge = {"http": {"alternate_port": task.ca.http_port}, "tls-alpn": {"disabled": True}}
    policies = [
        {"subjects": names[at : at + step], "issuers": [{
            "module": "acme", "ca": task.directory_url, "email": f"a{at}@example.test",
            "trusted_roots_pem_files": [str(task.ca.ca_bundle)], "challenges": challenge,
        }]} for at in range(0, len(names), step)
    ]  # fmt: skip
    config = {
        "admin": {"disabled": True}, "logging": {"logs": {"default": {"level": "ERROR"}}},
        "storage": {"module": "file_system", "root": str(task.folder / "store")},
        "apps": {
            "http": {"http_port": task.ca.http_port, "https_port": task.ca.tls_port},
            "tls": {"certificates": {"automate": names}, "automation": {"policies": policies}},
        },
    }  # fmt: skip
    (task.folder / "caddy.json").write_text(json.dumps(config))
    pattern, home = "store/certificates/*/*/*.crt", str(task.folder)

    def look() -> bool:
        # Folders first: to look into each of a thousand would take a quarter of a core from who is timed.
        folders = sum(1 for _ in task.folder.glob("store/certificates/*/*"))
        return folders >= len(names) and sum(1 for _ in task.folder.glob(pattern)) >= len(names)

    return Job(
        ["caddy", "run", "--config", str(task.folder / "caddy.json")], lambda: _files(task.folder, pattern),
        {"HOME": home, "XDG_DATA_HOME": home, "XDG_CONFIG_HOME": home},
        is_done=look,
    )  # fmt: skip


def _side_by_side(task: Task, loops: int, one: str) -> Sequence[str]:
    """Return a shell command: so many loops, each one name after the other on a loopback address of its own.

    `one` is the command for $name; $addr is the loop's address, $slot its last part.
    """
    lines = []
    for slot in range(loops):
        names = task.names[slot::loops]
        for name in names:
            task.ca.challtest("add-a", {"host": f"{name}.", "addresses": [f"127.0.0.{slot + 2}"]})
        lines.append(f"(slot={slot + 2} addr=127.0.0.{slot + 2}; for name in {' '.join(names)}; do {one}; done) &")
    script = task.folder / "run.sh"
    script.write_text("\n".join([*lines, "wait\n"]))
    return ["bash", str(script)]


def lego(loops: int, task: Task) -> Job:
    """Run lego, a process for each certificate; each loop has a data folder and an account of its own."""
    one = (
        f"lego --server {task.directory_url} --accept-tos --email a@example.test --path lego$slot --key-type ec256 "
        f"--http --http.port $addr:{task.ca.http_port} --domains $name run >>log 2>&1"
    )
    kept = partial(_files, task.folder, "lego*/certificates/*.example.test.crt")
    return Job(_side_by_side(task, loops, one), kept, {"LEGO_CA_CERTIFICATES": str(task.ca.ca_bundle)})


def certbot(loops: int, task: Task) -> Job:
    """Run certbot standalone, a process for each certificate; each loop has folders and an account of its own."""
    one = (
        f"{PEERS / 'certbot'} certonly -n -q --agree-tos --register-unsafely-without-email --standalone "
        f"--preferred-challenges http --http-01-address $addr --http-01-port {task.ca.http_port} --key-type ecdsa "
        f"--server {task.directory_url} --config-dir cb$slot/c --work-dir cb$slot/w --logs-dir cb$slot/l -d $name "
        ">>log 2>&1"
    )
    kept = partial(_files, task.folder, "cb*/c/live/*/cert.pem", lambda path: path.with_name("privkey.pem"))
    return Job(_side_by_side(task, loops, one), kept, {"REQUESTS_CA_BUNDLE": str(task.ca.ca_bundle)})


RENEW, RUN = ("certworker", "renew"), ("certworker", "run")
PYTHON = PEERS / "python"

CONTESTANTS = {
    "minimal": Contestant("the least that any client could do, uvloop", partial(python, "minimal.py", 16), 200, PYTHON),
    "certworker": Contestant("`certworker renew` on SQLite", lambda task: certworker(task, *RENEW), 200),
    "certworker-pg": Contestant(
        "`certworker renew` on PostgreSQL", lambda task: certworker(task, *RENEW), 200, postgresql=True
    ),
    "certworker-run": Contestant(
        "`certworker run` on SQLite until all are active", lambda task: certworker(task, *RUN, until_active=True), 200
    ),
    "certworker-run-pg": Contestant(
        "`certworker run` on PostgreSQL until all are active", lambda task: certworker(task, *RUN, until_active=True),
        200, postgresql=True,
    ),
    "certworker-run-pg-4": Contestant(
        "`certworker run` on PostgreSQL, 4 workers", lambda task: certworker(task, *RUN, until_active=True, workers=4),
        200, postgresql=True,
    ),
    "certworker-64": Contestant(
        "`certworker renew` with CONCURRENCY=64", lambda task: certworker(task, *RENEW, CONCURRENCY="64"), 1000
    ),
    "certworker-256": Contestant(
        "`certworker renew` with CONCURRENCY=256", lambda task: certworker(task, *RENEW, CONCURRENCY="256"), 256
    ),
    "caddy-free": Contestant("Caddy, an account for each 10 names", partial(caddy, 10), 200, "caddy"),
    "caddy": Contestant("Caddy as it comes", partial(caddy, None), 30, "caddy"),
    "lego-32": Contestant("lego, 32 side by side", partial(lego, 32), 128, "lego"),
    "certbot-4": Contestant("certbot, 4 side by side", partial(certbot, 4), 16, PEERS / "certbot"),
    "acme-16": Contestant("acme and requests, 16 threads", partial(python, "acme_threads.py", 16), 200, PYTHON),
}  # fmt: skip
