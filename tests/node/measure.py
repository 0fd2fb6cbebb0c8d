"""What a node costs, measured: `python -m tests.node.measure [haproxy|nginx ...]`. One line of JSON for each figure.

With 1, 1,000 and 10,000 certificates: start from nothing and proof of each, a hot swap of one, memory, a restart of
the agent. Then 100 publishes and 100 hot swaps under load, of clients that come anew each time and of others that
keep their connection; it ends with an error where a request fails. Seconds and MiB; the proxies and the load share the
machine with the agent, so read the figures as ratios.
"""

import json
import os
import resource
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from tempfile import mkdtemp

from .conftest import Authority, Gateway, HttpHandler, KeptLoad, Load, Node, Ports, Upstream

COUNTS = (1, 1_000, 10_000)
SWAPS = 5
PUBLISHES = 100
KEPT = 3
"""Clients of each listener that keep their connection."""


def say(node: Node, **figures: object) -> None:
    print(json.dumps({"proxy": node.proxy.describe()} | figures), flush=True)


def seconds(act: Callable[[], object]) -> float:
    start = time.monotonic()
    act()
    return round(time.monotonic() - start, 3)


def memory() -> float:
    """Return what this process holds, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * resource.getpagesize() / 2**20, 1)


def proportional_set(pid: int) -> float:
    """Return what a process holds, pages that it shares divided among those that share them, in MiB."""
    (line,) = (row for row in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if row.startswith("Pss:"))
    return int(line.split()[1]) / 1024


@contextmanager
def make_node(kind: str) -> Iterator[Node]:
    binary = os.environ.get(f"CERTWORKER_{kind.upper()}_BIN") or shutil.which(
        kind, path=f"{os.environ['PATH']}:/usr/sbin"
    )
    path = Path(mkdtemp(prefix="certworker-measure-"))
    node = Node(path, kind, Path(binary or kind))
    try:
        yield node
    finally:
        node.agent.stop()
        node.agent.close()
        shutil.rmtree(path)


def sound_step(node: Node) -> None:
    heartbeat = node.step()
    assert (heartbeat.error, heartbeat.unserved) == (None, {}), heartbeat


def measure_certificates(kind: str, count: int, ports: Ports) -> None:
    authority, gateway = Authority(), Gateway()
    gateway.listener(ports.take(), "https")
    with make_node(kind) as node:
        for number in range(count):
            node.source.put(authority.issue(number, f"{number}.a.test"))
        node.source.publish(gateway.snapshot())
        before = memory()
        start = seconds(lambda: sound_step(node))
        swaps = []
        for _ in range(SWAPS):
            node.source.put(authority.issue(0, "0.a.test"))
            swaps.append(seconds(lambda: sound_step(node)))
        say(
            node, certificates=count, start=start, swap=statistics.median(swaps), swap_worst=max(swaps),
            agent_mib=round(memory() - before, 1),
            agent_peak_mib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before, 1),
            workers_mib=round(sum(map(proportional_set, node.workers())), 1),
        )  # fmt: skip
        node.agent.close()
        node.start_agent()
        say(node, certificates=count, agent_restart=seconds(lambda: sound_step(node)))


@contextmanager
def make_loaded(kind: str, ports: Ports) -> Iterator[tuple[Node, Gateway, list[Load], list[KeptLoad]]]:
    """Serve a http and a https listener to clients that come anew for each request, and to others that stay."""
    authority, gateway = Authority(), Gateway()
    upstream = Upstream(ports.take(), "up", HttpHandler)
    with make_node(kind) as node:
        over, pool = threading.Event(), gateway.pool(upstream.port)
        fresh, kept = [], []
        for protocol in ("http", "https"):
            gateway.route(gateway.listener(port := ports.take(), protocol), pool)
            fresh.append(Load(port, protocol == "https"))
            kept += [KeptLoad(port, protocol == "https") for _ in range(KEPT)]
        node.source.put(authority.issue(0, "a.test"))
        node.source.publish(gateway.snapshot())
        sound_step(node)
        clients = [threading.Thread(target=load.run, args=(over,)) for load in (*fresh, *kept)]
        for client in clients:
            client.start()
        try:
            yield node, gateway, fresh, kept
        finally:
            over.set()
            for client in clients:
                client.join()
    upstream.stop()


def say_load(node: Node, fresh: list[Load], kept: list[KeptLoad], **figures: object) -> None:
    """Print what became of all requests, and end with an error where none was to fail."""
    faults = [fault for load in (*fresh, *kept) for fault in load.faults]
    again = sum(load.again for load in kept)
    say(
        node, **figures, requests=sum(load.answers for load in fresh), failed=len(faults), first_faults=faults[:3],
        kept_requests=sum(load.answers for load in kept), kept_connections=sum(load.connections for load in kept),
        kept_sent_again=again,
    )  # fmt: skip
    assert not faults, faults
    assert again == 0 or not node.keeps_clients


def measure_publishes(kind: str, ports: Ports) -> None:
    with make_loaded(kind, ports) as (node, gateway, fresh, kept):
        times = []
        for number in range(PUBLISHES):
            gateway.route(gateway.listeners[0].id, gateway.pools[0].id, path={"exact": f"/{number}"})
            node.source.publish(gateway.snapshot())
            times.append(seconds(lambda: sound_step(node)))
    say_load(
        node, fresh, kept, publishes=PUBLISHES, publish=statistics.median(times), publish_worst=max(times)
    )  # fmt: skip


def measure_swaps(kind: str, ports: Ports) -> None:
    authority = Authority()
    with make_loaded(kind, ports) as (node, _, fresh, kept):
        times = []
        for _ in range(PUBLISHES):
            node.source.put(authority.issue(0, "a.test"))
            times.append(seconds(lambda: sound_step(node)))
    say_load(node, fresh, kept, swaps=PUBLISHES, swap=statistics.median(times), swap_worst=max(times))


def measure_quiet_publish(kind: str, ports: Ports) -> None:
    gateway = Gateway()
    listener = gateway.listener(ports.take())
    pool = gateway.pool(ports.take())
    with make_node(kind) as node:
        times = []
        for number in range(10):
            gateway.route(listener, pool, path={"exact": f"/{number}"})
            node.source.publish(gateway.snapshot())
            times.append(seconds(lambda: sound_step(node)))
        say(node, first_publish=times[0], publish_without_load=statistics.median(times[1:]))


def main() -> None:
    ports = Ports(29000, 30000)
    for kind in sys.argv[1:] or ("haproxy", "nginx"):
        measure_quiet_publish(kind, ports)
        measure_publishes(kind, ports)
        measure_swaps(kind, ports)
        for count in COUNTS:
            # In a process of its own, whose memory nothing else has used before.
            alone = get_context("spawn").Process(target=measure_certificates, args=(kind, count, ports))
            alone.start()
            alone.join()
            assert alone.exitcode == 0


if __name__ == "__main__":
    main()
