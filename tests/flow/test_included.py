"""A box beside a proxy that is the operator's own: from a policy to a certificate that it serves, on real Pebble."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from certworker.cli.pebble import Pebble
from tests.node.operator import Operator

from .box import Box, until

pytestmark = [pytest.mark.pebble, pytest.mark.proxy]

NAME = "shop.example"


@contextmanager
def operators_proxy(box: Box) -> Iterator[Operator]:
    binary = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
    assert binary is not None, "haproxy is not installed: run `make setup`"
    operator = Operator(box.folder / "data", "haproxy", Path(binary), box.http_port, box.https_port, box.upstream_port)
    try:
        yield operator
    finally:
        operator.stop()


def test_an_operators_own_proxy(folder: Path, start_pebble: Callable[..., Pebble]) -> None:
    """No order is sent while it does not run; then it forwards the challenge, serves the certificate, and a renewal."""
    ca = start_pebble(nonce_reject=0)
    commands = {"PROXY_RELOAD": str(folder / "data" / "reload"), "PROXY_CHECK": str(folder / "data" / "check")}
    box = Box.make(folder, ca, **commands)
    (folder / "data").mkdir(mode=0o700)
    with box.upstream(), operators_proxy(box) as operator:
        box.configure(NAME)
        with box.service():
            until(lambda: "reload command" in str(box.json("status")["nodes"]))
            assert ca.ledger() == []
            operator.start()
            until(lambda: box.served(NAME), limit=60)
            answer = box.get(NAME, ca.root_pem())
            box.run("renew", NAME, "--force")
            until(lambda: box.served(NAME))
            renewed = box.get(NAME, ca.root_pem())
            warnings = box.json("node", "list")

    assert answer[:2] == renewed[:2] == (200, b"hello from upstream")
    assert hashlib.sha256(answer[2]).digest() != hashlib.sha256(renewed[2]).digest()
    assert "routes and 1 upstream pools have no effect here" in str(warnings)
    assert [event for event in box.log() if event["event"] == "issuance.trouble"] == []
