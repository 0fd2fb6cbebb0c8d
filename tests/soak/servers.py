"""What stands around the workers: a PostgreSQL that crashes, and what brings the CA's looks to live responders."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tests.conftest import PostgresServer, await_postgres, missing, run_postgres


class CrashingPostgres:
    """A PostgreSQL whose crash one can ask for."""

    def __init__(self, server: PostgresServer) -> None:
        self._server = server

    @property
    def server(self) -> PostgresServer:
        """What runs now."""
        return self._server

    def restart(self) -> float:
        """Do what `pg_ctl restart -m immediate` does; return how many seconds nobody could connect."""
        began, command = time.monotonic(), self._server.process.args
        assert isinstance(command, list)
        data = Path(command[command.index("-D") + 1])
        self.crash()
        with (data.parent / "log").open("ab") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=data.parent, process_group=0,
                user=data.stat().st_uid if os.getuid() == 0 else None,
            )  # fmt: skip
        self._server = replace(self._server, process=process)
        await_postgres(self._server, data.parent / "log")
        return time.monotonic() - began

    def crash(self) -> None:
        """End it without a checkpoint and without a word to its clients."""
        self._server.process.send_signal(signal.SIGQUIT)
        self._server.process.wait()


@contextmanager
def run_crashing_postgres() -> Iterator[CrashingPostgres]:
    """Run a PostgreSQL of its own, with room for many workers, that loses nothing of what it has committed."""
    with run_postgres("max_connections=400", "synchronous_commit=on") as server:
        postgres = CrashingPostgres(server)
        try:
            yield postgres
        finally:
            postgres.crash()


_HAPROXY = """
defaults
    mode http
    timeout connect 1s
    timeout client 20s
    timeout server 3s
    retries 6
    # Whoever is dead or frozen has no say: the next one answers any live token as well.
    option redispatch 1
    retry-on all-retryable-errors
frontend http01
    bind 127.0.0.1:{port}
    default_backend responders
backend responders
    balance roundrobin
{servers}
"""


@contextmanager
def run_front(folder: Path, port: int, responders: Sequence[int]) -> Iterator[None]:
    """Run a HAProxy on `port` that asks one of these responders, and another one if that does not answer."""
    binary = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin") or missing("haproxy")
    servers = "\n".join(f"    server w{number} 127.0.0.1:{one}" for number, one in enumerate(responders))
    config = folder / "front.cfg"
    config.write_text(_HAPROXY.format(port=port, servers=servers))
    log = folder / "front.log"
    with log.open("wb") as out:
        process = subprocess.Popen([binary, "-db", "-f", config], stdout=out, stderr=out, process_group=0)
    try:
        _await(port, process, log)
        yield
    finally:
        process.kill()
        process.wait()


def _await(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    give_up_at = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError as error:
            if process.poll() is not None or time.monotonic() > give_up_at:
                raise RuntimeError(f"cannot start HAProxy: {log.read_text()}") from error
            time.sleep(0.02)
        else:
            return
