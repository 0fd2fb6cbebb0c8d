"""Gateway machines on one machine: each agent with its HAProxy in a network namespace of its own.

All nodes serve the same ports, so nothing else would do. A namespace has loopback only, and relays: out of it
to the control plane's NODE_LISTEN and responder, and into it to its port 80.
"""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import missing

from .box import Box, until
from .relay import come_in_by, leave_by

ROOT = Path(__file__).parents[2]
_HOLD = 'ip link set lo up && exec "$0" -m tests.flow.relay "$@"'


@dataclass
class Machine:
    """One gateway machine: a namespace, a folder, and what runs there."""

    box: Box
    name: str
    namespace: int
    """The process that keeps it."""

    @property
    def folder(self) -> Path:
        return self.box.folder / self.name

    def command(self, *words: str) -> list[str]:
        return ["nsenter", "-t", str(self.namespace), "-n", *words]

    @contextmanager
    def agent(self, *arguments: str, expect: int = 0) -> Iterator[subprocess.Popen[bytes]]:
        """Run `certworker agent`; at the end SIGTERM stops it and its proxy."""
        environ = {name: value for name, value in self.box.environ.items() if not name.startswith("CERTWORKER_")}
        environ |= {"CERTWORKER_LOG_FORMAT": "json", "PATH": f"{environ.get('PATH', '')}:/usr/sbin"}
        log = self.box.folder / f"{self.name}.log"
        words = [sys.executable, "-m", "certworker", "agent", "--folder", str(self.folder), *arguments]
        with log.open("ab") as out:
            process = subprocess.Popen(
                self.command(*words), env=environ, cwd=self.box.folder, stdout=out, stderr=out, process_group=0
            )
        try:
            yield process
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            assert process.wait(30) == expect, log.read_text()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            self.box.outputs.append(log.read_text())
            print(log.read_text())  # shown if the test fails

    def log(self) -> list[dict[str, Any]]:
        lines = (self.box.folder / f"{self.name}.log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def shown(self, dns_name: str) -> str | None:
        """Return the SHA-256 of the leaf that its proxy shows for a name."""
        ask = "import sys; from certworker.node.probe import probe_tls as p; print(p(int(sys.argv[1]), sys.argv[2]))"
        words = [sys.executable, "-c", ask, str(self.box.https_port), dns_name]
        said = subprocess.run(self.command(*words), cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return said.split("fingerprint='")[1][:64] if "fingerprint='" in said else None

    @contextmanager
    def port_taken(self, port: int) -> Iterator[None]:
        """Let something else listen on a port of this machine."""
        ask = f"import socket; s = socket.create_server(('0.0.0.0', {port})); print('up', flush=True); s.accept()"
        with subprocess.Popen(self.command(sys.executable, "-c", ask), stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            try:
                yield
            finally:
                process.kill()


class Fleet:
    """Some machines, and the control plane's box."""

    def __init__(self, box: Box, node_port: int) -> None:
        self.box = box
        self.node_port = node_port

    @contextmanager
    def control_plane(self, name: str = "run", **settings: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run the service, from when it listens to nodes."""
        with self.box.service(name=name, **settings) as process:
            until(lambda: any(line["event"] == "service.started" for line in self.box.log(name)))
            yield process

    @contextmanager
    def machine(self, name: str, address: str | None = None) -> Iterator[Machine]:
        """Make a machine; it goes with all that runs on it. Its port 80 is reached under `address`, if there is one."""
        if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "nsenter", "unshare"))):
            missing("root, or iproute2 or util-linux,")
        responder = int(self.box.environ["CERTWORKER_RESPONDER_LISTEN"].rpartition(":")[2])
        outwards = {port: self.box.folder / f"{name}-{port}.out" for port in (self.node_port, responder)}
        inwards = self.box.folder / f"{name}.in"
        words = [f"out:{port}:{path}" for port, path in outwards.items()] + [f"in:{self.box.http_port}:{inwards}"]
        with ExitStack() as relays:
            for port, path in outwards.items():
                relays.callback(leave_by(path, port).close)
            command = ["unshare", "-n", "sh", "-c", _HOLD, sys.executable, *words]
            with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, process_group=0) as holder:
                assert holder.stdout is not None
                holder.stdout.readline()
                if address is not None:
                    relays.callback(come_in_by(inwards, address, self.box.http_port).close)
                try:
                    yield Machine(self.box, name, holder.pid)
                finally:
                    os.killpg(holder.pid, signal.SIGKILL)

    def token(self, name: str, *options: str) -> str:
        return str(self.box.json("node", "enroll", name, *options)["token"])

    def nodes(self) -> dict[str, dict[str, Any]]:
        return {one["name"]: one for one in self.box.json("node", "list")["nodes"]}

    def serve(self, version: int, *names: str) -> bool:
        """Say whether all of these have proved that version lately."""
        return all(self._said(name).get("version_number") == version for name in names)

    def await_version(self, version: int, *names: str) -> None:
        until(lambda: self.serve(version, *names), limit=40)

    def await_published(self, number: int) -> None:
        query = "SELECT 1 FROM config_versions WHERE status = 'published' AND number = ?"
        until(lambda: self._rows(query, number))

    def await_served(self, dns_name: str) -> None:
        query = "SELECT 1 FROM lineage_names JOIN lineages ON id = lineage_id WHERE dns_name = ? AND served_at > ''"
        until(lambda: self._rows(query, dns_name))

    def await_error(self, name: str) -> None:
        until(lambda: self._said(name).get("error"), limit=40)

    def _said(self, name: str) -> dict[str, Any]:
        lately = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-6 seconds')"
        found = self._rows(f"SELECT metadata FROM node_status WHERE node_id = ? AND heartbeat_at > {lately}", name)
        return json.loads(found[0][0]) if found else {}

    def _rows(self, query: str, *values: object) -> list[Any]:
        """Ask the database itself: a command for each look would take longer than what is looked at."""
        with closing(sqlite3.connect(self.box.folder / "data" / "certworker.db", timeout=10)) as db:
            return db.execute(query, values).fetchall()
