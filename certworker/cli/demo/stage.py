"""What is there before certworker does anything: a folder, Pebble, an upstream, settings; and its commands.

Every process is in a group of its own, so that Ctrl-C reaches the demo alone, which then ends them in order.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import tomli_w

from certworker.cli.demo.interrupts import Interrupts
from certworker.cli.pebble import HOST, Pebble, find_binary, free_ports
from certworker.errors import CertworkerError, UsageError
from certworker.node.folder import Folder
from certworker.node.haproxy import Haproxy, HaproxySetup
from certworker.node.patience import Patience

NAME = "shop.demo.test"
DRAIN_LIMIT = 32.0
"""Seconds; the service promises to drain within 30."""
_COMMAND_LIMIT = 60.0
_LONGEST_BASE = 40
"""A longer temporary folder leaves no room for the paths of HAProxy's sockets."""


def check_tools() -> None:
    """Raise UsageError naming the programs that are missing."""
    missing = [name for name in ("pebble", "pebble-challtestsrv") if not _has_pebble(name)]
    missing += [] if find_haproxy() else ["haproxy"]
    if missing:
        raise UsageError(f"{', '.join(missing)}: not installed; run `make demo` in a checkout, which installs it")


def find_haproxy() -> str | None:
    """Return the path of HAProxy, which Debian keeps where few users look."""
    return shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/sbin")


class Stage:
    """The scene: where things are, how a command is run in it, and the end of everything that was started."""

    def __init__(self, folder: Path, pebble: Pebble, upstream_port: int, interrupts: Interrupts) -> None:
        self.folder = folder
        self.pebble = pebble
        self.upstream_port = upstream_port
        self.http_port = pebble.http_port
        self.https_port, responder_port, api_port = free_ports(3)
        self.settings_file = folder / "certworker.toml"
        self.root_file = folder / "pebble-root.pem"
        self._interrupts = interrupts
        self._started: list[subprocess.Popen[str]] = []
        self.root_file.write_text(pebble.root_pem())
        settings = {
            "data_dir": str(folder / "data"), "embedded_node": "haproxy", "node_name": "demo",
            "haproxy_bin": find_haproxy(), "acme_directory_url": pebble.directory_url,
            "acme_ca_bundle": str(pebble.ca_bundle), "acme_tos_agreed": True, "acme_contact": "ops@demo.test",
            "dns_resolver": pebble.dns_address, "responder_listen": f"{HOST}:{responder_port}",
            "api_listen": f"{HOST}:{api_port}", "log_format": "json",
        }  # fmt: skip
        self.settings_file.write_text(tomli_w.dumps(settings))

    def write(self, name: str, content: str) -> None:
        """Write a file of the demo's folder."""
        (self.folder / name).write_text(content)

    def certworker(self, *arguments: str) -> str:
        """Run a command to its end and return what it printed; CertworkerError if it fails."""
        return self.finish(self.spawn(*arguments, stdout=subprocess.PIPE))

    def spawn(self, *arguments: str, stdout: int) -> subprocess.Popen[str]:
        """Start a command, which ends with the demo at the latest; its stderr is a pipe."""
        with self._interrupts.held():
            process = subprocess.Popen(
                [sys.executable, "-m", "certworker", *arguments], env=_environment(self.settings_file),
                cwd=self.folder, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, text=True,
                errors="replace", process_group=0,
            )  # fmt: skip
            self._started.append(process)
        return process

    def finish(self, process: subprocess.Popen[str]) -> str:
        """Wait for a command and return what it printed; CertworkerError if it fails."""
        output, said = process.communicate(timeout=_COMMAND_LIMIT)
        if process.returncode != 0:
            command = " ".join(map(str, process.args[1:]))  # type: ignore[index]
            raise CertworkerError(f"`{command}`: exit code {process.returncode}: {' '.join(said.split())[-500:]}")
        return output

    def close(self) -> None:
        """End what still runs, and the proxy that a service which could not drain has left, as it should."""
        codes = [_end(process) for process in reversed(self._started)]
        node, binary = self.folder / "data" / "node", find_haproxy()
        if any(codes) and node.is_dir() and binary:
            Haproxy(Folder(node), HaproxySetup(Path(binary)), Patience()).stop()


@contextmanager
def open_stage(interrupts: Interrupts) -> Iterator[Stage]:
    """Start the CA and the upstream in a new folder; at the end all is stopped and the folder is gone."""
    base = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="cw-demo-", dir=base if len(base) <= _LONGEST_BASE else "/tmp"))  # noqa: S108
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        # A random 0 to 2 seconds before each validation; 5 % of good nonces are refused, as Pebble does.
        pebble = stack.enter_context(Pebble(workdir=folder / "pebble", va_sleep=3))
        stage = Stage(folder, pebble, stack.enter_context(_upstream()), interrupts)
        stack.callback(stage.close)
        yield stage


class _Upstream(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A health check that hangs up is no news."""


class _Hello(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = f"hello from the upstream: {self.headers.get('Host', '?')} asked for {self.path}\n".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """The visitor counts."""


@contextmanager
def _upstream() -> Iterator[int]:
    with _Upstream((HOST, 0), _Hello) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="upstream", daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def _environment(settings_file: Path) -> dict[str, str]:
    """Return this process's environment without what would lead certworker elsewhere."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("CERTWORKER_") and not name.lower().endswith("_proxy")
    }
    return kept | {"CERTWORKER_CONFIG": str(settings_file)}


def _end(process: subprocess.Popen[str]) -> int:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(DRAIN_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return process.returncode


def _has_pebble(name: str) -> bool:
    try:
        find_binary(name)
    except UsageError:
        return False
    return True
