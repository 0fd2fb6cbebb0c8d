"""The small parts of a node: its folder, its probe, its sockets, its patience."""

import random
import socket
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from certworker.errors import CommandRefused, InputError, NodeError
from certworker.node.apply import preflight
from certworker.node.folder import Folder, write_file
from certworker.node.haproxy import Haproxy, HaproxySetup
from certworker.node.patience import Patience
from certworker.node.probe import ROUNDS, SAMPLE, Expectation, Seen, probe_tls, prove
from certworker.node.runtime import RuntimeSocket

from .conftest import PATIENCE, Ports, uuid


@pytest.fixture
def folder() -> Iterator[Folder]:
    with TemporaryDirectory(prefix="certworker-node-") as name:
        yield Folder(Path(name) / "node")


def fast() -> Patience:
    """A patience whose time passes by looking at it."""
    ticks = iter(range(1_000_000))
    return Patience(lambda: next(ticks) / 10, lambda _: None)


def test_a_file_replaces_the_old_one_whole(folder: Folder) -> None:
    """A half-written one that a crash left does not matter, nor does a symlink in its place."""
    path = folder.path / "x"
    (folder.path / ".x.tmp").symlink_to("/dev/null")
    write_file(path, b"one")
    write_file(path, b"two")

    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in folder.path.glob(".*")] == []


def test_certificates_are_named_by_their_content(folder: Folder) -> None:
    """The same content is one file, another content is another file."""
    assert folder.write_certificate(b"one") == folder.write_certificate(b"one") != folder.write_certificate(b"two")


def test_collecting_keeps_what_is_named(folder: Folder) -> None:
    """Files and folders alike."""
    kept = Path(folder.write_certificate(b"one")).name
    folder.write_certificate(b"two")
    (folder.versions / "1.tmp").mkdir()
    folder.collect({folder.certs: {kept}, folder.versions: set()})

    assert [path.name for path in (*folder.certs.iterdir(), *folder.versions.iterdir())] == [kept]


def test_folders_that_cannot_work_are_refused() -> None:
    """Before anything is written."""
    with pytest.raises(NodeError, match="too long"):
        Folder(Path("/tmp") / ("x" * 100))
    with pytest.raises(InputError, match="folder"):
        Folder(Path("/tmp/a b"))


def test_the_preflight_names_the_port(ports: Ports) -> None:
    """On either address family, also when somebody listens on one address only."""
    port = ports.take()
    preflight([port])
    for host, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)):
        with (
            closing(socket.create_server((host, port), family=family)),
            pytest.raises(NodeError, match=f"port {port}: another process"),
        ):
            preflight([port])


def test_a_probe_never_waits_for_long(ports: Ports) -> None:
    """A server that says nothing, and one that is not there."""
    port = ports.take()
    with closing(socket.create_server(("127.0.0.1", port))):
        assert "timed out" in (probe_tls(port, "a.test", timedelta(milliseconds=50)).fault or "")
    assert "refused" in (probe_tls(port, "a.test").fault or "")


def test_a_proof_needs_several_good_rounds() -> None:
    """One wrong answer among good ones is a fault: a worker that is about to leave may have given it."""
    answers = iter([Seen("new"), Seen("new"), Seen("old")])
    expected = [Expectation(uuid(1), 443, "a.test", "new")]

    faults = prove(expected, lambda *_: next(answers), fast(), random.Random(1))
    assert faults == {uuid(1): "port 443 shows leaf old for a.test"}


def test_a_proof_waits_for_what_settles() -> None:
    """Wrong at first and right from then on is right."""
    answers = iter([Seen("old"), Seen(fault="reset")])
    expected = [Expectation(uuid(1), 443, "a.test", "new")]

    assert prove(expected, lambda *_: next(answers, Seen("new")), fast(), random.Random(1)) == {}


def test_many_are_asked_once_and_a_sample_again() -> None:
    """The first round asks all, the others a sample."""
    asked: list[str] = []
    expected = [Expectation(uuid(number), 443, f"{number}.test", "new") for number in range(100)]

    def probe(port: int, name: str) -> Seen:
        asked.append(name)
        return Seen("new")

    assert prove(expected, probe, fast(), random.Random(1)) == {}
    assert len(asked) == 100 + (ROUNDS - 1) * SAMPLE


@pytest.mark.parametrize("command", ["show info\nquit", "show info; quit", "", "é", "x\x00", "show\tinfo"])
def test_a_command_is_one_command(command: str) -> None:
    """Nothing is sent otherwise."""
    with pytest.raises(CommandRefused, match="not one line"):
        RuntimeSocket(Path("/nowhere")).ask(command)


@pytest.mark.parametrize("payload", ["a\n\nquit", "a\n \nquit", "a\n\r\nquit"])
def test_a_payload_has_no_blank_line(payload: str) -> None:
    """It would end there, and the rest would be commands."""
    with pytest.raises(CommandRefused, match="blank line"):
        RuntimeSocket(Path("/nowhere")).ask("set ssl cert x", payload)


def test_a_missing_socket_is_named() -> None:
    with pytest.raises(CommandRefused, match="/nowhere"):
        RuntimeSocket(Path("/nowhere")).ask("show info")


@pytest.mark.parametrize("binary", ["/nowhere/haproxy", "/bin/true"])
def test_a_binary_that_is_no_haproxy_is_named(folder: Folder, binary: str) -> None:
    """The message says which setting to change."""
    with pytest.raises(NodeError, match=f"{binary}.*HAPROXY_BIN"):
        Haproxy(folder, HaproxySetup(Path(binary)), PATIENCE).describe()


def test_patience_ends() -> None:
    """The last answer is returned when time is over."""
    assert fast().until(lambda: 0, timedelta(seconds=5)) == 0
