"""One HAProxy: its process, its verdicts, and its certificates while it runs.

It runs in master-worker mode, and is told from others by the master socket that its command line names.

Sources: HAProxy 2.6 management guide §3 (options), §4 (signals), §9.4 (master socket).
"""

import re
import signal
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from certworker.core.snapshot import Snapshot
from certworker.errors import CheckRefused, CommandRefused, NodeError, ReloadRefused
from certworker.node.folder import Folder
from certworker.node.machine import READY_LIMIT, Master, Program, has_ipv6, in_one_line
from certworker.node.patience import Patience
from certworker.node.runtime import RuntimeSocket
from certworker.node.state import Lists
from certworker.render.files import RenderedFiles, ServedFile
from certworker.render.haproxy import (
    CONFIG,
    HaproxyOptions,
    list_path,
    render_crt_list,
    render_haproxy,
    render_thumbprints,
    thumbprints_path,
)

EXEC_LIMIT = timedelta(milliseconds=300)
"""A master executes itself anew at its start and at each reload, and has no command line meanwhile."""
ADOPT_LIMIT = timedelta(seconds=2)
"""For how long a master that has just started may refuse its socket."""

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

    managed = True
    hint = ""

    def __init__(self, folder: Folder, setup: HaproxySetup, patience: Patience) -> None:
        self._folder = folder
        self._setup = setup
        self._patience = patience
        self._config = folder.current / CONFIG
        self._admin = RuntimeSocket(folder.run / "admin.sock")
        self._master = RuntimeSocket(folder.run / "master.sock")
        self._thumbprints = thumbprints_path(str(folder.path))
        self._program = Program(setup.binary, "HAPROXY_BIN")
        master_option = f"{folder.run / 'master.sock'},mode,600"
        command = ("-W", "-S", master_option, "-f", str(self._config))
        self._process = Master(self._program, command, folder.run / "haproxy.log", lambda words: master_option in words)

    def describe(self) -> str:
        """Return for example `haproxy 2.6.12`, or raise `NodeError` if it cannot be run."""
        found = _VERSION.search(self._program.run("-v").stdout)
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

    def is_outdated(self) -> bool:
        """HAProxy looks names up by itself."""
        return False

    def write_lists(self, lists: Lists) -> None:
        """Write the crt-lists and the map that the next start or reload reads."""
        for policy_id, lines in lists.certificates.items():
            self._folder.write_list(self._list(policy_id), render_crt_list(lines))
        if lists.thumbprints is not None:
            self._folder.write_list(Path(self._thumbprints), render_thumbprints(lists.thumbprints))

    def list_names(self, lists: Lists) -> frozenset[str]:
        """Return the names of the files that `write_lists` writes."""
        paths = [self._list(policy_id) for policy_id in lists.certificates]
        paths += [] if lists.thumbprints is None else [Path(self._thumbprints)]
        return frozenset(path.name for path in paths)

    def check_pair(self, file: str) -> None:
        """Leave it to `check`, which loads every certificate."""

    def check(self, version: Path) -> tuple[str, ...]:
        """Return HAProxy's own remarks on a version's folder, or raise `CheckRefused`."""
        done = self._program.run("-c", "-f", str(version / CONFIG))
        if done.returncode != 0:
            files = frozenset(re.findall(rf"{re.escape(str(self._folder.certs))}/[0-9a-f]{{64}}\.pem", done.stderr))
            raise CheckRefused(f"haproxy refuses {version.name}: {_alert(done.stderr)}", files)
        return tuple(text for text in _WARNING.findall(done.stderr) if not _EMPTY_LIST.search(text))

    def running(self) -> bool:
        """Say whether our HAProxy runs and answers, whoever started it."""
        if self._patience.until(self._process.find, EXEC_LIMIT) is None:
            return False
        return self._patience.until(self._processes, ADOPT_LIMIT) is not None

    def start(self) -> None:
        """Start the current version, and return when it serves."""
        log_end = self._process.log_end()
        self._process.spawn()
        served = self._patience.until(lambda: self._process.ended() or self._is_up(), READY_LIMIT)
        if not served or self._process.ended():
            self._process.kill()
            raise NodeError(f"haproxy does not start: {_alert(self._process.said_since(log_end))}")

    def _is_up(self) -> bool:
        # The master executes itself once more after its first worker is up, and misses signals meanwhile.
        return self.served_number() is not None and self._processes() is not None

    def reload(self) -> None:
        """Make the running HAProxy take the current version over, or raise `ReloadRefused`."""
        before = self._patience.until(self._processes, ADOPT_LIMIT)
        if before is None:
            raise ReloadRefused("haproxy cannot be reloaded: its master does not answer")
        log_end = self._process.log_end()
        answer = self._ask_to_reload()
        if "Success=0" in answer:  # since 2.7 the answer is the verdict
            raise ReloadRefused(f"haproxy refuses the reload: {_alert(answer)}")
        after = self._patience.until(lambda: self._verdict(before), READY_LIMIT)
        if after is None or after.failed:
            raise ReloadRefused(f"haproxy refuses the reload: {_alert(self._process.said_since(log_end))}")

    def _ask_to_reload(self) -> str:
        try:
            return self._master.ask("reload", limit=READY_LIMIT)
        except CommandRefused:
            return ""  # up to 2.6 the master hangs up without an answer; `show proc` tells the rest

    def stop(self) -> None:
        """Let the open connections end for a while, then end the process."""
        self._patience.until(self._process.find, EXEC_LIMIT)
        self._process.end(signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL)

    def served_number(self) -> int | None:
        """Return the number of the version that the running process was started with."""
        try:
            found = _MARKER.search(self._admin.ask("show info"))
        except CommandRefused:
            return None
        return int(found["number"]) if found else None

    def why_not_served(self, number: int) -> str | None:
        """Say what it runs instead of version `number`; None: it runs that."""
        shown = self.served_number()
        return None if shown == number else f"the proxy runs version {shown}"

    def serves(self, lists: Lists) -> bool:
        """Say whether the running process has exactly these crt-lists and this map."""
        try:
            if any(self._admin.list_lines(str(self._list(name))) != row for name, row in lists.certificates.items()):
                return False
            return lists.thumbprints is None or self._admin.list_rows(self._thumbprints) == lists.thumbprints
        except CommandRefused:
            return False

    def swap(self, before: Lists, after: Lists) -> None:
        """Go from one state of the lists to another without a reload, or raise `CommandRefused`.

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
        if before.thumbprints is not None and after.thumbprints is not None:
            self._admin.change_rows(self._thumbprints, before.thumbprints, after.thumbprints)

    def tidy(self) -> None:
        """Keep the log, to which HAProxy writes every change of an upstream's health, short."""
        self._process.trim_log()

    def _list(self, policy_id: str | None) -> Path:
        return Path(list_path(str(self._folder.path), policy_id))

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


def _lines_missing(here: Lists, there: Lists) -> list[tuple[str | None, ServedFile]]:
    return [
        (name, line)
        for name, lines in there.certificates.items()
        for line in sorted(lines - here.certificates.get(name, frozenset()))
    ]


def _files(lists: Lists) -> set[str]:
    return {line.file for lines in lists.certificates.values() for line in lines}


def _alert(said: str) -> str:
    """Return what HAProxy complained of, in one line."""
    complaints = _ALERT.findall(said) or said.strip().splitlines()[-3:]
    return in_one_line(complaints)
