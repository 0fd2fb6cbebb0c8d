"""One box as an operator has it: settings in the environment, the real command line, a real service."""

import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

from certworker.cli.output import to_json
from certworker.cli.pebble import Pebble, free_ports
from certworker.cli.status import describe
from certworker.settings import load
from certworker.wiring import open_app

T = TypeVar("T")


def until(look: Callable[[], T], limit: float = 30.0) -> T:
    """Return the first true answer of `look`; fail the test when there is none within `limit` seconds."""
    give_up_at = time.monotonic() + limit
    while not (seen := look()):
        assert time.monotonic() < give_up_at, "what was waited for did not happen in time"
        time.sleep(0.05)
    return seen


@dataclass
class Box:
    """A data folder, its settings, and what runs on them."""

    folder: Path
    environ: dict[str, str]
    http_port: int
    https_port: int
    upstream_port: int
    outputs: list[str] = field(default_factory=list)
    """Everything that any command said, for the leak scan."""

    @classmethod
    def make(cls, folder: Path, ca: Pebble, *, node: str = "haproxy", **settings: str) -> "Box":
        https, responder, api, upstream = free_ports(4)
        ours = {
            "DATA_DIR": str(folder / "data"), "ACME_DIRECTORY_URL": ca.directory_url,
            "ACME_CA_BUNDLE": str(ca.ca_bundle), "ACME_TOS_AGREED": "true", "NODE_NAME": "box",
            "RESPONDER_LISTEN": f"127.0.0.1:{responder}", "API_LISTEN": f"127.0.0.1:{api}",
            "EMBEDDED_NODE": node, "DNS_RESOLVER": ca.dns_address, "SCAN_INTERVAL_SECS": "2",
            "LOG_FORMAT": "json", **settings,
        }  # fmt: skip
        kept = {name: value for name, value in os.environ.items() if not name.startswith("CERTWORKER_")}
        environ = kept | {f"CERTWORKER_{name}": value for name, value in ours.items()}
        return cls(folder, environ, ca.http_port, https, upstream)

    @property
    def api_port(self) -> int:
        return int(self.environ["CERTWORKER_API_LISTEN"].rpartition(":")[2])

    # -- commands -------------------------------------------------------------------------------------

    def run(self, *arguments: str, expect: int = 0, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command of certworker and check its exit code."""
        done = subprocess.run(
            [sys.executable, "-m", "certworker", *arguments], env=self.environ, cwd=self.folder, text=True,
            capture_output=True, timeout=timeout, check=False,
        )  # fmt: skip
        self.outputs += [done.stdout, done.stderr]
        assert done.returncode == expect, f"{arguments} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done

    def json(self, *arguments: str, expect: int = 0, timeout: float = 120) -> Any:
        return json.loads(self.run(*arguments, "--json", expect=expect, timeout=timeout).stdout)

    def configure(self, *names: str, challenge: str = "forward", ports: Sequence[int] = ()) -> None:
        """Initialise, and write a gateway: http and https listener, one route, one pool, one policy.

        `ports` are of more http listeners.
        """
        self.run("init")
        document = {
            "upstream_pools": [{"name": "web"}],
            "upstream_targets": [{"pool_id": "web", "address": f"127.0.0.1:{self.upstream_port}"}],
            "listeners": [
                {"name": "http", "port": self.http_port, "protocol": "http", "challenge": challenge},
                {"name": "https", "port": self.https_port, "protocol": "https"},
                *({"name": str(port), "port": port, "protocol": "http"} for port in ports),
            ],
            "routes": [
                {"listener_id": "https", "match_expr": {"path": {"prefix": "/"}}, "upstream_pool_id": "web"},
            ],
            "tls_policies": [{"domains": list(names)}] if names else [],
        }
        (self.folder / "gateway.json").write_text(json.dumps(document))
        self.run("config", "apply", "gateway.json")

    @contextmanager
    def service(self, *, name: str = "run", **settings: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run the service; at the end SIGTERM drains it and the exit code is 0."""
        environ = self.environ | {f"CERTWORKER_{key}": value for key, value in settings.items()}
        log = self.folder / f"{name}.log"
        with log.open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "certworker", "run"], env=environ, cwd=self.folder, stdout=out, stderr=out,
                process_group=0,
            )  # fmt: skip
        try:
            yield process
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                assert process.wait(30) == 0, log.read_text()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            self.outputs.append(log.read_text())

    def log(self, name: str = "run") -> list[dict[str, Any]]:
        """Return the service's log so far."""
        lines = (self.folder / f"{name}.log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def status(self) -> Any:
        """Return what `certworker status --json` says, without starting it: who waits asks many times."""
        app = open_app(load(self.environ))
        try:
            return json.loads(to_json(app.db.read(lambda tx: describe(tx, app))))
        finally:
            app.close()

    def lineage(self, dns_name: str) -> dict[str, Any]:
        (found,) = [one for one in self.status()["lineages"] if dns_name in one["names"]]
        return dict(found)

    def served(self, dns_name: str) -> bool:
        found = [one for one in self.status()["lineages"] if dns_name in one["names"]]
        return bool(found) and all(one["served_at"] for one in found)

    # -- the outside ----------------------------------------------------------------------------------

    @contextmanager
    def upstream(self) -> Iterator[None]:
        """Run a little web server that says `hello from upstream`."""
        server = ThreadingHTTPServer(("127.0.0.1", self.upstream_port), _Hello)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def get(self, dns_name: str, root_pem: str, path: str = "/") -> tuple[int, bytes, bytes]:
        """Ask through the proxy as a browser does, trusting only this root; return status, body, leaf DER."""
        context = ssl.create_default_context(cadata=root_pem)
        with (
            socket.create_connection(("127.0.0.1", self.https_port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname=dns_name) as tls,
        ):
            connection = http.client.HTTPSConnection(dns_name, self.https_port, context=context)
            connection.sock = tls
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read(), tls.getpeercert(binary_form=True) or b""

    def api(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.api_port, timeout=10)
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read().decode()
        connection.close()
        self.outputs.append(body)
        return answer.status, body


class _Hello(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b"hello from upstream"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass
