"""The operator's own HAProxy or nginx, which includes files of ours.

Its configuration, its process and its routes are the operator's. We write whole sets of files, let one symlink say
which of them is read, and have the operator's own commands check and reload. Which set the proxy has read it says
itself where the challenge route is: below the path of challenges, to whoever asks from this machine.

    include -> lists/<digest>       what the operator's configuration names; swapped by one rename
    lists/<digest>/                 one set, complete: for HAProxy with links to the certificates
    versions/<name>/snapshot.json   what a set is printed from

A set that the check or the reload refuses gives way to the one before it. The first one has none before it and
stays, because a proxy does not start without a file that its configuration names.

Sources: systemctl(1) "reload", HAProxy 2.6 management guide §4, nginx's documentation "Controlling nginx".
"""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Protocol

from certworker.core.snapshot import Snapshot, read_snapshot
from certworker.errors import CheckRefused, CommandRefused, InputError, NodeError, ReloadRefused
from certworker.node.folder import Folder
from certworker.node.lookup import Lookup, load_addresses, save_addresses
from certworker.node.machine import Program, in_one_line
from certworker.node.nginx import read_pair
from certworker.node.pairs import load_pair
from certworker.node.patience import Patience
from certworker.node.probe import ROUNDS, SETTLE_LIMIT, ask_challenge
from certworker.node.state import Lists
from certworker.render.files import CHALLENGE_PATH, RenderedFile, RenderedFiles, ServedFile, is_name
from certworker.render.included import (
    BACKEND,
    MARK,
    IncludedLists,
    plain_listeners,
    render_for_haproxy,
    render_for_nginx,
    render_haproxy_mark,
    render_nginx_mark,
)

COMMAND_LIMIT = timedelta(seconds=30)
"""For a command, and then for the proxy: 10,000 certificates take HAProxy 12 s with OpenSSL 3.0.

No heartbeat is sent meanwhile, and a node that is silent for a minute (NODE_SILENT_SECS) counts as gone.
"""
RETRY = timedelta(minutes=1)
"""How long what was refused is left alone: a check of many certificates takes a whole core."""
LINGER = timedelta(milliseconds=300)
"""nginx lets its old workers accept for 100 ms after the new ones have started (`ngx_process_cycle.c`)."""
COMMAND_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""All that a command gets of an environment: ours may hold a database's password."""

_SNAPSHOT = "snapshot.json"
_MAX_SAID = 1 << 16
_VERSION = re.compile(r"(?:HA-?Proxy version |nginx version: \S*?/)(?P<number>[0-9]+\.[0-9]+\S*)")


@dataclass(frozen=True, slots=True)
class Commands:
    """How the operator's proxy is checked and told to reload; each is run as it stands, without a shell."""

    reload: tuple[str, ...]
    check: tuple[str, ...] = ()
    """None if empty."""
    limit: timedelta = COMMAND_LIMIT
    pause: timedelta = RETRY


@dataclass(frozen=True, slots=True)
class Refusal:
    """How a command did not end well."""

    why: str
    complaints: tuple[str, ...] = ()
    """What of its output says so, line by line."""
    hung: bool = False
    """Whether it did not end at all."""


class Dialect(Protocol):
    """What differs between the proxies."""

    name: str

    links_pairs: bool
    """Whether it reads certificates from files of their own."""

    def print_set(self, snapshot: Snapshot, lists: IncludedLists) -> dict[str, bytes]:
        """Return the files of a set by name."""

    def print_mark(self, digest: str) -> dict[str, bytes]:
        """Return the file that lets the proxy say which set it has read."""

    def note_taken_over(self) -> None:
        """Take note that the proxy has read what was printed last."""

    def is_outdated(self) -> bool:
        """Say whether `print_set` would print something else now than what was taken over, for the same values."""

    @property
    def hint(self) -> str:
        """What to look at where another certificate is shown."""

    @property
    def route_hint(self) -> str:
        """What to look at where the challenge route is not there."""


class HaproxyDialect:
    """HAProxy: a backend for challenges, and crt-lists."""

    name = "haproxy"
    links_pairs = True

    def __init__(self, folder: Folder) -> None:
        self._include = folder.include

    def print_set(self, snapshot: Snapshot, lists: IncludedLists) -> dict[str, bytes]:
        return render_for_haproxy(snapshot, lists, str(self._include))

    def print_mark(self, digest: str) -> dict[str, bytes]:
        return render_haproxy_mark(digest)

    def note_taken_over(self) -> None:
        """Do nothing: HAProxy looks names up by itself."""

    def is_outdated(self) -> bool:
        return False

    @property
    def hint(self) -> str:
        return f"does the bind line of that port name its crt-list in {self._include}?"

    @property
    def route_hint(self) -> str:
        return (
            f"does its frontend say `use_backend {BACKEND} if {{ path_beg {CHALLENGE_PATH} }}` and redirect that path "
            f"nowhere, and is {self._include}/haproxy.cfg loaded with a -f of its own?"
        )


class NginxDialect:
    """nginx: a location for challenges, and maps of certificates."""

    name = "nginx"
    links_pairs = False

    def __init__(self, folder: Folder, lookup: Lookup) -> None:
        self._include = folder.include
        self._lookup = lookup
        self._addresses_path = folder.path / "addresses.json"
        lookup.remember(load_addresses(self._addresses_path))
        self._printed: Mapping[str, tuple[str, ...]] = {}
        self._taken_over: Mapping[str, tuple[str, ...]] = {}
        """The addresses of responders that were printed last, and those that the proxy has read."""

    def print_set(self, snapshot: Snapshot, lists: IncludedLists) -> dict[str, bytes]:
        hosts = {responder.host for responder in snapshot.responders if is_name(responder.host)}
        self._printed = self._lookup.addresses(hosts)
        pairs = {line.file: read_pair(line.file) for lines in lists.certificates.values() for line in lines}
        return render_for_nginx(snapshot, lists, str(self._include), pairs, self._printed)

    def print_mark(self, digest: str) -> dict[str, bytes]:
        return render_nginx_mark(digest)

    def note_taken_over(self) -> None:
        if self._printed != self._taken_over:
            save_addresses(self._addresses_path, self._printed)
        self._taken_over = self._printed

    def is_outdated(self) -> bool:
        return self._lookup.addresses(self._taken_over, timedelta()) != self._taken_over

    @property
    def hint(self) -> str:
        return f"does the server of that name on that port include its certificates.conf in {self._include}?"

    @property
    def route_hint(self) -> str:
        return (
            f"does its server include {self._include}/challenge.conf, and http {{ }} {self._include}/http.conf, and "
            "does any redirect stand in a location of its own?"
        )


class Included:
    """The operator's proxy, as far as it includes our files. A `node.apply.Proxy`."""

    managed = False

    def __init__(
        self, folder: Folder, dialect: Dialect, commands: Commands, patience: Patience, binary: Path | None = None
    ) -> None:
        self._binary = binary
        self._folder = folder
        self._dialect = dialect
        self._commands = commands
        self._patience = patience
        self._lists = Lists()
        self._told: str | None = None
        """The set that the proxy was told to read last, with success."""
        self._refused: dict[str, tuple[float, NodeError]] = {}
        """By set, since the last one that was taken over: until when it is left alone, and why."""
        self._passed: str | None = None
        """The set that the check has just passed, until a reload."""
        self._good = folder.included_set()
        """The set to go back to: the last one that was taken over, or the one that was there at the start."""

    def describe(self) -> str:
        """Return for example `haproxy 2.6.12, the operator's own`; the number only if a program of it is here."""
        found = None if self._binary is None else _VERSION.search(_ask_version(self._binary))
        return " ".join([self._dialect.name, *(found.groups() if found else ())]) + ", the operator's own"

    @property
    def hint(self) -> str:
        return self._dialect.hint

    def render(self, snapshot: Snapshot, number: int) -> RenderedFiles:
        """Keep what sets are printed from. The number is no part of it: routes may change, and no file of ours does."""
        if not plain_listeners(snapshot):
            raise NodeError(
                f"version {number} has no http listener: add one for the port on which a CA asks the operator's proxy"
            )
        return RenderedFiles({_SNAPSHOT: RenderedFile(snapshot.canonical())})

    def is_outdated(self) -> bool:
        return self._dialect.is_outdated()

    def write_lists(self, lists: Lists) -> None:
        """Remember what the next check or reload writes, together with a version: as one set, or not at all."""
        self._lists = lists

    def list_names(self, lists: Lists) -> frozenset[str]:  # noqa: ARG002 - only what is in use counts
        """Return the names of the sets that the proxy may read."""
        return frozenset(name for name in (self._folder.included_set(), self._good) if name is not None)

    def check_pair(self, file: str) -> None:
        """Let OpenSSL load it: a pair that no proxy would take must not come between the operator and a reload."""
        load_pair(file)

    def check(self, version: Path) -> tuple[str, ...]:
        """Put the set of `version` in place, and have the operator's command check it, or raise `CheckRefused`."""
        name = self._write_set(version)
        self._check(name, self._ports(version))
        self._passed = name
        return ()

    def _check(self, name: str, ports: Iterable[int]) -> None:
        """Put set `name` in place, and have the operator's command check it, or raise `CheckRefused`."""
        self._raise_again(name, ports)
        self._folder.include_set(name)
        if self._commands.check and (refusal := self._run("check", self._commands.check)) is not None:
            if self._good is not None:
                self._folder.include_set(self._good)
            raise self._refuse(name, CheckRefused(refusal.why, _named_files(self._folder.certs, refusal.complaints)))

    def _refuse(self, name: str, why: NodeError) -> NodeError:
        now = self._patience.monotonic()
        self._refused = {name: one for name, one in self._refused.items() if now < one[0]}
        self._refused[name] = now + self._commands.pause.total_seconds(), why
        return why

    def _raise_again(self, name: str, ports: Iterable[int]) -> None:
        """Raise what was said against set `name` a moment ago, unless the proxy has read it since."""
        until, why = self._refused.get(name, (0, None))
        if why is not None and self._patience.monotonic() < until and _find_wrong(ports, name):
            raise why.with_traceback(None)

    def running(self) -> bool:
        """Say yes: whether it runs is the operator's business, and what it serves is asked."""
        return True

    def start(self) -> None:
        """See that it has what the folder says; it is started by the operator."""
        self.reload()

    def stop(self) -> None:
        """Leave it to the operator."""

    def reload(self) -> None:
        """Have the proxy read the current version and lists, unless it has, or raise `NodeError`."""
        passed, self._passed = self._passed, None
        name = self._write_set(self._folder.current)
        before = _ask_marks(self._ports(self._folder.current))
        if name != self._told and set(before.values()) != {name}:
            if name != passed:
                self._check(name, before)
            if (refusal := self._tell(name, before)) is not None:
                self._go_back(name, again=not refusal.hung)
                raise self._refuse(name, ReloadRefused(refusal.why))
            self._refused.clear()
        self._folder.include_set(name)
        self._note_taken_over(name)

    def _note_taken_over(self, name: str) -> None:
        """Remember that the proxy has read set `name`, which was printed last."""
        self._told = self._good = name
        self._dialect.note_taken_over()

    def _tell(self, name: str, before: Mapping[int, str]) -> Refusal | None:
        """Have the proxy reload, and return why it did not take over the set that is in place, as far as that shows."""
        if (refusal := self._run("reload", self._commands.reload)) is not None:
            return refusal
        # The command may be over before the proxy is. Where no route was there, there is nothing to wait for.
        marked = [port for port, shown in before.items() if _is_mark(shown)]
        limit = self._commands.limit if marked else SETTLE_LIMIT
        if self._patience.until(lambda: self._stays(marked or before, name), limit):
            return None
        for port, shown in _find_wrong(before, name).items():
            if port in marked or _is_mark(shown):
                gives = f"port {port} gives {_tell_mark(shown)}, not the new ones"
                return Refusal(f"the reload command ended well, but {gives}")
        return None  # its configuration has no route yet, and only handshakes can tell

    def _stays(self, ports: Collection[int], name: str) -> bool:
        """Say whether the proxy has read set `name`, and workers that have not are gone."""
        if _find_wrong(ports, name):
            return False
        self._patience.sleep(LINGER.total_seconds())
        return not any(_find_wrong(ports, name) for _ in range(ROUNDS))

    def _go_back(self, refused: str, *, again: bool) -> None:
        """Bring back the set before, and have the proxy read it if the command is to be run again."""
        self._told = None
        if self._good is None or self._good == refused:
            return
        self._folder.include_set(self._good)
        if again and self._run("reload", self._commands.reload) is None:
            self._told = self._good

    def why_not_served(self, number: int) -> str | None:  # noqa: ARG002 - what is current is the agent's to say
        """Say which plain port does not show that the proxy has read the set in place; None: all do."""
        try:
            wrong = self._find_wrong_ports()
        except (OSError, InputError) as failed:
            return f"the folder is not as it was left: {failed}"
        if not wrong:
            return None
        port, shown = next(iter(wrong.items()))
        asked = f"http://127.0.0.1:{port}{CHALLENGE_PATH}{MARK}"
        return f"the challenge route is not there: {asked} gives {_tell_mark(shown)}; {self._dialect.route_hint}"

    def _find_wrong_ports(self) -> dict[int, str]:
        ports, name = self._ports(self._folder.current), self._folder.included_set() or ""
        # A worker that is about to leave may still answer for a moment.
        self._patience.until(lambda: not any(map(_is_mark, _find_wrong(ports, name).values())), SETTLE_LIMIT)
        return _find_wrong(ports, name)

    def serves(self, lists: Lists) -> bool:
        """Say whether the running proxy has read exactly these lists."""
        self._lists = lists
        name = self._write_set(self._folder.current)
        if name != self._folder.included_set() or _find_wrong(self._ports(self._folder.current), name):
            return False
        self._note_taken_over(name)
        return True

    def swap(self, before: Lists, after: Lists) -> None:  # noqa: ARG002 - they make no difference
        """Refuse: what runs is not ours to talk to."""
        raise CommandRefused("the operator's proxy takes files over by its reload command only")

    def tidy(self) -> None:
        """Do nothing: its log is the operator's."""

    def _ports(self, version: Path) -> list[int]:
        return [row.port for row in plain_listeners(self._read(version))]

    def _read(self, version: Path) -> Snapshot:
        return read_snapshot(json.loads((version / _SNAPSHOT).read_bytes()))

    def _write_set(self, version: Path) -> str:
        """Write the set of a version's folder and the present lists, unless it is there, and return its name."""
        # The list for all policies is named by a bind line also while no listener asks for it.
        certificates = {None: frozenset[ServedFile](), **self._lists.certificates}
        lists = IncludedLists(certificates, self._lists.thumbprints or {})
        files = self._dialect.print_set(self._read(version), lists)
        name = _digest(files)
        pairs = {line.file for lines in certificates.values() for line in lines} if self._dialect.links_pairs else set()
        self._folder.write_set(name, files | self._dialect.print_mark(name), pairs)
        return name

    def _run(self, what: str, command: Sequence[str]) -> Refusal | None:
        """Run one of the operator's commands, and return why it did not end well; None: it did."""
        shown = f"the {what} command `{shlex.join(command)}`"
        # Into a file, not a pipe: what a command leaves running would keep a pipe open.
        with tempfile.TemporaryFile(dir=self._folder.run) as output:
            try:
                process = subprocess.Popen(
                    command, env={"PATH": COMMAND_PATH}, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                    start_new_session=True,
                )  # fmt: skip
            except OSError as failed:
                return Refusal(f"{shown} cannot be run: {failed}")
            try:
                code = process.wait(self._commands.limit.total_seconds())
            except subprocess.TimeoutExpired:
                _end(process)
                return Refusal(f"{shown} did not end within {self._commands.limit.total_seconds():g} s", hung=True)
            complaints = _complaints(_read_back(output))
        return None if code == 0 else Refusal(f"{shown} ended with {code}: {in_one_line(complaints)}", complaints)


def _ask_version(binary: Path) -> str:
    """Return what it says of itself; nothing if it cannot be run, because nothing else needs it."""
    try:
        done = Program(binary, "").run("-v")
    except NodeError:
        return ""
    return done.stdout + done.stderr


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and what it started, as far as we may: what sudo runs is not ours to end."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(1)


def _read_back(output: IO[bytes]) -> str:
    output.seek(0)
    return output.read(_MAX_SAID).decode("utf-8", "replace")


def _complaints(said: str) -> tuple[str, ...]:
    """Return the lines of a command's output that say what is wrong, else the last ones."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return tuple([line for line in lines if re.search(r"\[(ALERT|emerg)\]", line)] or lines[-3:])


def _named_files(certs: Path, complaints: Iterable[str]) -> frozenset[str]:
    """Return the certificate files that are complained of; a set names them by links."""
    return frozenset(str(certs / name) for name in re.findall(r"\b[0-9a-f]{64}\.pem\b", "\n".join(complaints)))


def _digest(files: Mapping[str, bytes]) -> str:
    found = hashlib.sha256()
    for name, content in sorted(files.items()):
        found.update(f"{name} {len(content)}\n".encode() + content)
    return found.hexdigest()


def _ask_marks(ports: Iterable[int]) -> dict[int, str]:
    """Return what each plain port says of the set that the proxy has read, or what it says instead."""
    return {port: ask_challenge(port, "localhost", MARK).strip() for port in ports}


def _find_wrong(ports: Iterable[int], name: str) -> dict[int, str]:
    """Return the ports that do not say that the proxy has read set `name`, and what they say instead."""
    return {port: shown for port, shown in _ask_marks(ports).items() if shown != name}


def _is_mark(shown: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{64}", shown) is not None


def _tell_mark(shown: str) -> str:
    return "other files of certworker" if _is_mark(shown) else repr(shown[:100])
