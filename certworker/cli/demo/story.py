"""The demo, act by act. Each act shows something or raises CertworkerError, which ends it with exit code 1."""

import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path

from certworker.cli.demo.interrupts import Interrupts
from certworker.cli.demo.service import RunningService
from certworker.cli.demo.show import Screen
from certworker.cli.demo.stage import NAME, Stage, open_stage
from certworker.cli.demo.visitor import Site, Visitor
from certworker.errors import CertworkerError

_START_LIMIT = 30.0
_ISSUE_LIMIT = 60.0
_VISITS = 25
"""So many good answers are seen before the renewal, and as many after it."""

_MEANING = {
    "queued": "the scan found a name without a certificate",
    "order_intent": "key sealed, CSR and account stored: nothing was ordered yet",
    "ordered": "the CA opened an order; its URL is stored",
    "validating": "challenge published; the CA is told to look, and comes through HAProxy's http listener",
    "finalizing": "the CA is convinced that the name is ours, and gets the CSR",
    "done": "signed and checked: our key, exactly our names; activated with policy and audit log in one transaction",
    "served": "HAProxy proved by a TLS handshake that it presents the new leaf",
}

_REMEMBERED = "the CA still remembers that the name is ours, and gets the CSR"

_GATEWAY = """\
listeners = [
  {{ name = "http", port = {http_port}, protocol = "http" }},
  {{ name = "https", port = {https_port}, protocol = "https" }},
]
upstream_pools = [{{ name = "shop", health_check = {{ kind = "tcp", interval_secs = 1 }} }}]
upstream_targets = [{{ pool_id = "shop", address = "127.0.0.1:{upstream_port}" }}]
routes = [
  {{ listener_id = "https", match_expr = {{ host = "{name}", path = {{ prefix = "/" }} }}, upstream_pool_id = "shop" }},
]
"""
_POLICY = """\
tls_policies = [{{ mode = "auto", domains = ["{name}"] }}]
"""


def tell(screen: Screen, *, keep: bool) -> None:
    """Tell the whole story; whatever happens, nothing is left running at the end."""
    began = time.monotonic()
    screen.title("certworker demo: a policy row becomes a certificate that a real proxy serves")
    with Interrupts() as interrupts, ExitStack() as stack:
        try:
            facts = _play(screen, stack, interrupts, keep=keep)
        except KeyboardInterrupt:
            screen.note("interrupted: ending everything that was started")
            raise
        finally:
            interrupts.ignore()
    screen.act("Summary")
    for name, value in [*facts, ("left running", "nothing"), ("total", f"{time.monotonic() - began:.1f} s")]:
        screen.fact(name, value)


def _play(screen: Screen, stack: ExitStack, interrupts: Interrupts, *, keep: bool) -> list[tuple[str, str]]:
    screen.act("A certificate authority, a web server, an empty database")
    with interrupts.held():
        stage = stack.enter_context(open_stage(interrupts))
    _introduce(screen, stage)
    screen.act("The gateway, as rows of the database")
    _write_gateway(screen, stage)
    screen.act("The service, and a proxy without any certificate")
    service = RunningService(stage)
    site = _start(screen, stage, service)
    screen.act("One row in tls_policies starts everything")
    took = _issue(screen, stage, service)
    screen.act("Is it true? A client asks that trusts Pebble's root and nothing else")
    first = _prove(screen, site)
    screen.act("A renewal, while a visitor keeps asking")
    visitor = Visitor(site)
    second = _renew(screen, stage, service, visitor, first)
    if keep:
        _keep(screen, stage)
    screen.act("SIGTERM: the service drains")
    drained = _drain(screen, service)
    return [
        ("name", f"https://{NAME}: TLS by HAProxy, content by the upstream"),
        ("first served", f"{took:.1f} s after it was queued, with a CA that takes its time to look"),
        ("first leaf", first),
        ("renewed leaf", second),
        ("CA's ledger", f"{len(stage.pebble.ledger())} certificates"),
        ("visitor", f"{visitor.requests} requests, {len(visitor.failures)} failed"),
        ("drained in", f"{drained:.1f} s"),
    ]


def _introduce(screen: Screen, stage: Stage) -> None:
    screen.fact("CA", f"Pebble, {stage.pebble.directory_url}, with its own DNS")
    screen.fact("upstream", f"http://127.0.0.1:{stage.upstream_port}")
    screen.fact("folder", str(stage.folder))
    screen.command("certworker init", stage.certworker("init"))


def _write_gateway(screen: Screen, stage: Stage) -> None:
    text = _GATEWAY.format(
        http_port=stage.http_port, https_port=stage.https_port, upstream_port=stage.upstream_port, name=NAME
    )
    screen.file("gateway.toml", text)
    stage.write("gateway.toml", text)
    screen.command("certworker config apply gateway.toml", stage.certworker("config", "apply", "gateway.toml"))


def _start(screen: Screen, stage: Stage, service: RunningService) -> Site:
    screen.command("certworker run &")
    for event in service.events(0, _START_LIMIT):
        _show_trouble(screen, event)
        if event["event"] == "service.started":
            break
    site = Site(NAME, stage.https_port, stage.root_file.read_text())
    screen.fact("service", f"process {service.pid}; HAProxy listens on {stage.http_port} and {stage.https_port}")
    screen.proof(f"https://{NAME}:{stage.https_port} is refused: {site.refusal()}")
    return site


def _issue(screen: Screen, stage: Stage, service: RunningService) -> float:
    text = _POLICY.format(name=NAME)
    screen.file("policy.toml", text)
    stage.write("policy.toml", text)
    position = service.position
    output = stage.certworker("config", "apply", "policy.toml")
    screen.command("certworker config apply policy.toml", output)
    return _follow(screen, service, position)


def _follow(screen: Screen, service: RunningService, position: int) -> float:
    """Show every state an issuance reaches, until it is served; return how many seconds that took."""
    began: datetime | None = None
    shown = ""
    for event in service.events(position, _ISSUE_LIMIT):
        _show_trouble(screen, event)
        state = _state_of(event)
        if state in ("failed", "cancelled"):
            raise CertworkerError(f"the issuance {state}: {service.last_words()}")
        if state not in _MEANING or state == shown:
            continue
        at = datetime.fromisoformat(event["timestamp"])
        began = began or at
        remembered = state == "finalizing" and shown == "ordered"
        screen.step((at - began).total_seconds(), state, _REMEMBERED if remembered else _MEANING[state])
        shown = state
        if state == "served":
            return (at - began).total_seconds()
    raise AssertionError("events never end without an error")


def _state_of(event: dict[str, object]) -> str:
    name = str(event["event"])
    other = {"scan.queued": "queued", "certificates.served": "served"}
    return other.get(name) or (name.removeprefix("issuance.") if name.startswith("issuance.") else "")


def _show_trouble(screen: Screen, event: dict[str, object]) -> None:
    if event.get("level") in ("warning", "error", "critical"):
        said = event.get("detail") or event.get("error") or event.get("fault") or ""
        screen.trouble(f"{event['event']}: {said}")


def _prove(screen: Screen, site: Site) -> str:
    answer = site.ask("/catalogue")
    if answer.status != 200 or "hello from the upstream" not in answer.body:
        raise CertworkerError(f"https://{NAME} answered {answer.status}: {answer.body[:200]!r}")
    screen.command(f"GET https://{NAME}:{site.port}/catalogue", answer.body)
    screen.proof(f"{answer.version}, chain and name verified, status {answer.status}")
    screen.proof(f"leaf {answer.fingerprint}")
    return answer.fingerprint


def _renew(screen: Screen, stage: Stage, service: RunningService, visitor: Visitor, first: str) -> str:
    workers = service.proxy_workers()
    with visitor:
        visitor.wait_until_shown(_VISITS)
        screen.note(f"the visitor has made {visitor.requests} requests so far, each on a new connection")
        position = service.position
        screen.command(f"certworker renew {NAME} --force")
        command = stage.spawn("renew", NAME, "--force", stdout=subprocess.PIPE)
        _follow(screen, service, position)
        screen.output(stage.finish(command))
        visitor.wait_until_shown(_VISITS, besides=first)
    second = _second_leaf(visitor, first)
    screen.proof(f"leaf {second}")
    if visitor.failures:
        raise CertworkerError(f"{len(visitor.failures)} of {visitor.requests} requests failed: {visitor.failures[0]}")
    counts = f"{visitor.shown[first]} shown the first leaf, {visitor.shown[second]} the second"
    screen.proof(f"{visitor.requests} requests, 0 failed: {counts}")
    if service.proxy_workers() != workers:
        raise CertworkerError("HAProxy was reloaded by a renewal, which needs no reload")
    screen.proof("the same HAProxy process throughout: no reload")
    return second


def _second_leaf(visitor: Visitor, first: str) -> str:
    others = [fingerprint for fingerprint in visitor.shown if fingerprint != first]
    if len(others) != 1:
        failed = f", {len(visitor.failures)} failures, {visitor.failures[0]} first" if visitor.failures else ""
        raise CertworkerError(f"the leaf should have changed once; the visitor was shown {dict(visitor.shown)}{failed}")
    return others[0]


def _keep(screen: Screen, stage: Stage) -> None:
    url = f"https://{NAME}:{stage.https_port}/"
    screen.act("Everything stays up until Ctrl-C")
    screen.fact("site", url)
    screen.fact("data", str(stage.folder / "data"))
    screen.fact("log", str(stage.folder / "service.log"))
    screen.command(f"curl --cacert {stage.root_file} --resolve {NAME}:{stage.https_port}:127.0.0.1 {url}")
    screen.command(f"export CERTWORKER_CONFIG={stage.settings_file}")
    looks = ("status", "policy list", "config export", "policy add more.demo.test", f"renew {NAME} --force")
    for arguments in looks:
        screen.command(f"{Path(sys.executable).with_name('certworker')} {arguments}")
    with suppress(KeyboardInterrupt):  # the wish of whoever said --keep, not an accident
        while True:
            time.sleep(0.5)


def _drain(screen: Screen, service: RunningService) -> float:
    began = time.monotonic()
    code = service.stop()
    took = time.monotonic() - began
    if code != 0:
        raise CertworkerError(f"the service ended with exit code {code}: {service.last_words()}")
    screen.proof(f"exit code 0 after {took:.1f} s; leases given back, HAProxy ended")
    return took
