"""The soak's own oracles: each sees what it is there for."""

import base64
import json
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import insert, update

from certworker.store.database import Database
from certworker.store.rows import new_id
from certworker.store.tables import certificates, lineages
from tests.chaos.proxy import Exchange
from tests.test_leaks import Secret

from .checks import Needles
from .storm import Struck, Waited, kept_retry_after, kept_schedule
from .watch import Watch

RAW = bytes(range(100, 132))


@pytest.mark.parametrize("offset", range(17))
def test_a_secret_is_found_wherever_it_stands(offset: int) -> None:
    """In each of its forms, also with line breaks in it; and nothing else is taken for it."""
    draw = random.Random(offset)
    others = [Secret.of_bytes(f"other {number}", draw.randbytes(32)) for number in range(50)]
    needles = Needles([*others, Secret.of_bytes("secret", RAW)])
    noise = draw.randbytes(1000)
    for form in Secret.of_bytes("secret", RAW).forms:
        assert needles.found_in(b"." * offset + form + noise) == ["secret"]
        broken = form[:20] + b"\n" + form[20:]
        assert needles.found_in(noise + b"." * offset + broken) == ["secret"]
    assert needles.found_in(noise) == []


def asked(at: float, path: str = "/order/1") -> Exchange:
    return Exchange(at, "POST", path, "order", {}, b"")


def ordered(at: float, payload: object) -> Exchange:
    """Return a newOrder with this payload."""
    text = base64.urlsafe_b64encode(json.dumps(payload).encode()).decode().rstrip("=")
    return Exchange(at, "POST", "/order-plz", "newOrder", {}, json.dumps({"payload": text}).encode())


def test_who_asks_too_soon_is_seen() -> None:
    """The same thing again before the time, unless whoever was told has died with it."""
    struck = Struck(asked_to_wait=[Waited(asked(10.0), 10.1, 3)])
    others = [asked(10.0), asked(11.0, "/order/2")]

    assert kept_retry_after(struck, [*others, asked(14.0)]).worst == pytest.approx(0.9)
    assert kept_retry_after(struck, [*others, asked(12.0)]).worst == pytest.approx(-1.1)
    struck.disturbed.append((10.5, 10.5))
    assert kept_retry_after(struck, [*others, asked(12.0)]).judged == 0


def test_who_repeats_a_failure_too_soon_is_seen() -> None:
    """The very same words; what the CA is asked with others is another question."""
    order, without = {"identifiers": [{"value": "a.test"}], "replaces": "x"}, {"identifiers": [{"value": "a.test"}]}
    struck = Struck(refused=[Waited(ordered(10.0, order), 10.1, 4.0)])

    assert kept_schedule(struck, [ordered(10.0, order), ordered(10.2, without), ordered(14.2, order)]).worst >= 0
    assert kept_schedule(struck, [ordered(10.0, order), ordered(12.1, order)]).worst == pytest.approx(-2.0)


@pytest.fixture
def serve(db: Database) -> Callable[..., str]:
    """Write a lineage with an active certificate; return the certificate's id."""

    def serve(name: str, end: timedelta = timedelta(hours=1)) -> str:
        now = datetime.now(UTC)
        lineage_id, certificate_id = new_id(), new_id()
        lineage = {
            "id": lineage_id, "dns_names": [name], "names_hash": name, "directory_url": "https://ca.test/dir",
            "key_type": "ecdsa-p256", "created_at": now, "updated_at": now,
        }  # fmt: skip
        certificate = {
            "id": certificate_id, "domain": name, "status": "active", "lineage_id": lineage_id, "cert_pem": "",
            "key_pem": "", "expires_at": now + end,
        }  # fmt: skip
        db.write(lambda tx: tx.execute(insert(lineages).values(lineage)))
        db.write(lambda tx: tx.execute(insert(certificates).values(certificate)))
        return certificate_id

    return serve


def watched(db: Database, act: Callable[[], Any], mortal: list[str] = []) -> set[str]:  # noqa: B006
    with Watch(db.engine.url.render_as_string(hide_password=False), mortal) as watch:
        watch.await_sample()
        act()
        watch.await_sample()
    return watch.faults


def test_the_watch_sees_who_serves_nothing(db: Database, serve: Callable[..., str]) -> None:
    """A certificate that is not active any more, and one that has ended; not those that may."""
    gone = serve("gone.test")
    serve("well.test")
    serve("mortal.test", timedelta(milliseconds=300))
    serve("ends.test", timedelta(milliseconds=300))

    def act() -> None:
        db.write(lambda tx: tx.execute(update(certificates).where(certificates.c.id == gone).values(status="error")))
        time.sleep(0.3)

    faults = sorted(watched(db, act, ["mortal.test"]))
    assert [fault.split(":")[0] for fault in faults] == ["ends.test", "gone.test"]
