"""A node end to end: a real proxy is started, filled, renewed, refused, adopted."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from certworker.errors import FolderHeld, ReloadRefused
from certworker.node.probe import Seen, probe_tls
from certworker.render.files import RenderedFile, RenderedFiles

from .conftest import (
    Authority,
    Gateway,
    KeptLoad,
    Load,
    Node,
    Ports,
    Upstream,
    ask,
    ask_tls,
    await_true,
    uuid,
)

pytestmark = pytest.mark.proxy


@pytest.fixture
def https_node(node: Node, gateway: Gateway, ports: Ports) -> tuple[Node, int]:
    """A node that serves one https listener and has no certificate yet."""
    port = ports.take()
    gateway.listener(port, "https")
    node.source.publish(gateway.snapshot())
    assert node.step().error is None
    return node, port


def test_a_node_boots_without_certificates(https_node: tuple[Node, int]) -> None:
    """An https listener starts empty and refuses every name with the alert for it."""
    node, port = https_node

    assert probe_tls(port, "a.test") == Seen(fault="TLSV1_UNRECOGNIZED_NAME")
    assert node.source.heartbeats[-1].version_number == 1


def test_a_certificate_is_added_without_a_reload(https_node: tuple[Node, int], authority: Authority) -> None:
    """A new certificate answers its names, exact and wildcard, from the same worker process."""
    node, port = https_node
    workers = node.workers()
    certificate = authority.issue(1, "a.test", "*.b.test")
    node.source.put(certificate)

    heartbeat = node.step()

    assert heartbeat.fingerprints == {certificate.id: certificate.fingerprint}
    assert (heartbeat.error, heartbeat.unserved, heartbeat.cursor.revision) == (None, {}, 1)
    assert {probe_tls(port, name).fingerprint for name in ("a.test", "x.b.test")} == {certificate.fingerprint}
    assert {probe_tls(port, name).fault for name in ("c.test", "b.test", "x.y.b.test")} == {"TLSV1_UNRECOGNIZED_NAME"}
    node.assert_kept(workers)


def test_a_renewal_fails_no_client(https_node: tuple[Node, int], authority: Authority) -> None:
    """Clients that connect all the time see the old leaf or the new one, never an error."""
    node, port = https_node
    node.source.put(authority.issue(1, "a.test"))
    node.step()
    workers = node.workers()
    seen: list[Seen] = []
    over = threading.Event()

    def client() -> None:
        while not over.is_set():
            seen.append(probe_tls(port, "a.test"))

    thread = threading.Thread(target=client)
    thread.start()
    renewals = [authority.issue(1, "a.test") for _ in range(10)]
    for renewal in renewals:
        node.source.put(renewal)
        assert node.step().unserved == {}
    over.set()
    thread.join()

    assert [one.fault for one in seen if one.fault] == []
    assert probe_tls(port, "a.test").fingerprint == renewals[-1].fingerprint
    node.assert_kept(workers)


def test_a_removed_certificate_is_gone(https_node: tuple[Node, int], authority: Authority) -> None:
    """After a removal neither the proxy nor the disk has the key."""
    node, port = https_node
    certificate = authority.issue(1, "a.test")
    node.source.put(certificate)
    node.step()
    workers = node.workers()
    node.source.remove(certificate.id)

    assert node.step().unserved == {}
    assert probe_tls(port, "a.test").fault == "TLSV1_UNRECOGNIZED_NAME"
    assert list(node.folder.certs.iterdir()) == []
    node.assert_kept(workers)


def test_a_policys_listener_serves_its_certificates_only(
    node: Node, gateway: Gateway, ports: Ports, authority: Authority
) -> None:
    """A listener with a policy refuses the names of the others."""
    common, own = ports.take(), ports.take()
    gateway.listener(common, "https")
    gateway.listener(own, "https", policy=901)
    node.source.publish(gateway.snapshot())
    node.source.put(authority.issue(1, "a.test", policies=(901,)))
    node.source.put(authority.issue(2, "b.test", policies=(902,)))

    assert node.step().error is None
    assert [probe_tls(port, "b.test").fault for port in (common, own)] == [None, "TLSV1_UNRECOGNIZED_NAME"]
    assert [probe_tls(port, "a.test").fault for port in (common, own)] == [None, None]


def test_names_move_between_certificates(https_node: tuple[Node, int], authority: Authority) -> None:
    """When a later certificate takes a name over, the older one keeps its others."""
    node, port = https_node
    older, later = authority.issue(1, "a.test", "b.test"), authority.issue(2, "b.test")
    node.source.put(older)
    node.step()
    node.source.put(later)

    heartbeat = node.step()

    assert (heartbeat.error, heartbeat.unserved) == (None, {})
    assert probe_tls(port, "a.test").fingerprint == older.fingerprint
    assert probe_tls(port, "b.test").fingerprint == later.fingerprint


def test_a_refused_pair_leaves_the_one_before(https_node: tuple[Node, int], authority: Authority) -> None:
    """A key that is not the leaf's is reported and never reaches the proxy; the neighbours are served."""
    node, port = https_node
    good, other = authority.issue(1, "a.test"), authority.issue(2, "b.test")
    node.source.put(good)
    node.step()
    node.source.put(replace(authority.issue(1, "a.test"), key_pem=other.key_pem))
    node.source.put(other)

    heartbeat = node.step()

    assert list(heartbeat.unserved) == [good.id]
    assert "the key is not the leaf's" in heartbeat.unserved[good.id]
    assert probe_tls(port, "a.test").fingerprint == good.fingerprint
    assert probe_tls(port, "b.test").fingerprint == other.fingerprint
    assert list(node.step().unserved) == [good.id]


def test_a_taken_port_is_refused_and_rolled_back(node: Node, gateway: Gateway, ports: Ports) -> None:
    """The message names the port, the old version serves on, and the new one is not tried again."""
    first, taken = ports.take(), ports.take()
    gateway.listener(first)
    node.source.publish(gateway.snapshot())
    node.step()
    workers = node.workers()
    with closing(socket.create_server(("127.0.0.1", taken))):
        gateway.listener(taken)
        node.source.publish(gateway.snapshot())
        heartbeat = node.step()
    again = node.step()

    assert heartbeat.error is not None
    assert f"port {taken}" in heartbeat.error
    assert (heartbeat.version_number, again.version_number, again.error) == (1, 1, heartbeat.error)
    assert ask(first)[0] == 404
    node.assert_kept(workers)
    node.source.publish(gateway.snapshot())
    assert node.step().version_number == 3


def test_a_version_that_the_check_refuses_changes_nothing(node: Node, gateway: Gateway, ports: Ports) -> None:
    """What the proxy itself cannot read is not applied: the old one serves on, and the message quotes the proxy."""
    gateway.listener(first := ports.take())
    node.source.publish(gateway.snapshot())
    node.step()
    workers = node.workers()
    gateway.listener(ports.take())
    node.source.publish(gateway.snapshot())
    node.spoil = lambda rendered: RenderedFiles(
        {path: RenderedFile(file.content + b"what_is_this\n") for path, file in rendered.files.items()}
    )

    heartbeat = node.step()

    assert heartbeat.error is not None
    assert f"{node.kind} refuses 2-" in heartbeat.error
    assert "what_is_this" in heartbeat.error or "unexpected end of file" in heartbeat.error
    assert heartbeat.version_number == 1
    assert ask(first)[0] == 404
    assert node.workers() == workers


def test_a_version_that_the_reload_refuses_is_rolled_back(node: Node, gateway: Gateway, ports: Ports) -> None:
    """A reload that fails after the check leaves the old version served, and the next one possible."""
    first, taken = ports.take(), ports.take()
    gateway.listener(first)
    node.source.publish(gateway.snapshot())
    node.step()
    gateway.listener(taken)
    node.source.publish(gateway.snapshot())
    with ExitStack() as rival:
        # The port is taken between our look at it and the reload.
        take = iter([lambda: rival.enter_context(socket.create_server(("127.0.0.1", taken)))])
        node.before_reload = lambda: next(take, lambda: None)()
        heartbeat = node.step()

    assert heartbeat.error is not None
    assert "version 2 is not served" in heartbeat.error
    assert "version 1 is served" in heartbeat.error
    assert heartbeat.version_number == 1
    assert ask(first)[0] == 404
    node.source.publish(gateway.snapshot())
    assert node.step().version_number == 3
    assert ask(taken)[0] == 404


def test_a_version_that_fails_its_probe_is_rolled_back(
    https_node: tuple[Node, int], gateway: Gateway, ports: Ports, authority: Authority
) -> None:
    """A version under which a served certificate is shown no more does not stay."""
    node, port = https_node
    node.source.put(authority.issue(1, "a.test"))
    node.step()
    gateway.listener(added := ports.take(), "https")
    node.source.publish(gateway.snapshot())
    node.probe = lambda asked, name: Seen(fault="dark") if asked == added else probe_tls(asked, name)

    heartbeat = node.step()

    assert heartbeat.error is not None
    assert f"port {added} shows dark for a.test" in heartbeat.error
    assert heartbeat.version_number == 1
    assert probe_tls(port, "a.test").fault is None


def test_a_failed_hot_swap_becomes_a_reload(https_node: tuple[Node, int], authority: Authority) -> None:
    """When the running proxy does not know what we think it knows, it is told everything anew."""
    node, port = https_node
    node.source.put(authority.issue(1, "a.test"))
    node.step()
    node.proxy.forget_certificates()
    renewal = authority.issue(1, "a.test")
    node.source.put(renewal)

    heartbeat = node.step()

    assert (heartbeat.error, heartbeat.unserved) == (None, {})
    assert probe_tls(port, "a.test").fingerprint == renewal.fingerprint


_KILLED = """
import os, random, signal, sys
from pathlib import Path
from tests.node.conftest import PATIENCE, MemorySource
from certworker.core.snapshot import read_snapshot
from certworker.node.agent import Agent
from certworker.node.folder import Folder
from certworker.node.haproxy import Haproxy, HaproxySetup
from certworker.node.nginx import Nginx, NginxSetup
import json
folder, source, binary = Folder(Path(sys.argv[1])), MemorySource(), Path(sys.argv[3])
source.publish(read_snapshot(json.load(sys.stdin)))
if sys.argv[2] == "haproxy":
    proxy = Haproxy(folder, HaproxySetup(binary), PATIENCE)
else:
    proxy = Nginx(folder, NginxSetup(binary), PATIENCE)
agent = Agent("node-1", source, folder, proxy, PATIENCE, random.Random(1))
assert agent.step().error is None
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_agents_proxy_is_adopted(node: Node, gateway: Gateway, ports: Ports) -> None:
    """After kill -9 of the agent, the next one finds the proxy, keeps it, and goes on."""
    port = ports.take()
    gateway.listener(port)
    version = node.source.publish(gateway.snapshot())
    node.agent.close()
    subprocess.run(
        [sys.executable, "-c", _KILLED, str(node.path), node.kind, str(node.binary)],
        input=version.snapshot.canonical(),
        check=False,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert ask(port)[0] == 404
    node.start_agent()
    workers = node.workers()

    heartbeat = node.step()

    assert (heartbeat.version_number, heartbeat.error) == (1, None)
    node.assert_kept(workers)


def test_a_new_agent_goes_on_where_the_last_one_was(https_node: tuple[Node, int], authority: Authority) -> None:
    """State, certificates and cursor survive; nothing is reloaded for it."""
    node, port = https_node
    certificate = authority.issue(1, "a.test")
    node.source.put(certificate)
    node.step()
    workers = node.workers()
    node.agent.close()
    node.start_agent()

    heartbeat = node.step()

    assert (heartbeat.error, heartbeat.cursor.revision, heartbeat.fingerprints) == (None, 1, {})
    assert probe_tls(port, "a.test").fingerprint == certificate.fingerprint
    node.assert_kept(workers)


def test_a_stopped_proxy_is_started_again(https_node: tuple[Node, int], authority: Authority) -> None:
    """A proxy that died comes back with the version and the certificates it had."""
    node, port = https_node
    certificate = authority.issue(1, "a.test")
    node.source.put(certificate)
    node.step()
    node.agent.stop()
    assert not node.proxy.running()

    assert node.step().version_number == 1
    assert probe_tls(port, "a.test").fingerprint == certificate.fingerprint


def test_a_foreign_change_is_noticed_at_the_start(https_node: tuple[Node, int], authority: Authority) -> None:
    """A new agent compares the running crt-lists with its files, and reloads when they differ."""
    node, port = https_node
    certificate = authority.issue(1, "a.test")
    node.source.put(certificate)
    node.step()
    node.proxy.forget_certificates()
    assert probe_tls(port, "a.test").fault is not None
    node.agent.close()
    node.start_agent()
    node.step()

    await_true(lambda: probe_tls(port, "a.test").fingerprint == certificate.fingerprint, "the leaf is shown")


def test_a_reload_that_is_refused_once_is_told_again(https_node: tuple[Node, int]) -> None:
    """A release that renders otherwise: until the proxy has read its files, each step tries."""
    node, _ = https_node
    node.step()
    node.agent.close()
    node.spoil = lambda rendered: RenderedFiles(
        {name: RenderedFile(one.content + b"# another release\n") for name, one in rendered.files.items()}
    )
    told: list[str] = []

    def refuse_once() -> None:
        told.append("reload")
        if len(told) == 1:
            raise ReloadRefused("not now")

    node.before_reload = refuse_once
    node.start_agent()

    assert "not now" in (node.step().error or "")
    assert node.step().error is None
    assert node.step().error is None
    assert told == ["reload", "reload"]


def test_a_lost_file_is_asked_for_again(https_node: tuple[Node, int], authority: Authority) -> None:
    """An agent that misses a certificate's file starts from nothing."""
    node, port = https_node
    certificate = authority.issue(1, "a.test")
    node.source.put(certificate)
    node.step()
    node.agent.stop()
    node.agent.close()
    next(node.folder.certs.iterdir()).unlink()
    node.start_agent()

    assert node.step().fingerprints == {certificate.id: certificate.fingerprint}
    assert probe_tls(port, "a.test").fingerprint == certificate.fingerprint


def test_a_lost_memory_costs_no_outage(https_node: tuple[Node, int], authority: Authority) -> None:
    """An agent that finds a proxy but no state takes it over with a reload, as its ports are its own."""
    node, port = https_node
    certificate = authority.issue(1, "a.test")
    node.source.put(certificate)
    node.step()
    master = node.proxy._process.find()
    node.agent.close()
    node.folder.state_path.write_text("{")
    node.start_agent()

    heartbeat = node.step()

    assert (heartbeat.error, heartbeat.version_number, heartbeat.unserved) == (None, 1, {})
    assert node.proxy._process.find() == master
    assert probe_tls(port, "a.test").fingerprint == certificate.fingerprint


def test_a_restored_control_plane_is_followed(https_node: tuple[Node, int], authority: Authority) -> None:
    """A new epoch brings everything, and what it does not name goes."""
    node, port = https_node
    for number in (1, 2):
        node.source.put(authority.issue(number, f"{number}.test"))
    node.step()
    del node.source.certificates[uuid(2)]
    node.source.epoch += 1

    assert node.step().cursor.epoch == 2
    assert probe_tls(port, "1.test").fault is None
    assert probe_tls(port, "2.test").fault == "TLSV1_UNRECOGNIZED_NAME"


def test_one_agent_per_folder(node: Node) -> None:
    """A second agent on the same folder is told so."""
    with pytest.raises(FolderHeld, match="another agent"):
        node.start_agent()


@pytest.mark.parametrize("kind", ["haproxy"])  # it waits for long, and the same code for both
def test_an_expected_name_is_proved_before_it_counts(https_node: tuple[Node, int], authority: Authority) -> None:
    """What no handshake shows is named in the heartbeat, and looked at again in the next step."""
    node, _ = https_node
    certificate = authority.issue(1, "a.test")
    node.source.put(certificate)
    node.probe = lambda *_: Seen(fault="dark")

    assert "dark" in node.step().unserved[certificate.id]
    node.probe = probe_tls
    assert node.step().fingerprints == {certificate.id: certificate.fingerprint}


def test_a_killed_proxy_is_started_again(https_node: tuple[Node, int]) -> None:
    """kill -9 of the master takes its workers along, or leaves them with the ports; the next step starts it anew."""
    node, port = https_node
    master, workers = node.proxy._process.find(), node.workers()
    assert master is not None
    os.kill(master, signal.SIGKILL)
    await_true(lambda: not node.proxy.running(), "the master is gone")

    heartbeat = node.step()

    assert (heartbeat.version_number, heartbeat.error) == (1, None)
    assert not node.workers() & workers
    await_true(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "the old workers are gone")
    assert probe_tls(port, "a.test").fault == "TLSV1_UNRECOGNIZED_NAME"


def test_one_weak_key_does_not_keep_a_node_from_starting(
    node: Node, gateway: Gateway, ports: Ports, authority: Authority
) -> None:
    """What only the proxy itself refuses is left out and named; its neighbours are served."""
    gateway.listener(port := ports.take(), "https")
    weak = authority.issue(1, "weak.test", key=rsa.generate_private_key(65537, 1024))
    good = authority.issue(2, "good.test")
    node.source.put(weak)
    node.source.put(good)
    node.source.publish(gateway.snapshot())

    heartbeat = node.step()

    assert (heartbeat.version_number, heartbeat.error, list(heartbeat.unserved)) == (1, None, [weak.id])
    assert "too weak?" in heartbeat.unserved[weak.id]
    assert probe_tls(port, "good.test").fingerprint == good.fingerprint
    node.source.put(authority.issue(3, "later.test", key=rsa.generate_private_key(65537, 1024)))
    node.source.put(renewal := authority.issue(2, "good.test"))
    assert list(node.step().unserved) == [weak.id, uuid(3)]
    assert probe_tls(port, "good.test").fingerprint == renewal.fingerprint


def test_certificates_wait_for_their_listener(node: Node, gateway: Gateway, ports: Ports, authority: Authority) -> None:
    """What no listener shows is unserved; the version that brings the listener proves it."""
    gateway.listener(ports.take())
    node.source.publish(gateway.snapshot())
    certificate = authority.issue(1, "a.test")
    node.source.put(certificate)

    assert "no https listener" in node.step().unserved[certificate.id]
    gateway.listener(ports.take(), "https")
    node.source.publish(gateway.snapshot())
    heartbeat = node.step()
    assert (heartbeat.unserved, heartbeat.fingerprints) == ({}, {certificate.id: certificate.fingerprint})


def test_who_is_outlived_for_all_names_lacks_nothing(https_node: tuple[Node, int], authority: Authority) -> None:
    """Another certificate answers each of its names; one name that nobody answers is a fault."""
    node, port = https_node
    node.source.put(authority.issue(2, "a.test", "b.test"))
    node.source.put(both := authority.issue(3, "a.test", "b.test"))
    assert node.step().unserved == {}
    assert probe_tls(port, "a.test").fingerprint == both.fingerprint


def test_more_faults_than_a_heartbeat_names_are_counted(
    node: Node, gateway: Gateway, ports: Ports, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody may take what is not named for proved."""
    monkeypatch.setattr("certworker.node.agent.MOST_TOLD", 1)
    gateway.listener(ports.take())
    node.source.publish(gateway.snapshot())
    for number in (1, 2, 3):
        node.source.put(authority.issue(number, f"n{number}.test"))

    heartbeat = node.step()
    assert (list(heartbeat.unserved), heartbeat.untold) == ([uuid(1)], 2)


def test_an_unreachable_source_leaves_the_proxy_alone(https_node: tuple[Node, int]) -> None:
    """The proxy is looked after first; then the source's own exception goes through."""
    node, port = https_node
    node.agent.stop()
    node.source.revision = -1
    node.source.removed = None  # type: ignore[assignment]
    with pytest.raises(AttributeError):
        node.step()

    assert probe_tls(port, "a.test").fault == "TLSV1_UNRECOGNIZED_NAME"


def test_ipv6_clients_are_served(node: Node, gateway: Gateway, ports: Ports) -> None:
    """Every port is open on IPv4 and IPv6."""
    gateway.listener(port := ports.take())
    node.source.publish(gateway.snapshot())
    node.step()

    with socket.create_connection(("::1", port), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 404"


def test_keys_are_private(https_node: tuple[Node, int], authority: Authority) -> None:
    """Only the owner may read keys, folders and sockets, and no repr shows a key."""
    node, _ = https_node
    certificate = authority.issue(1, "a.test")
    node.source.put(certificate)
    node.step()
    paths = [path for path in (node.path, *node.path.rglob("*")) if not path.is_symlink()]
    # nginx opens these to everybody. They tell the version's number, and nobody gets into the folder.
    harmless = {"version.sock", "nginx.pid"} if node.kind == "nginx" else set()

    assert {path.name for path in paths if path.lstat().st_mode & 0o077} == harmless
    assert certificate.key_pem not in repr(certificate)
    assert certificate.key_pem.encode() not in node.folder.state_path.read_bytes()


def test_the_https_listener_speaks_http2(https_node: tuple[Node, int], authority: Authority) -> None:
    """ALPN offers h2 first."""
    node, port = https_node
    node.source.put(authority.issue(1, "a.test"))
    node.step()
    context = ssl._create_unverified_context()
    context.check_hostname = False
    context.set_alpn_protocols(["h2", "http/1.1"])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="a.test") as secure,
    ):
        assert secure.selected_alpn_protocol() == "h2"


def test_publishes_and_renewals_fail_no_request(
    node: Node, gateway: Gateway, ports: Ports, authority: Authority, upstream: Callable[..., Upstream]
) -> None:
    """While versions and certificates change, clients that come all the time, or stay, get their answers."""
    http, https, target = ports.take(), ports.take(), upstream("up").port
    for port, protocol in ((http, "http"), (https, "https")):
        gateway.route(gateway.listener(port, protocol), gateway.pool(target))
    node.source.publish(gateway.snapshot())
    node.source.put(authority.issue(1, "a.test"))
    assert node.step().error is None
    kept = [KeptLoad(http), KeptLoad(https, True)]
    over, loads = threading.Event(), [Load(http), Load(https, True), *kept]
    clients = [threading.Thread(target=load.run, args=(over,)) for load in loads]
    for client in clients:
        client.start()
    for number in range(6):
        gateway.route(gateway.listeners[0].id, gateway.pools[0].id, path={"exact": f"/{number}"})
        node.source.publish(gateway.snapshot())
        node.source.put(authority.issue(1, "a.test"))
        heartbeat = node.step()
        assert (heartbeat.error, heartbeat.unserved) == (None, {})
    over.set()
    for client in clients:
        client.join()

    assert [fault for load in loads for fault in load.faults] == []
    assert all(load.answers > 10 for load in loads)
    assert not node.keeps_clients or [load.again for load in kept] == [0, 0]


@pytest.mark.parametrize("kind", ["nginx"])
def test_a_host_that_was_not_shaken_hands_for_is_misdirected(
    node: Node, gateway: Gateway, ports: Ports, authority: Authority, upstream: Callable[..., Upstream]
) -> None:
    """nginx answers 421 for a host without a certificate, and never from another server of this machine."""
    gateway.route(gateway.listener(port := ports.take(), "https"), gateway.pool(upstream("up").port))
    node.source.publish(gateway.snapshot())
    node.source.put(authority.issue(1, "a.test", "b.test"))
    assert node.step().error is None

    answers = {host: ask_tls(port, "a.test", host) for host in ("a.test", "b.test", "c.test")}
    assert answers == {"a.test": (200, "up"), "b.test": (200, "up"), "c.test": (421, answers["c.test"][1])}
    assert "up" not in answers["c.test"][1]


def test_a_chain_of_any_length_is_served(https_node: tuple[Node, int], authority: Authority) -> None:
    """A hundred long names make a leaf that is longer than what nginx reads as one word."""
    node, port = https_node
    names = [f"{'n' * 60}-{number}.test" for number in range(100)]
    certificate = authority.issue(1, *names, key=rsa.generate_private_key(65537, 3072))
    assert len(certificate.chain_pem) > 8000
    node.source.put(certificate)

    assert node.step().unserved == {}
    assert probe_tls(port, names[-1]).fingerprint == certificate.fingerprint


@pytest.mark.parametrize("kind", ["haproxy"])
def test_a_node_may_change_its_proxy(https_node: tuple[Node, int], authority: Authority, nginx_binary: Path) -> None:
    """What HAProxy served is served by nginx, from the same folder, and nothing of the old one's lists is left."""
    node, port = https_node
    certificate = authority.issue(1, "a.test")
    node.source.put(certificate)
    node.step()
    node.agent.stop()
    node.agent.close()
    node.kind, node.binary = "nginx", nginx_binary
    node.start_agent()

    heartbeat = node.step()
    node.source.put(authority.issue(2, "b.test"))
    node.step()

    assert (heartbeat.error, heartbeat.version_number, heartbeat.proxy[:5]) == (None, 1, "nginx")
    assert probe_tls(port, "a.test").fingerprint == certificate.fingerprint
    assert {path.suffix for path in node.folder.lists.iterdir()} == {".conf"}
