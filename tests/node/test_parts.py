"""The small parts of a node: its folder, its probe, its sockets, its patience."""

import random
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from certworker.errors import CommandRefused, InputError, NodeError, PairRefused
from certworker.node.apply import preflight
from certworker.node.folder import Folder, write_file
from certworker.node.haproxy import Haproxy, HaproxySetup
from certworker.node.lookup import Lookup, resolve
from certworker.node.nginx import Nginx, NginxSetup
from certworker.node.pairs import render_pair
from certworker.node.patience import Patience
from certworker.node.probe import (
    ROUNDS,
    SAMPLE,
    Expectation,
    ExpectedAnswer,
    Seen,
    ask_challenge,
    probe_tls,
    prove,
    prove_answers,
)
from certworker.node.runtime import RuntimeSocket

from .conftest import LIMIT, PATIENCE, Authority, Ports, await_true, uuid


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


@pytest.mark.parametrize("binary", ["/nowhere/proxy", "/bin/true"])
def test_a_binary_that_is_no_proxy_is_named(folder: Folder, binary: str) -> None:
    """The message says which setting to change."""
    with pytest.raises(NodeError, match=f"{binary}.*HAPROXY_BIN"):
        Haproxy(folder, HaproxySetup(Path(binary)), PATIENCE).describe()
    with pytest.raises(NodeError, match=f"{binary}.*NGINX_BIN"):
        Nginx(folder, NginxSetup(Path(binary)), PATIENCE).describe()


def told_version(folder: Folder, said: str) -> Nginx:
    """Return an nginx whose binary says this of itself."""
    binary = folder.path / "nginx"
    binary.write_text(f"#!/bin/sh\necho '{said}' >&2\n")
    binary.chmod(0o700)
    return Nginx(folder, NginxSetup(binary), PATIENCE)


def test_an_nginx_says_how_it_was_built(folder: Folder) -> None:
    """Its version, and where the stream module is if it has to be loaded; an old one is refused."""
    built = "nginx version: nginx/1.30.6\nconfigure arguments: --modules-path=/m --with-stream=dynamic --with-x"
    dynamic = told_version(folder, built)
    assert dynamic.describe() == "nginx 1.30.6"
    assert dynamic._find_build().stream_module == "/m/ngx_stream_module.so"
    assert told_version(folder, built.replace("=dynamic", ""))._find_build().stream_module is None
    with pytest.raises(NodeError, match=r"nginx 1\.18\.0 is too old"):
        told_version(folder, "nginx version: openresty/1.18.0").describe()


def test_a_name_is_looked_up_in_the_background() -> None:
    """One that hangs is waited for once and not for long; what was found stays when DNS falls silent."""
    asked, hanging = [], threading.Event()

    def resolve(host: str) -> tuple[str, ...]:
        asked.append(host)
        if host == "hangs.test":
            hanging.wait(LIMIT.total_seconds())
        if asked.count(host) > 1:
            raise OSError("DNS is away")
        return ("192.0.2.1",)

    lookup = Lookup(PATIENCE, resolve, timedelta())
    found = lookup.addresses(["a.test", "hangs.test"], timedelta(milliseconds=50))
    assert found == {"a.test": ("192.0.2.1",), "hangs.test": ()}
    assert lookup.addresses(["a.test"]) == {"a.test": ("192.0.2.1",)}
    await_true(lambda: lookup.addresses(["a.test"]) and asked.count("a.test") > 2, "it is looked up again")
    assert lookup.addresses(["a.test"]) == {"a.test": ("192.0.2.1",)}
    assert asked.count("hangs.test") == 1
    hanging.set()


def test_a_name_that_was_never_found_has_no_address() -> None:
    """Nor is that an error, whatever the resolver says."""

    def resolve(host: str) -> tuple[str, ...]:
        raise UnicodeError("label too long")

    assert Lookup(PATIENCE, resolve).addresses(["a.test"]) == {"a.test": ()}


def test_the_machines_own_resolver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """`/etc/hosts` included; addresses that no target may have are left out."""
    assert "127.0.0.1" in resolve("localhost")
    found = ["192.0.2.1", "169.254.169.254", "0.0.0.0", "fe80::1%eth0", "224.0.0.1", "2001:db8::1"]
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in found]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
    assert resolve("evil.test") == ("192.0.2.1", "2001:db8::1")


@pytest.mark.proxy
def test_what_openssl_refuses_never_reaches_nginx(folder: Folder, nginx_binary: Path, authority: Authority) -> None:
    """nginx itself would find out in a handshake, when the certificate before it is gone."""
    proxy = Nginx(folder, NginxSetup(nginx_binary), PATIENCE)
    weak = authority.issue(1, "a.test", key=rsa.generate_private_key(65537, 1024))
    with pytest.raises(PairRefused, match="too weak"):
        proxy.check_pair(folder.write_certificate(render_pair(weak)))
    proxy.check_pair(folder.write_certificate(render_pair(authority.issue(1, "a.test"))))


class OneAnswer(BaseHTTPRequestHandler):
    """Answers everything with one text."""

    def do_GET(self) -> None:
        body = self.server.body  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def test_a_wrong_answer_to_a_challenge_is_a_fault(ports: Ports) -> None:
    """Of many names a sample is asked, and all once one of it is wrong; what was said is quoted, cut and printable."""
    port, chance = ports.take(), random.Random(1)
    expected = [ExpectedAnswer(port, f"{number}.test", "x" * 43) for number in range(30)]
    assert "refused" in ask_challenge(port, "a.test", "token")
    with HTTPServer(("127.0.0.1", port), OneAnswer) as server:
        server.body = b"evil\n\xff" + b"z" * 5000  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        faults = prove_answers(expected, fast(), chance, timedelta())
        server.shutdown()
        thread.join()

    assert set(faults) == {f"{number}.test" for number in range(30)}
    assert all("evil\\n" in fault and fault.isprintable() and len(fault) < 300 for fault in faults.values())


def test_patience_ends() -> None:
    """The last answer is returned when time is over."""
    assert fast().until(lambda: 0, timedelta(seconds=5)) == 0
