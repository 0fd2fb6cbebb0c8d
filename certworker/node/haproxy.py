"""One HAProxy: its process, its verdicts, and its certificates while it runs.

It runs in master-worker mode in a session of its own, so it outlives the agent and is found again
by the next one. Whether it is ours is read from its command line, which names our own socket: no
file with a process id can be stale or missing.

Sources: HAProxy 2.6 management guide §3 (options), §4 (signals), §9.4 (master socket).
"""

import os
import re
import select
import signal
import socket
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from certworker.core.snapshot import Snapshot
from certworker.errors import CheckRefused, CommandRefused, NodeError, ReloadRefused
from certworker.node.folder import Folder
from certworker.node.patience import Patience
from certworker.node.runtime import RuntimeSocket
from certworker.node.state import Lists
from certworker.render.files import RenderedFiles
from certworker.render.haproxy import CONFIG, CrtLine, HaproxyOptions, list_path, render_crt_list, render_haproxy

CHECK_LIMIT = timedelta(minutes=5)
"""Loading 10,000 certificates takes 12 s with OpenSSL 3.0."""
READY_LIMIT = timedelta(minutes=5)
EXEC_LIMIT = timedelta(milliseconds=300)
"""A master executes itself anew at its start and at each reload, and has no command line meanwhile."""
ADOPT_LIMIT = timedelta(seconds=2)
"""For how long a master that has just started may refuse its socket."""
STOP_LIMIT = timedelta(seconds=10)
MAX_LOG = 1 << 20

_VERSION = re.compile(r"HA-?Proxy version (?P<number>[0-9]+\.[0-9]+\S*)")
_MASTER = re.compile(r"^(?P<pid>\d+)\s+master\s+(?P<reloads>\d+)(?:\s+\[failed: (?P<failed>\d+)\])?", re.MULTILINE)
_WORKER = re.compile(r"^(?P<pid>\d+)\s+worker\s+0\s", re.MULTILINE)
_MARKER = re.compile(r"^description: cfgver=(?P<number>\d+)$", re.MULTILINE)
_ALERT = re.compile(r"^\[ALERT\]\s+\(\d+\) : (?P<text>.*)$", re.MULTILINE)
_WARNING = re.compile(r"^\[WARNING\]\s+\(\d+\) : (?P<text>.*)$", re.MULTILINE)
_EMPTY_LIST = re.compile(r"no SSL certificate specified for bind .* ssl connections will fail")
"""The one warning that we expect: an https listener before its first certificate. With `strict-sni`
HAProxy starts and refuses each handshake with `unrecognized_name`, which is what we want; the only
way to silence it would be a placeholder certificate, and clients could then be shown that."""


def has_ipv6() -> bool:
    """Say whether this machine can listen on IPv6."""
    try:
        with socket.socket(socket.AF_INET6) as trial:
            trial.bind(("::", 0))
    except OSError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class HaproxySetup:
    """How this machine runs HAProxy."""

    binary: Path
    ipv6: bool = field(default_factory=has_ipv6)
    user: str | None = None
    group: str | None = None
    max_connections: int | None = None


@dataclass(frozen=True, slots=True)
class Processes:
    """What the master says of itself and its workers."""

    master: int
    reloads: int
    failed: int
    new_workers: frozenset[int]
    """Those that no reload has replaced."""


class Haproxy:
    """The HAProxy of one folder, running or not."""

    def __init__(self, folder: Folder, setup: HaproxySetup, patience: Patience) -> None:
        self._folder = folder
        self._setup = setup
        self._patience = patience
        self._config = folder.current / CONFIG
        self._log = folder.run / "haproxy.log"
        self._master_option = f"{folder.run / 'master.sock'},mode,600"
        self._admin = RuntimeSocket(folder.run / "admin.sock")
        self._master = RuntimeSocket(folder.run / "master.sock")
        self._child: int | None = None

    def describe(self) -> str:
        """Return for example `haproxy 2.6.12`, or raise `NodeError` if it cannot be run."""
        found = _VERSION.search(self._run("-v").stdout)
        if found is None:
            raise NodeError(f"{self._setup.binary} -v: this is no HAProxy, set HAPROXY_BIN to one")
        return f"haproxy {found['number']}"

    def render(self, snapshot: Snapshot, number: int) -> RenderedFiles:
        """Print a version for this machine."""
        setup = self._setup
        options = HaproxyOptions(
            str(self._folder.path), number, setup.ipv6, setup.user, setup.group, setup.max_connections
        )
        return render_haproxy(snapshot, options)

    def write_lists(self, lists: Lists) -> None:
        """Write the crt-lists that the next start or reload reads."""
        for policy_id, lines in lists.items():
            self._folder.write_list(self._list(policy_id), render_crt_list(lines))

    def check(self, version: Path) -> tuple[str, ...]:
        """Return HAProxy's own remarks on a version's folder, or raise `CheckRefused`."""
        done = self._run("-c", "-f", str(version / CONFIG))
        if done.returncode != 0:
            files = frozenset(re.findall(rf"{re.escape(str(self._folder.certs))}/[0-9a-f]{{64}}\.pem", done.stderr))
            raise CheckRefused(f"haproxy refuses {version.name}: {_alert(done.stderr)}", files)
        return tuple(text for text in _WARNING.findall(done.stderr) if not _EMPTY_LIST.search(text))

    def running(self) -> bool:
        """Say whether our HAProxy runs and answers, whoever started it."""
        self._reap()
        if self._patience.until(self._find_master, EXEC_LIMIT) is None:
            return False
        return self._patience.until(self._processes, ADOPT_LIMIT) is not None

    def start(self) -> None:
        """Start the current version, and return when it serves."""
        log_end = self._log_end()
        self._child = self._spawn()
        served = self._patience.until(lambda: self._ended() or self.served_number() is not None, READY_LIMIT)
        if not served or self._ended():
            self._kill()
            raise NodeError(f"haproxy does not start: {_alert(self._said_since(log_end))}")

    def reload(self) -> None:
        """Make the running HAProxy take the current version over, or raise `ReloadRefused`."""
        before = self._patience.until(self._processes, ADOPT_LIMIT)
        if before is None:
            raise ReloadRefused("haproxy cannot be reloaded: its master does not answer")
        log_end = self._log_end()
        answer = self._ask_to_reload()
        if "Success=0" in answer:  # since 2.7 the answer is the verdict
            raise ReloadRefused(f"haproxy refuses the reload: {_alert(answer)}")
        after = self._patience.until(lambda: self._verdict(before), READY_LIMIT)
        if after is None or after.failed:
            raise ReloadRefused(f"haproxy refuses the reload: {_alert(self._said_since(log_end))}")

    def _ask_to_reload(self) -> str:
        try:
            return self._master.ask("reload", limit=READY_LIMIT)
        except CommandRefused:
            return ""  # up to 2.6 the master hangs up without an answer; `show proc` tells the rest

    def stop(self) -> None:
        """Let the open connections end for a while, then end the process."""
        master = self._patience.until(self._find_master, EXEC_LIMIT)
        if master is not None:
            _end(master, (signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL), STOP_LIMIT)
        self._reap()

    def served_number(self) -> int | None:
        """Return the number of the version that the running process was started with."""
        try:
            found = _MARKER.search(self._admin.ask("show info"))
        except CommandRefused:
            return None
        return int(found["number"]) if found else None

    def serves(self, lists: Lists) -> bool:
        """Say whether the running process has exactly these crt-lists."""
        try:
            return all(self._admin.list_lines(str(self._list(name))) == lines for name, lines in lists.items())
        except CommandRefused:
            return False

    def swap(self, before: Lists, after: Lists) -> None:
        """Go from one state of the crt-lists to another without a reload, or raise `CommandRefused`.

        New lines come first: until the old one goes, a renewed name is answered with the old leaf.
        """
        added, dropped = _lines_missing(before, after), _lines_missing(after, before)
        if changed := {(name, line.file) for name, line in added} & {(name, line.file) for name, line in dropped}:
            raise CommandRefused(f"haproxy cannot change the names of {len(changed)} certificates while it runs")
        for file in sorted(_files(after) - _files(before)):
            self._admin.load_certificate(file, Path(file).read_text(encoding="ascii"))
        for name, line in added:
            self._admin.add_line(str(self._list(name)), line)
        for name, line in dropped:
            self._admin.drop_line(str(self._list(name)), line.file)
        for file in sorted(_files(before) - _files(after)):
            self._admin.drop_certificate(file)

    def tidy(self) -> None:
        """Keep the log, to which HAProxy writes every change of an upstream's health, short."""
        if self._log_end() > MAX_LOG:
            os.truncate(self._log, 0)

    def _list(self, policy_id: str | None) -> Path:
        return Path(list_path(str(self._folder.path), policy_id))

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(self._setup.binary), *arguments]
        try:
            return subprocess.run(
                command, env={}, capture_output=True, text=True, errors="replace", check=False,
                stdin=subprocess.DEVNULL, timeout=CHECK_LIMIT.total_seconds(),
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as failed:
            raise NodeError(f"cannot run {command[0]}: {failed}; set HAPROXY_BIN to a working HAProxy") from None

    def _spawn(self) -> int:
        command = [str(self._setup.binary), "-W", "-S", self._master_option, "-f", str(self._config)]
        appending = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        streams = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(self._log), appending, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        try:
            # A session of its own: what ends the agent, or its terminal, does not end the proxy.
            return os.posix_spawn(command[0], command, {}, file_actions=streams, setsid=True)
        except OSError as failed:
            raise NodeError(f"cannot run {command[0]}: {failed}; set HAPROXY_BIN to a working HAProxy") from None

    def _reap(self) -> None:
        if self._child is not None:
            with suppress(ChildProcessError):
                ended, _ = os.waitpid(self._child, os.WNOHANG)
                self._child = None if ended else self._child

    def _ended(self) -> bool:
        self._reap()
        return self._child is None

    def _kill(self) -> None:
        if self._child is not None:
            _end(self._child, (signal.SIGTERM, signal.SIGKILL), STOP_LIMIT)
            self._reap()

    def _find_master(self) -> int | None:
        """Return the process whose command line names our socket, and whose parent's does not."""
        pids = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
        ours = {pid for pid in pids if self._is_ours(pid)}
        return next((pid for pid in sorted(ours) if _parent(pid) not in ours), None)

    def _is_ours(self, pid: int) -> bool:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return self._master_option.encode() in command

    def _processes(self) -> Processes | None:
        try:
            said = self._master.ask("show proc")
        except CommandRefused:
            return None
        master = _MASTER.search(said)
        if master is None:
            return None
        workers = frozenset(int(pid) for pid in _WORKER.findall(said))
        return Processes(int(master["pid"]), int(master["reloads"]), int(master["failed"] or 0), workers)

    def _verdict(self, before: Processes) -> Processes | None:
        """Return the processes once the reload is over: it failed, or a new worker answers."""
        now = self._processes()
        if now is None or now.reloads <= before.reloads:
            return None
        if now.failed or (now.new_workers - before.new_workers and self.served_number() is not None):
            return now
        return None

    def _log_end(self) -> int:
        return self._log.stat().st_size if self._log.exists() else 0

    def _said_since(self, start: int) -> str:
        with self._log.open("rb") as log:
            log.seek(start)
            return log.read(MAX_LOG).decode("utf-8", "replace")


def _lines_missing(here: Lists, there: Lists) -> list[tuple[str | None, CrtLine]]:
    return [(name, line) for name, lines in there.items() for line in sorted(lines - here.get(name, frozenset()))]


def _files(lists: Lists) -> set[str]:
    return {line.file for lines in lists.values() for line in lines}


def _parent(pid: int) -> int | None:
    try:
        # The second field is the program's name, in parentheses; it may contain anything.
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except OSError:
        return None


def _end(pid: int, signals: tuple[signal.Signals, ...], limit: timedelta) -> None:
    """Send one signal after the other until the process is gone."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for number in signals:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, number)
            if select.select([process], [], [], limit.total_seconds())[0]:
                return
    finally:
        os.close(process)


def _alert(said: str) -> str:
    """Return what HAProxy complained of, in one line."""
    complaints = _ALERT.findall(said) or said.strip().splitlines()[-3:]
    return "; ".join("".join(filter(str.isprintable, text)) for text in complaints[:3])[:500] or "it said nothing"
