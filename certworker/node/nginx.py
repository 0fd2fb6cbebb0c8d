"""One nginx: its process and its verdicts.

It takes everything over by a reload, the certificates too. Neither its own check nor the answer to a
signal says enough: the check looks at no certificate (`check_pair` does), and whether a reload was
taken over shows in its workers, and whether it was refused in its log.

Sources: nginx's documentation "Controlling nginx", "Command-line parameters"; its `ngx_cycle.c` for
what is logged when a port cannot be bound.
"""

import hashlib
import os
import re
import resource
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from certworker.core.snapshot import Snapshot
from certworker.errors import CheckRefused, CommandRefused, NodeError, ReloadRefused
from certworker.node.folder import Folder
from certworker.node.lookup import Lookup, load_addresses, save_addresses
from certworker.node.machine import (
    READY_LIMIT,
    Master,
    Program,
    command_line,
    find_parent,
    has_ipv6,
    in_one_line,
    list_processes,
)
from certworker.node.pairs import load_pair
from certworker.node.patience import Patience
from certworker.node.state import Lists
from certworker.render.files import RenderedFiles, names_to_resolve
from certworker.render.nginx import CONFIG, NginxOptions, render_nginx
from certworker.render.nginx_lists import (
    MARK,
    THUMBPRINTS,
    PairText,
    maps_name,
    render_certificates,
    render_mark,
    render_thumbprints,
    server_name,
)

OLDEST = (1, 22)
MAX_CONNECTIONS = 8192
ANSWER_LIMIT = timedelta(seconds=3)

_VERSION = re.compile(r"nginx version: \S*?/(?P<number>[0-9]+(?:\.[0-9]+)+)")
_DYNAMIC_STREAM = re.compile(r"--with-stream=dynamic\b")
_MODULES = re.compile(r"--modules-path=(?P<path>\S+)")
_COMPLAINT = re.compile(r"\[emerg\] (?:\d+#\d+: )?(?P<text>.*)")
_WARNING = re.compile(r"\[warn\] (?:\d+#\d+: )?(?P<text>.*)")
_BIND_AGAIN = re.compile(r"bind\(\) to \S+ failed \(98: ")
"""nginx tries a port that is in use five times. Only `still could not bind()` is the verdict."""
_MASTER = "nginx: master process "
_WORKER = "nginx: worker process"
_ANSWER = re.compile(rb"\r\n\r\n(?P<number>\d+) (?P<digest>[0-9a-f]+)$")
_KEY = "-----BEGIN PRIVATE KEY-----"


def allowed_connections() -> int:
    """Return how many connections a worker may have; each may need a second open file, to the upstream."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if hard == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, hard // 2)


@dataclass(frozen=True, slots=True)
class NginxSetup:
    """How this machine runs nginx."""

    binary: Path
    ipv6: bool = field(default_factory=has_ipv6)
    user: str | None = None
    max_connections: int = field(default_factory=allowed_connections)
    reserved: tuple[str, ...] = ()
    """`host:port` of what is certworker's own: no name of an upstream may lead there."""


@dataclass(frozen=True, slots=True)
class Build:
    """What the binary says of itself."""

    number: str
    stream_module: str | None
    """The file to be loaded; None if the module is built in."""

    @property
    def version(self) -> tuple[int, ...]:
        return tuple(map(int, self.number.split(".")))


@dataclass(frozen=True, slots=True)
class Mark:
    """What the running process has read."""

    number: int
    digest: str


class Nginx:
    """The nginx of one folder, running or not."""

    managed = True
    hint = ""

    def __init__(self, folder: Folder, setup: NginxSetup, patience: Patience, lookup: Lookup | None = None) -> None:
        self._folder = folder
        self._setup = setup
        self._patience = patience
        self._lookup = lookup or Lookup(patience)
        self._addresses_path = folder.path / "addresses.json"
        self._lookup.remember(load_addresses(self._addresses_path))
        self._log = folder.run / "nginx.log"
        self._socket = folder.run / "version.sock"
        self._log.touch(mode=0o600)  # nginx would let others read it
        self._program = Program(setup.binary, "NGINX_BIN")
        self._build: Build | None = None
        config = folder.current / CONFIG
        arguments = ("-c", str(config), "-p", f"{folder.path}/", "-e", str(self._log))
        self._process = Master(self._program, arguments, self._log, lambda words: _is_master(words, config))
        self._written: str | None = None
        """Digest of the lists that lie in the folder."""
        self._rendered: dict[str, tuple[str, ...]] = {}
        self._taken_over: dict[str, tuple[str, ...]] | None = None
        """The addresses that were rendered last, and those that the running process has."""

    def describe(self) -> str:
        """Return for example `nginx 1.22.1`, or raise `NodeError` if it cannot be run or is too old."""
        build = self._find_build()
        if build.version < OLDEST:
            raise NodeError(f"{self._setup.binary}: nginx {build.number} is too old, 1.22 or newer is needed")
        return f"nginx {build.number}"

    def _find_build(self) -> Build:
        if self._build is None:
            said = self._program.run("-V").stderr
            found, modules = _VERSION.search(said), _MODULES.search(said)
            if found is None:
                raise NodeError(f"{self._setup.binary} -V: this is no nginx, set NGINX_BIN to one")
            folder = modules["path"] if modules else "modules"
            module = f"{folder}/ngx_stream_module.so" if _DYNAMIC_STREAM.search(said) else None
            self._build = Build(found["number"], module)
        return self._build

    def render(self, snapshot: Snapshot, number: int) -> RenderedFiles:
        """Print a version for this machine, with the addresses that its names resolve to now."""
        setup, build = self._setup, self._find_build()
        self._rendered = dict(self._lookup.addresses(names_to_resolve(snapshot)))
        if self._rendered:
            # A DNS that is away when the next agent starts takes no upstream away.
            save_addresses(self._addresses_path, self._rendered)
        if self._taken_over is None:
            self._taken_over = self._rendered
        options = NginxOptions(
            str(self._folder.path), number, build.version, setup.ipv6, setup.user, build.stream_module,
            setup.max_connections, self._rendered, setup.reserved,
        )  # fmt: skip
        return render_nginx(snapshot, options)

    def is_outdated(self) -> bool:
        """Say whether a name resolves to something else than the running process was given."""
        return bool(self._rendered) and self._lookup.addresses(self._rendered, timedelta()) != self._taken_over

    def write_lists(self, lists: Lists) -> None:
        """Write the maps that the next start or reload reads, and last the mark of them all."""
        digest = _digest(lists)
        if digest == self._written:
            return
        self._written = None
        for name, content in self._print_lists(lists).items():
            self._folder.write_list(self._folder.lists / name, content)
        self._folder.write_list(self._folder.lists / MARK, render_mark(digest))
        self._written = digest

    def _print_lists(self, lists: Lists) -> dict[str, bytes]:
        files: dict[str, bytes] = {}
        for policy_id, served in lists.certificates.items():
            files |= render_certificates(policy_id, served, {line.file: read_pair(line.file) for line in served})
        if lists.thumbprints is not None:
            files[THUMBPRINTS] = render_thumbprints(lists.thumbprints)
        return files

    def list_names(self, lists: Lists) -> frozenset[str]:
        """Return the names of the files that `write_lists` writes."""
        names = {name(policy_id) for policy_id in lists.certificates for name in (maps_name, server_name)}
        return frozenset({MARK, *names} | ({THUMBPRINTS} if lists.thumbprints is not None else set()))

    def check_pair(self, file: str) -> None:
        """Let OpenSSL load a certificate's file, or raise `PairRefused`; nginx does that in a handshake only."""
        load_pair(file)

    def check(self, version: Path) -> tuple[str, ...]:
        """Return nginx's own remarks on a version's folder, or raise `CheckRefused`."""
        done = self._program.run("-t", "-c", str(version / CONFIG), "-p", f"{self._folder.path}/", "-e", "stderr")
        if done.returncode != 0:
            hint = "; a port route needs nginx's stream module (libnginx-mod-stream)" if "stream" in done.stderr else ""
            raise CheckRefused(f"nginx refuses {version.name}: {_complaints(done.stderr)}{hint}")
        return tuple(_WARNING.findall(done.stderr))

    def running(self) -> bool:
        """Say whether our nginx runs and answers, whoever started it."""
        return self._process.find() is not None and self._patience.until(self._mark, ANSWER_LIMIT) is not None

    def start(self) -> None:
        """Start the current version, and return when it serves."""
        self._dismiss_orphans()
        # nginx does not take over the place of a socket that a killed one left.
        self._socket.unlink(missing_ok=True)
        log_end = self._process.log_end()
        self._process.spawn()
        served = self._patience.until(lambda: self._process.ended() or self._mark() is not None, READY_LIMIT)
        if not served or self._process.ended():
            self._process.kill()
            raise NodeError(f"nginx does not start: {_complaints(self._process.said_since(log_end))}")
        self._taken_over = self._rendered

    def reload(self) -> None:
        """Make the running nginx take the current version over, or raise `ReloadRefused`."""
        master = self._process.find()
        if master is None:
            raise ReloadRefused("nginx cannot be reloaded: its master is not there")
        before, log_end = self._accepting(master), self._process.log_end()
        os.kill(master, signal.SIGHUP)
        over = self._patience.until(lambda: self._refused(log_end) or self._replaced(master, before), READY_LIMIT)
        if not over or self._refused(log_end):
            raise ReloadRefused(f"nginx refuses the reload: {_complaints(self._process.said_since(log_end))}")
        self._taken_over = self._rendered

    def _refused(self, log_end: int) -> bool:
        complaints = _COMPLAINT.findall(self._process.said_since(log_end))
        return any(not _BIND_AGAIN.match(text) for text in complaints)

    def _replaced(self, master: int, before: frozenset[int]) -> bool:
        """Say whether workers accept, and none of those that did before."""
        now = self._accepting(master)
        return bool(now) and not now & before and self._mark() is not None

    def _accepting(self, master: int) -> frozenset[int]:
        """Return the workers that have not been told to leave, which their title would say."""
        return frozenset(pid for pid in list_processes() if _title(pid) == _WORKER and find_parent(pid) == master)

    def stop(self) -> None:
        """Let the open connections end for a while, then end the process."""
        self._process.end(signal.SIGQUIT, signal.SIGTERM, signal.SIGKILL)
        self._dismiss_orphans()

    def _dismiss_orphans(self) -> None:
        """Tell workers whose master was killed to leave: they would hold the ports for ever."""
        master = self._process.find()
        for pid in list_processes():
            if _title(pid) == _WORKER and find_parent(pid) != master and _has_open(pid, self._log):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGQUIT)

    def served_number(self) -> int | None:
        """Return the number of the version that the running process has taken over."""
        mark = self._mark()
        return mark.number if mark else None

    def why_not_served(self, number: int) -> str | None:
        """Say what it runs instead of version `number`; None: it runs that."""
        shown = self.served_number()
        return None if shown == number else f"the proxy runs version {shown}"

    def serves(self, lists: Lists) -> bool:
        """Say whether the running process has read exactly these lists."""
        mark = self._mark()
        return mark is not None and mark.digest == _digest(lists)

    def swap(self, before: Lists, after: Lists) -> None:  # noqa: ARG002 - they make no difference
        """Refuse: nginx takes nothing over without a reload."""
        raise CommandRefused("nginx takes certificates over by a reload only")

    def tidy(self) -> None:
        """Keep the log short."""
        self._process.trim_log()

    def _mark(self) -> Mark | None:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(ANSWER_LIMIT.total_seconds())
                connection.connect(str(self._socket))
                connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
                answer = b"".join(iter(lambda: connection.recv(4096), b""))
        except OSError:
            return None
        found = _ANSWER.search(answer)
        return Mark(int(found["number"]), found["digest"].decode()) if found else None


def _digest(lists: Lists) -> str:
    """Return the SHA-256 of lists; certificate files are named by their content."""
    lines = [f"{name} {served}" for name, rows in lists.certificates.items() for served in sorted(rows)]
    lines += [f"{name} {thumbprint}" for name, thumbprint in (lists.thumbprints or {}).items()]
    lines += [f"list {name}" for name in lists.certificates]
    lines += ["thumbprints"] if lists.thumbprints is not None else []
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def read_pair(file: str) -> PairText:
    """Return what a certificate's file holds."""
    chain, begin, key = Path(file).read_text(encoding="ascii").partition(_KEY)
    return PairText(chain, begin + key)


def _is_master(words: list[str], config: Path) -> bool:
    # nginx puts what it was started with behind its title, as one word.
    return words[:1] != [] and words[0].startswith(_MASTER) and f" -c {config} " in words[0]


def _title(pid: int) -> str:
    words = command_line(pid)
    return words[0] if words else ""


def _has_open(pid: int, path: Path) -> bool:
    try:
        return any(descriptor.readlink() == path for descriptor in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


def _complaints(said: str) -> str:
    """Return what nginx complained of, in one line, each thing once."""
    complaints = _COMPLAINT.findall(said) or said.strip().splitlines()[-3:]
    return in_one_line(list(dict.fromkeys(complaints)))
