"""One run of one contestant, measured; and rounds of them, interleaved."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from certworker.cli.pebble import NINETY_DAYS, Pebble
from tests.bench.contestants import CONTESTANTS, ROOT, Contestant, Job, Task
from tests.conftest import PostgresServer

LIMIT = 600.0
ASK = 15.0
"""Seconds without a request after which Pebble is asked whether it is deadlocked: Caddy's limiter waits for 10."""
QUIET = 45.0
"""... and after which a run is given up in any case: before Caddy's 60 s, when it tries again what failed."""
LOOK = 0.02
"""Seconds between two looks at whether a program that runs on has done all, at least; a hundredth of a long run."""
TRIES = 4
"""Runs of one contestant in one round, at most: Pebble deadlocks, and its DNS stand-in refuses when hundreds ask."""
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Run:
    """Figures of one run. Seconds of CPU are user and system; the client's are those of its whole process tree."""

    contestant: str
    count: int
    issued: int
    """Certificates found afterwards for the right name alone, with their own P-256 key."""
    seconds: float
    client_cpu: float
    pebble_cpu: float
    dns_cpu: float
    postgres_cpu: float
    rss_mib: float
    """The most that the client's process tree held together."""
    requests: dict[str, int]
    """By method and route, from Pebble's log."""
    fault: str
    """Why the run does not count; "" if it does."""
    load: float
    """The machine's load average when it began."""
    round: int = 0
    said: str = ""
    """The end of what a run said that does not count."""

    @property
    def rate(self) -> float:
        return self.issued / self.seconds

    def document(self) -> dict[str, Any]:
        return asdict(self) | {"rate": round(self.rate, 3)}


@dataclass
class Terms:
    """What holds for every run of a race."""

    postgres: PostgresServer | None = None
    retry_after: tuple[int, int] = (0, 0)
    delay: float = 0.0
    """Seconds that the CA is farther away."""
    gomaxprocs: int = 1
    tell: Callable[[Run], object] = field(default=print)


def race(entries: Sequence[tuple[str, int]], rounds: int, terms: Terms) -> list[Run]:
    """Run every entry (contestant, count) once a round; what does not count is run again and says so."""
    runs = []
    for number in range(rounds):
        for name, count in entries:
            for _ in range(TRIES):
                run = run_once(name, CONTESTANTS[name], count, terms)
                run.round = number
                runs.append(run)
                terms.tell(run)
                if not run.fault:
                    break
    return runs


def run_once(name: str, contestant: Contestant, count: int, terms: Terms) -> Run:
    """Run one contestant against a fresh Pebble."""
    names = [f"n{number:06d}.example.test" for number in range(count)]
    options = {"nonce_reject": 0, "authz_reuse": 0, "profiles": {"default": NINETY_DAYS}}
    with (
        TemporaryDirectory(prefix=f"bench-{name}-") as folder,
        Pebble(**options, retry_after=terms.retry_after, gomaxprocs=terms.gomaxprocs or None) as ca,
        _far_away(ca, terms.delay) as directory_url,
        _database(terms.postgres if contestant.postgresql else None) as url,
    ):
        task = Task(ca, directory_url, names, Path(folder), url)
        return _measure(name, contestant.prepare(task), task, terms.postgres if contestant.postgresql else None)


def _measure(name: str, job: Job, task: Task, postgres: PostgresServer | None) -> Run:
    servers = {key: process.pid for key, process in task.ca._processes.items()}
    if postgres is not None:
        servers["postgres"] = postgres.process.pid
    asked_before = task.ca.requests()
    cpu_before = {key: tree_cpu(pid) for key, pid in servers.items()}
    load = os.getloadavg()[0]
    with (task.folder / "said").open("wb") as said, (task.folder / "stdin").open("w+") as stdin:
        stdin.write(job.stdin)
        stdin.seek(0)
        tools = f"{ROOT / '.tools' / 'bin'}:{os.environ['PATH']}"
        began = time.perf_counter()
        process = subprocess.Popen(
            job.argv, env=os.environ | {"PATH": tools} | job.environ, stdin=stdin, stdout=said, stderr=said,
            cwd=task.folder, start_new_session=True,
        )  # fmt: skip
        memory = PeakMemory(process.pid)
        try:
            fault, usage, seconds = _await_end(process, job, task.ca, began)
        finally:
            memory.stop()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it left behind, or all of it after Ctrl-C
    cpu = {key: tree_cpu(pid) - cpu_before[key] for key, pid in servers.items()}
    issued = count_good(job.kept(), task.names)
    asked = {f"{method} {path}": n for (method, path), n in (task.ca.requests() - asked_before).items()}
    fault = fault or ("" if issued == len(task.names) else "not all were issued")
    tail = (task.folder / "said").read_bytes()[-1000:].decode(errors="replace") if fault else ""
    return Run(
        name, len(task.names), issued, round(seconds, 3), round(usage.ru_utime + usage.ru_stime, 3),
        round(cpu["pebble"], 3), round(cpu["pebble-challtestsrv"], 3), round(cpu.get("postgres", 0), 3),
        round(memory.peak / 2**20, 1), asked, fault, round(load, 2), said=tail,
    )  # fmt: skip


def _await_end(process: subprocess.Popen[bytes], job: Job, ca: Pebble, began: float) -> tuple[str, Any, float]:
    """Return what is wrong, the resources used, and the seconds until the work was done."""
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        seconds = time.perf_counter() - began
        if pid:
            process.returncode = status
            return "" if job.is_done is None else "ended by itself", usage, seconds
        fault = _stall(ca, seconds)
        if fault or (job.is_done is not None and job.is_done()):
            seconds = time.perf_counter() - began
            os.killpg(process.pid, signal.SIGKILL if fault else signal.SIGTERM)
            _, process.returncode, usage = os.wait4(process.pid, 0)
            return fault, usage, seconds
        time.sleep(max(LOOK, seconds / 100))


def _stall(ca: Pebble, seconds: float) -> str:
    if seconds > LIMIT:
        return f"not done in {LIMIT:g} s"
    quiet = min(seconds, time.time() - ca.log_path.stat().st_mtime)
    if quiet > QUIET:
        return f"no request in {QUIET:g} s"
    return "Pebble deadlocked" if quiet > ASK and ca.deadlocked() else ""


def count_good(pairs: Iterable[tuple[bytes, bytes]], names: Sequence[str]) -> int:
    """Return for how many of `names` there is a certificate for that name alone, with its own P-256 key."""
    good = set()
    for chain_pem, key_pem in pairs:
        leaf, key = x509.load_pem_x509_certificate(chain_pem), serialization.load_pem_private_key(key_pem, None)
        found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        listed = found.get_values_for_type(x509.DNSName)
        if len(found) != 1 or len(listed) != 1 or leaf.public_key() != key.public_key():
            continue
        if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp256r1":
            good.add(listed[0])
    return len(good & set(names))


class PeakMemory:
    """Samples the resident memory of a process tree, and keeps the most, in bytes."""

    def __init__(self, root: int) -> None:
        self.peak = 0
        self._root = root
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(0.1):
            self.peak = max(self.peak, sum(map(resident, tree(self._root))))


def tree(root: int) -> Iterator[int]:
    """Give a process and all below it, as far as they were started by main threads: others start none here."""
    todo = [root]
    while todo:
        pid = todo.pop()
        yield pid
        with suppress(OSError):  # it has ended
            # To look at 64 threads ten times a second would cost the one that has them 3 % of a core.
            todo += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def resident(pid: int) -> int:
    """Return how many bytes of memory a process holds; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except OSError:
        return 0


def tree_cpu(root: int) -> float:
    """Return the seconds of CPU that a process, all below it and its ended children have used."""
    total = 0
    for pid in tree(root):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(map(int, fields[11:15]))
    return total / _TICKS


@contextmanager
def _database(postgres: PostgresServer | None) -> Iterator[str]:
    if postgres is None:
        yield ""
        return
    name = postgres.create_database()
    try:
        yield postgres.url(name)
    finally:
        postgres.drop_database(name)


@contextmanager
def _far_away(ca: Pebble, delay: float) -> Iterator[str]:
    if not delay:
        yield ca.directory_url
        return
    port = ca.directory_url.removesuffix("/dir").rpartition(":")[2]
    argv = [os.fspath(ROOT / ".venv" / "bin" / "python"), "-m", "tests.bench.delay", port, str(delay)]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as proxy:
        assert proxy.stdout is not None
        try:
            yield f"https://127.0.0.1:{proxy.stdout.readline().strip()}/dir"
        finally:
            proxy.terminate()
