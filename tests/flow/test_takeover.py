"""The service dies: its proxy serves on, and whoever comes next goes on where it was."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from certworker.cli.pebble import Pebble

from .box import Box, until

pytestmark = [pytest.mark.pebble, pytest.mark.proxy]


def masters(box: Box) -> list[int]:
    """Return the HAProxy masters of this box: their configuration is in its folder, their parent's is not."""
    mine = f"{box.folder}/data/node/current".encode()
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mine in (entry / "cmdline").read_bytes():
                    parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    return [pid for pid, parent in parents.items() if parent not in parents]


def test_the_proxy_survives_a_kill_and_is_adopted(folder: Path, start_pebble: Callable[..., Pebble]) -> None:
    """kill -9 of the service: the handshake works on; the next start adopts the same proxy, orders nothing anew."""
    ca = start_pebble()
    box = Box.make(folder, ca)
    box.configure("kept.flow.test")
    with box.upstream():
        with box.service(name="killed") as process:
            until(lambda: box.served("kept.flow.test"))
            before = box.get("kept.flow.test", ca.root_pem())
            process.kill()
            process.wait()
            assert box.get("kept.flow.test", ca.root_pem()) == before
            (master,) = masters(box)
        with box.service():
            until(lambda: any(line["event"] == "service.started" for line in box.log()))
            assert masters(box) == [master]
            assert box.get("kept.flow.test", ca.root_pem()) == before

    assert masters(box) == []
    assert len(ca.ledger()) == 1


def freeze_between_writes(box: Box, process: subprocess.Popen[bytes]) -> None:
    """SIGSTOP while it holds no lock on its SQLite file, which would keep every other program out as well."""

    def frozen() -> bool:
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        with closing(sqlite3.connect(f"{box.folder}/data/certworker.db", timeout=0)) as session:
            try:
                session.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                os.kill(process.pid, signal.SIGCONT)
                return False
            return True

    until(frozen)


def test_renew_takes_the_place_of_a_service_that_dies(folder: Path, start_pebble: Callable[..., Pebble]) -> None:
    """It waits while the role is held, and does the work itself when the holder is gone; the proxy stays as found."""
    ca = start_pebble()
    box = Box.make(folder, ca)
    box.configure("heir.flow.test")
    with box.upstream(), box.service(name="killed") as process:
        until(lambda: box.served("heir.flow.test"))
        freeze_between_writes(box, process)
        renewing = subprocess.Popen(
            [sys.executable, "-m", "certworker", "renew", "heir.flow.test", "--force", "--timeout", "60"],
            env=box.environ, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        until(lambda: box.lineage("heir.flow.test")["issuance"] == "queued")
        assert renewing.poll() is None
        process.kill()
        process.wait()
        out, err = renewing.communicate(timeout=60)
        assert renewing.returncode == 0, err.decode()
        assert b"renewed heir.flow.test" in out
        (master,) = masters(box)
        status, body, _ = box.get("heir.flow.test", ca.root_pem())
        assert (status, body) == (200, b"hello from upstream")
        os.kill(master, signal.SIGTERM)
        until(lambda: masters(box) == [])

    assert len(ca.ledger()) == 2


def test_interrupting_a_renewal_keeps_what_was_asked(folder: Path, start_pebble: Callable[..., Pebble]) -> None:
    """Ctrl-C: exit code 130, nothing left running, the issuance goes on at the next command with the same order."""
    ca = start_pebble(va_sleep=5)
    box = Box.make(folder, ca)
    box.configure("cut.flow.test")
    renewing = subprocess.Popen(
        [sys.executable, "-m", "certworker", "renew"], env=box.environ, cwd=folder,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0,
    )  # fmt: skip
    until(lambda: [one["issuance"] for one in box.status()["lineages"]] == ["validating"])
    renewing.send_signal(signal.SIGINT)
    assert renewing.wait(60) == 130
    assert masters(box) == []

    box.run("renew")
    assert len(ca.ledger()) == 1
