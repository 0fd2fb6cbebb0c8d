"""A proxy as a program and as a process of this machine.

It runs in a session of its own, so it outlives the agent and is found again by the next one. Whether
a process is ours is read from its command line, which names a file of our own: no file with a process
id can be stale or missing.
"""

import os
import select
import signal
import socket
import subprocess
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from certworker.errors import NodeError

CHECK_LIMIT = timedelta(minutes=5)
"""Loading 10,000 certificates takes 12 s with OpenSSL 3.0."""
READY_LIMIT = timedelta(minutes=5)
STOP_LIMIT = timedelta(seconds=10)
MAX_LOG = 1 << 20


def has_ipv6() -> bool:
    """Say whether this machine can listen on IPv6."""
    try:
        with socket.socket(socket.AF_INET6) as trial:
            trial.bind(("::", 0))
    except OSError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Program:
    """A proxy's binary."""

    binary: Path
    setting: str
    """The setting that names it, for messages."""

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end, or raise `NodeError` if that cannot be done."""
        try:
            return subprocess.run(
                [str(self.binary), *arguments], env={}, capture_output=True, text=True, errors="replace", check=False,
                stdin=subprocess.DEVNULL, timeout=CHECK_LIMIT.total_seconds(),
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as failed:
            raise self.unusable(failed) from None

    def unusable(self, why: object) -> NodeError:
        """Return the error that says which setting to look at."""
        return NodeError(f"cannot run {self.binary}: {why}; set {self.setting} to a working one")


class Master:
    """The process that leads all others of a proxy; it may have been started by an earlier agent."""

    def __init__(
        self, program: Program, arguments: Sequence[str], log: Path, is_ours: Callable[[list[str]], bool]
    ) -> None:
        self._program = program
        self._arguments = arguments
        self._log = log
        self._is_ours = is_ours
        """Says by its command line whether a process is the master, or a worker that looks like it."""
        self._child: int | None = None

    def spawn(self) -> None:
        """Start it, with an empty environment and its output in the log."""
        command = [str(self._program.binary), *self._arguments]
        appending = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        streams = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(self._log), appending, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        try:
            # A session of its own: what ends the agent, or its terminal, does not end the proxy.
            self._child = os.posix_spawn(command[0], command, {}, file_actions=streams, setsid=True)
        except OSError as failed:
            raise self._program.unusable(failed) from None

    def find(self) -> int | None:
        """Return the process id of the one that is ours and whose parent is not."""
        self._reap()
        ours = {pid for pid in list_processes() if self._is_ours(command_line(pid))}
        return next((pid for pid in sorted(ours) if find_parent(pid) not in ours), None)

    def ended(self) -> bool:
        """Say whether the process that `spawn` started is gone."""
        self._reap()
        return self._child is None

    def kill(self) -> None:
        """End the process that `spawn` started."""
        if self._child is not None:
            end_process(self._child, signal.SIGTERM, signal.SIGKILL)
            self._reap()

    def end(self, *signals: signal.Signals) -> None:
        """Send one signal after the other, each after a while, until the master is gone."""
        if (master := self.find()) is not None:
            end_process(master, *signals)
        self._reap()

    def _reap(self) -> None:
        if self._child is not None:
            with suppress(ChildProcessError):
                ended, _ = os.waitpid(self._child, os.WNOHANG)
                self._child = None if ended else self._child

    def log_end(self) -> int:
        """Return where the log ends now, in bytes."""
        return self._log.stat().st_size if self._log.exists() else 0

    def said_since(self, start: int) -> str:
        """Return what was logged after byte `start`."""
        with self._log.open("rb") as log:
            log.seek(start)
            return log.read(MAX_LOG).decode("utf-8", "replace")

    def trim_log(self) -> None:
        """Keep the log, to which every change of an upstream's health goes, short."""
        if self.log_end() > MAX_LOG:
            os.truncate(self._log, 0)


def list_processes() -> Iterable[int]:
    """Give the ids of all processes."""
    return (int(path.name) for path in Path("/proc").glob("[0-9]*"))


def command_line(pid: int) -> list[str]:
    """Return the words of a process's command line, none if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def find_parent(pid: int) -> int | None:
    """Return the id of a process's parent, None if the process is gone."""
    try:
        # The second field is the program's name, in parentheses; it may contain anything.
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except OSError:
        return None


def end_process(pid: int, *signals: signal.Signals) -> None:
    """Send one signal after the other until the process is gone."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for number in signals:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, number)
            if select.select([process], [], [], STOP_LIMIT.total_seconds())[0]:
                return
    finally:
        os.close(process)


def in_one_line(complaints: Collection[str]) -> str:
    """Return the first complaints of a proxy as one printable line of bounded length."""
    first = list(complaints)[:3]
    return "; ".join("".join(filter(str.isprintable, text)) for text in first)[:500] or "it said nothing"
