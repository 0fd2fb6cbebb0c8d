"""An operator's own HAProxy or nginx that includes our files: the examples of docs/operations.md, really run."""

import random
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from certworker.core.rollout import Heartbeat
from certworker.errors import SettingsError
from certworker.node.agent import Agent
from certworker.node.folder import Folder
from certworker.node.included import COMMAND_LIMIT, Commands, HaproxyDialect, Included, NginxDialect
from certworker.node.lookup import Lookup
from certworker.node.probe import ask_challenge, probe_tls
from certworker.outpost import make_proxy
from certworker.render.files import CHALLENGE_PATH
from certworker.render.included import MARK
from certworker.settings import Settings

from .conftest import (
    PATIENCE,
    Authority,
    Gateway,
    Load,
    MemorySource,
    Ports,
    Upstream,
    ask,
    ask_tls,
    await_true,
    uuid,
)
from .operator import Operator, example

pytestmark = pytest.mark.proxy

NAME = "shop.example"
TOKEN = "a" * 43


class Machine:
    """The operator's proxy, and our agent beside it."""

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.source = MemorySource()
        self.limit = timedelta(seconds=20)
        self.pause = timedelta()
        self.names: dict[str, tuple[str, ...]] = {}
        """What the DNS says."""
        self.start_agent()

    def start_agent(self) -> None:
        self.folder = Folder(self.operator.path / "node")
        operator = self.operator
        commands = Commands((str(operator.reload_script),), (str(operator.check_script),), self.limit, self.pause)
        dialect = (
            HaproxyDialect(self.folder)
            if self.operator.kind == "haproxy"
            else NginxDialect(self.folder, Lookup(PATIENCE, self.resolve, timedelta()))
        )
        self.proxy = Included(self.folder, dialect, commands, PATIENCE)
        self.agent = Agent("node-1", self.source, self.folder, self.proxy, PATIENCE, random.Random(1))

    def resolve(self, host: str) -> tuple[str, ...]:
        try:
            return self.names[host]
        except KeyError:
            raise OSError(f"{host}: temporary failure in name resolution") from None

    def restart_agent(self) -> None:
        self.agent.close()
        self.start_agent()

    def step(self) -> Heartbeat:
        return self.agent.step()

    def leaf(self, name: str = NAME) -> str | None:
        return probe_tls(self.operator.secure, name).fingerprint


@pytest.fixture
def machine(
    kind: str, ports: Ports, upstream: Callable[..., Upstream], request: pytest.FixtureRequest, gateway: Gateway
) -> Iterator[Machine]:
    """Rows are published; the operator's proxy does not run yet."""
    path = Path(mkdtemp(prefix="certworker-own-"))
    binary = request.getfixturevalue(f"{kind}_binary")
    operator = Operator(path, kind, binary, ports.take(), ports.take(), upstream("shop").port)
    machine = Machine(operator)
    gateway.listener(operator.plain)
    gateway.listener(operator.secure, "https")
    machine.source.publish(gateway.snapshot())
    yield machine
    operator.stop()
    machine.agent.close()
    shutil.rmtree(path)


@pytest.fixture
def served(machine: Machine, authority: Authority) -> Machine:
    """The operator's proxy runs with a certificate that was proved."""
    machine.step()
    machine.operator.start()
    machine.source.put(authority.issue(1, NAME, "www.shop.example"))
    heartbeat = machine.step()
    assert (heartbeat.error, heartbeat.unserved) == (None, {})
    return machine


@pytest.fixture
def half_routed(served: Machine, gateway: Gateway) -> Machine:
    """One more plain port, which is asked before the other, and where nothing answers."""
    gateway.listener(1)
    served.source.publish(gateway.snapshot())
    served.step()
    return served


@pytest.fixture
def forwarding(served: Machine, gateway: Gateway) -> Machine:
    """Challenges go to a responder with a name."""
    served.names["responder.example"] = ("127.0.0.9",)
    gateway.responders = ("responder.example:8402",)
    served.source.publish(gateway.snapshot())
    assert served.step().error is None
    return served


def test_the_files_are_there_before_the_proxy(machine: Machine, authority: Authority) -> None:
    """The operator's proxy starts with them before there is any certificate; then the first one comes."""
    heartbeat = machine.step()
    assert heartbeat.version_id is None
    assert "reload command" in str(heartbeat.error)

    machine.operator.start()
    heartbeat = machine.step()
    assert (heartbeat.error, heartbeat.version_number, heartbeat.unserved) == (None, 1, {})
    assert heartbeat.refused_version_id is None
    assert machine.leaf() is None

    certificate = authority.issue(1, NAME, "www.shop.example")
    machine.source.put(certificate)
    heartbeat = machine.step()

    assert (heartbeat.error, heartbeat.unserved) == (None, {})
    assert heartbeat.fingerprints == {certificate.id: certificate.fingerprint}
    assert {machine.leaf(), machine.leaf("www.shop.example")} == {certificate.fingerprint}
    assert machine.leaf("other.example") is None
    assert "shop" in ask_tls(machine.operator.secure, NAME, NAME)[1]


def test_a_renewal_fails_no_request(served: Machine, authority: Authority) -> None:
    """Clients of the operator's own routes notice nothing; each renewal is one reload."""
    load, over = NamedLoad(served.operator.secure), threading.Event()
    thread = threading.Thread(target=load.run, args=(over,))
    thread.start()
    before = served.operator.count_reloads()
    try:
        for _ in range(5):
            renewal = authority.issue(1, NAME, "www.shop.example")
            served.source.put(renewal)
            assert served.step().unserved == {}
            assert served.leaf() == renewal.fingerprint
    finally:
        over.set()
        thread.join()

    assert load.faults == []
    assert load.answers > 5
    assert served.operator.count_reloads() == before + 5


class NamedLoad(Load):
    """The same for the name of the example."""

    def run(self, over: threading.Event) -> None:
        while not over.is_set():
            try:
                status, _ = ask_tls(self.port, NAME, NAME)
            except (OSError, IndexError) as failed:
                self.faults.append(repr(failed))
            else:
                self.answers += 1
                if status != 200:
                    self.faults.append(str(status))


def test_a_quiet_step_reloads_nothing(served: Machine) -> None:
    """Neither time nor a new agent is a reason, as long as the proxy says that it has read the files."""
    before = served.operator.count_reloads()
    served.step()
    served.restart_agent()
    heartbeat = served.step()

    assert (heartbeat.error, heartbeat.version_number) == (None, 1)
    assert served.operator.count_reloads() == before


def test_rows_that_are_not_ours_change_nothing(served: Machine, gateway: Gateway) -> None:
    """Routes and pools of a version have no effect, which is said, and a version of such rows alone is no reload."""
    before = served.operator.count_reloads()
    gateway.route(gateway.listeners[1].id, gateway.pool(served.operator.upstream))
    served.source.publish(gateway.snapshot())

    heartbeat = served.step()

    assert (heartbeat.error, heartbeat.version_number) == (None, 2)
    assert heartbeat.warnings[0].startswith("1 routes and 1 upstream pools have no effect here")
    assert served.operator.count_reloads() == before
    served.restart_agent()
    assert served.step().warnings == heartbeat.warnings


def test_a_failing_check_leaves_everything(served: Machine, authority: Authority) -> None:
    """The files before are back, nothing was reloaded, the reason is told; once it passes, all is taken over."""
    operator = served.operator
    leaf, files, before = served.leaf(), operator.include.readlink(), operator.count_reloads()
    sound = operator.config.read_text()
    operator.config.write_text(sound + "bad line;\n")
    renewal = authority.issue(1, NAME, "www.shop.example")
    served.source.put(renewal)

    heartbeat = served.step()

    assert "check command" in str(heartbeat.error)
    assert "bad" in str(heartbeat.error)
    assert (heartbeat.version_number, heartbeat.refused_version_id) == (1, None)
    assert (served.leaf(), operator.include.readlink(), operator.count_reloads()) == (leaf, files, before)
    operator.config.write_text(sound)
    assert served.step().error is None
    assert served.leaf() == renewal.fingerprint


def test_no_reload_is_unchecked(served: Machine) -> None:
    """Nor the one of a new agent that finds the proxy with other files than it would write."""
    before = served.operator.count_reloads()
    served.operator.stop()
    served.operator.say(served.operator.check_script, "exit 1")
    served.restart_agent()

    assert "check command" in str(served.step().error)
    assert served.operator.count_reloads() == before


@pytest.mark.parametrize("kind", ["nginx"])
def test_a_reload_for_a_responders_new_address_is_checked_once(forwarding: Machine) -> None:
    """It is as much a change as a certificate."""
    operator, before = forwarding.operator, forwarding.operator.count_reloads()
    operator.say(operator.check_script, f"echo checked >> {operator.path}/checks")
    forwarding.names["responder.example"] = ("127.0.0.10",)
    await_true(lambda: forwarding.step() and operator.count_reloads() > before, "the new address is taken over")

    assert (operator.path / "checks").read_text().split() == ["checked"]


def test_what_was_refused_is_left_alone_for_a_while(served: Machine, authority: Authority) -> None:
    """A step after the other runs no command for it; another change does."""
    served.pause = timedelta(hours=1)
    served.restart_agent()
    served.step()
    served.operator.say(served.operator.check_script, f"echo checked >> {served.operator.path}/checks; exit 1")
    served.source.put(authority.issue(1, NAME))
    refusals = {str(served.step().error) for _ in range(3)}
    served.source.put(authority.issue(1, NAME))
    served.step()

    assert len(refusals) == 1
    assert (served.operator.path / "checks").read_text().split() == ["checked", "checked"]


@pytest.mark.parametrize("kind", ["haproxy"])  # nginx names no certificate
def test_sets_that_are_refused_in_turn_are_left_alone(half_routed: Machine, authority: Authority) -> None:
    """With a certificate that the check names, and without it: one check of each, whatever else is amiss."""
    operator = half_routed.operator
    half_routed.pause = timedelta(hours=1)
    half_routed.restart_agent()
    half_routed.step()
    complain = f"grep bad.example {operator.include}/all.list"
    operator.say(operator.check_script, f"echo checked >> {operator.path}/checks; {complain}; exit 1")
    half_routed.source.put(authority.issue(2, "bad.example"))
    half_routed.source.put(authority.issue(3, "good.example"))

    assert all("check command" in str(half_routed.step().error) for _ in range(3))
    assert (operator.path / "checks").read_text().split() == ["checked", "checked"]


@pytest.mark.parametrize("kind", ["haproxy"])  # nginx looks at no certificate
def test_a_certificate_that_the_check_names_is_left_out(served: Machine, authority: Authority) -> None:
    """One that OpenSSL takes and the proxy does not keeps nobody else from being served."""
    bad, good = authority.issue(2, "bad.example"), authority.issue(3, "good.example")
    check = served.operator.check_script.read_text().partition("\n")[2].strip().removeprefix("exec ")
    complain = f"grep bad.example {served.operator.include}/all.list && exit 1"
    served.operator.say(served.operator.check_script, f"{complain}\nexec {check}")
    served.source.put(bad)
    served.source.put(good)

    heartbeat = served.step()

    assert heartbeat.error is None
    assert heartbeat.unserved.keys() == {bad.id}
    assert served.leaf("good.example") == good.fingerprint


def test_a_failing_check_is_no_veto_against_a_version(served: Machine, gateway: Gateway, ports: Ports) -> None:
    """The fault may lie in the operator's own files: the version is tried again, and not reported as refused."""
    sound = served.operator.config.read_text()
    served.operator.config.write_text(sound + "bad line;\n")
    gateway.listeners.pop()
    served.source.publish(gateway.snapshot())

    heartbeat = served.step()

    assert "check command" in str(heartbeat.error)
    assert (heartbeat.version_number, heartbeat.refused_version_id) == (1, None)
    served.operator.config.write_text(sound)
    heartbeat = served.step()
    assert (heartbeat.error, heartbeat.version_number) == (None, 2)


@pytest.mark.parametrize(
    ("script", "said", "runs"),
    [("echo 'no such unit' >&2; exit 4", "ended with 4: no such unit", 2), ("sleep 600", "did not end within 1 s", 1)],
    ids=["failing", "hanging"],
)
def test_a_reload_that_does_not_work_is_undone(
    served: Machine, authority: Authority, script: str, said: str, runs: int
) -> None:
    """The files before are back, the old leaf serves, the reason is told; what hung is not run at once again."""
    operator = served.operator
    leaf, files, before = served.leaf(), operator.include.readlink(), operator.count_reloads()
    served.limit = timedelta(seconds=1)
    served.restart_agent()
    served.step()
    working = operator.reload_script.read_text()
    operator.say(operator.reload_script, f"echo tried >> {operator.path}/reloads\n{script}")
    renewal = authority.issue(1, NAME, "www.shop.example")
    served.source.put(renewal)

    heartbeat = served.step()

    assert said in str(heartbeat.error)
    assert operator.count_reloads() == before + runs
    assert heartbeat.version_number == 1
    assert (served.leaf(), operator.include.readlink()) == (leaf, files)
    operator.reload_script.write_text(working)
    served.limit = timedelta(seconds=20)
    served.restart_agent()
    assert served.step().error is None
    assert served.leaf() == renewal.fingerprint


def test_a_hanging_command_does_not_make_a_node_silent() -> None:
    """A check that takes as long as it may, and then a reload that hangs: no longer than a node may be silent."""
    silent = timedelta(seconds=Settings.model_fields["node_silent_secs"].default)

    assert silent >= 2 * COMMAND_LIMIT


@pytest.mark.parametrize("scene", ["served", "half_routed"])
def test_a_command_that_says_yes_and_does_nothing_is_found_out(
    machine: Machine, scene: str, request: pytest.FixtureRequest, authority: Authority
) -> None:
    """What the proxy has read it says itself, also where another port has no route; the files before are back."""
    request.getfixturevalue(scene)
    operator, files = machine.operator, machine.operator.include.readlink()
    machine.limit = timedelta(seconds=1)
    machine.restart_agent()
    machine.step()
    operator.say(operator.reload_script, "exit 0")
    machine.source.put(authority.issue(1, NAME))

    heartbeat = machine.step()

    assert f"port {operator.plain} gives other files" in str(heartbeat.error)
    assert operator.include.readlink() == files


def test_a_port_without_a_route_is_not_waited_for(half_routed: Machine, authority: Authority) -> None:
    """The others have shown that the files were taken over."""
    renewal = authority.issue(1, NAME)
    half_routed.source.put(renewal)
    begun = time.monotonic()

    assert "the challenge route is not there" in str(half_routed.step().error)
    assert half_routed.leaf() == renewal.fingerprint
    assert time.monotonic() - begun < half_routed.limit.total_seconds() / 2


def test_a_command_may_leave_something_running(served: Machine, authority: Authority) -> None:
    """Nobody waits for what it started in the background."""
    working = served.operator.reload_script.read_text().partition("\n")[2]
    served.operator.say(served.operator.reload_script, f"sleep 5 &\n{working}")
    served.source.put(authority.issue(1, NAME))
    begun = time.monotonic()

    assert served.step().error is None
    assert time.monotonic() - begun < 4


def test_a_proxy_that_does_not_name_our_list_is_named(machine: Machine, authority: Authority) -> None:
    """The reload worked, but another certificate is shown: it is not proved, and the hint says where to look."""
    operator = machine.operator
    own = operator.path / "own.pem"
    theirs = authority.issue(9, NAME)
    own.write_text(theirs.chain_pem + theirs.key_pem)
    if operator.kind == "haproxy":
        text = example("haproxy").replace("crt-list /var/lib/certworker/node/include/all.list strict-sni", f"crt {own}")
    else:
        line = "include /var/lib/certworker/node/include/all.certificates.conf;"
        text = example("nginx").replace(line, f"ssl_certificate {own}; ssl_certificate_key {own};")
    operator.configure(text)
    machine.step()
    operator.start()
    certificate = authority.issue(1, NAME)
    machine.source.put(certificate)

    heartbeat = machine.step()

    assert heartbeat.version_number == 1
    assert heartbeat.fingerprints == {}
    assert f"port {operator.secure} shows leaf {theirs.fingerprint} for {NAME}" in heartbeat.unserved[certificate.id]
    assert str(operator.include) in heartbeat.unserved[certificate.id]
    operator.configure(example(operator.kind))
    subprocess.run([operator.reload_script], check=True)
    await_true(lambda: machine.step().unserved == {}, "the operator's own reload is seen")
    # nginx's old workers accept for a moment after the new ones (`ngx_process_cycle.c`).
    await_true(lambda: machine.leaf() == certificate.fingerprint, "the leaf is shown")


def test_a_missing_route_is_named_and_no_version_is_claimed(machine: Machine, authority: Authority) -> None:
    """Certificates are served all the same, and an order would wait; the hint names the line. No reload in vain."""
    operator = machine.operator
    text = re.sub(r"(?m)^ *(use_backend .*|include .*/challenge\.conf;)$", "", example(operator.kind))
    operator.configure(text.replace(" unless challenge", ""))
    machine.step()
    operator.start()
    certificate = authority.issue(1, NAME)
    machine.source.put(certificate)

    heartbeat = machine.step()

    assert heartbeat.version_id is None
    assert "the challenge route is not there" in str(heartbeat.error)
    assert "status 30" in str(heartbeat.error)
    assert str(operator.include) in str(heartbeat.error)
    assert heartbeat.unserved.keys() <= {certificate.id}
    assert machine.leaf() == certificate.fingerprint
    before = operator.count_reloads()
    machine.step()
    assert operator.count_reloads() == before


def test_a_weak_key_keeps_nobody_from_a_reload(served: Machine, authority: Authority) -> None:
    """It is refused before the operator's proxy sees it."""
    leaf = served.leaf()
    weak = authority.issue(2, "weak.example", key=rsa.generate_private_key(65537, 1024))
    served.source.put(weak)

    heartbeat = served.step()

    assert "too weak" in heartbeat.refused[weak.id]
    assert heartbeat.error is None
    assert served.leaf() == leaf


def test_challenges_go_to_the_responder(served: Machine, upstream: Callable[..., Upstream], gateway: Gateway) -> None:
    """Of the challenge path only what is a challenge; everything else stays the operator's."""
    responder = upstream("responder")
    gateway.responders = (f"127.0.0.1:{responder.port}",)
    served.source.publish(gateway.snapshot())
    assert served.step().error is None
    plain = served.operator.plain

    assert ask(plain, CHALLENGE_PATH + TOKEN, NAME)[0] == 200
    assert ask(plain, CHALLENGE_PATH + "short", NAME)[0] == 404
    assert ask(plain, CHALLENGE_PATH + TOKEN, NAME, "POST")[0] == 405
    assert ask(plain, "/", NAME)[0] in (301, 302)
    assert len(responder.asked) == 1


def included(machine: Machine) -> str:
    """Return what is read in `http { }`."""
    return (machine.operator.include / "http.conf").read_text()


@pytest.mark.parametrize("kind", ["nginx"])  # HAProxy looks names up by itself
def test_a_responders_new_address_is_told_until_it_is_taken_over(forwarding: Machine) -> None:
    """A reload that fails is named in every heartbeat, and is made good by the next one that works."""
    operator = forwarding.operator
    working = operator.reload_script.read_text()
    operator.say(operator.reload_script, "exit 1")
    forwarding.names["responder.example"] = ("127.0.0.10",)
    await_true(lambda: forwarding.step().error, "the new address is tried")

    assert "reload command" in str(forwarding.step().error)
    assert "127.0.0.9:" in included(forwarding)
    operator.reload_script.write_text(working)
    assert forwarding.step().error is None
    assert "127.0.0.10:" in included(forwarding)
    before = operator.count_reloads()
    assert forwarding.step().error is None
    assert operator.count_reloads() == before


@pytest.mark.parametrize("kind", ["nginx"])
def test_a_new_agent_keeps_a_responders_address_while_the_dns_is_away(forwarding: Machine) -> None:
    """The challenge route stays as it is, and no reload is made for nothing."""
    before = forwarding.operator.count_reloads()
    forwarding.names.clear()
    forwarding.restart_agent()

    assert forwarding.step().error is None
    assert "127.0.0.9:" in included(forwarding)
    assert forwarding.operator.count_reloads() == before


def test_the_mark_is_for_this_machine_only(served: Machine) -> None:
    """It names the files that were read."""
    shown = ask_challenge(served.operator.plain, "localhost", MARK).strip()

    assert shown == served.operator.include.readlink().name


def test_a_stateless_listener_answers_by_itself(served: Machine, gateway: Gateway) -> None:
    """With the host's thumbprint, proved; other hosts get none."""
    gateway.listeners.clear()
    gateway.listener(served.operator.plain, challenge="stateless")
    gateway.listener(served.operator.secure, "https")
    served.source.publish(gateway.snapshot())
    thumbprint = "t" * 43
    served.source.put_thumbprint(NAME, thumbprint)

    heartbeat = served.step()

    assert (heartbeat.error, heartbeat.unanswered) == (None, {})
    assert ask_challenge(served.operator.plain, NAME, TOKEN) == f"{TOKEN}.{thumbprint}"
    assert ask_challenge(served.operator.plain, "other.example", TOKEN) == "status 404"


def test_a_policys_list_is_its_own(machine: Machine, gateway: Gateway, authority: Authority) -> None:
    """A listener with a policy has its own file; a bind line names it."""
    operator = machine.operator
    gateway.listeners.pop()
    gateway.listener(operator.secure, "https", policy=901)
    machine.source.publish(gateway.snapshot())
    operator.configure(example(operator.kind).replace("include/all.", f"include/{uuid(901)}."))
    machine.step()
    operator.start()
    machine.source.put(authority.issue(1, NAME, policies=(901,)))

    heartbeat = machine.step()

    assert (heartbeat.error, heartbeat.unserved) == (None, {})
    assert machine.leaf() is not None


def test_without_an_http_listener_nothing_is_written(machine: Machine, gateway: Gateway) -> None:
    """There would be no way to see what the proxy has read."""
    del gateway.listeners[0]
    machine.source.publish(gateway.snapshot())

    assert "has no http listener" in str(machine.step().error)


def test_keys_are_for_the_owner_only(served: Machine) -> None:
    """Files 0600, folders 0700, and no key of a certificate that is gone."""
    files = [path for path in served.folder.path.rglob("*") if path.is_file() and not path.is_symlink()]
    folders = [path for path in served.folder.path.rglob("*") if path.is_dir() and not path.is_symlink()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}

    served.source.remove(uuid(1))
    assert served.step().error is None
    left = [path for path in served.folder.path.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]
    assert left == []


def test_a_proxy_that_is_down_finds_whole_files(served: Machine, authority: Authority) -> None:
    """Renewals while it is down, and a new agent: it starts with complete files, and catches up."""
    served.operator.stop()
    served.source.put(authority.issue(1, NAME))
    assert "reload command" in str(served.step().error)
    served.restart_agent()
    renewal = authority.issue(1, NAME)
    served.source.put(renewal)
    assert "reload command" in str(served.step().error)

    served.operator.start()
    heartbeat = served.step()

    assert (heartbeat.error, heartbeat.unserved) == (None, {})
    assert served.leaf() == renewal.fingerprint


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path leaves room for a socket's, as pytest's own does not."""
    with TemporaryDirectory(prefix="cw-") as path:
        yield Path(path)


def test_a_program_that_is_missing_is_named_with_where_it_may_come_from(short_path: Path) -> None:
    """A setting or an option: whoever gave the one does not look at the other."""
    settings = Settings.model_construct(proxy_reload=("nosuchprog", "reload"))

    with pytest.raises(SettingsError, match="PROXY_RELOAD or --reload: there is no program 'nosuchprog'"):
        make_proxy("haproxy", settings, Folder(short_path), PATIENCE)


def test_the_version_of_the_proxy_is_reported(kind: str, request: pytest.FixtureRequest, short_path: Path) -> None:
    """As far as a program of that name is on this machine and says so."""
    (nothing := short_path / "nothing").symlink_to("/bin/true")
    binary = request.getfixturevalue(f"{kind}_binary")

    def describe(binary: Path) -> str:
        given = {"proxy_reload": ("true",), f"{kind}_bin": binary}
        return make_proxy(kind, Settings.model_construct(**given), Folder(short_path / "node"), PATIENCE).describe()

    assert re.fullmatch(rf"{kind} [1-9]+\.[0-9]+\S*, the operator's own", describe(binary))
    assert describe(nothing) == describe(short_path / "missing") == f"{kind}, the operator's own"
