"""Renewal information and `replaces` against a real Pebble (RFC 9773), with what it may be told to answer."""

import json
from base64 import urlsafe_b64decode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from certworker.ca.client import Account, Client
from certworker.ca.csr import make_csr, make_key
from certworker.ca.keys import AccountKey
from certworker.ca.problems import Endpoint, classify
from certworker.cli.pebble import NINETY_DAYS, Pebble
from certworker.core.certificate import Leaf, read_leaf
from certworker.core.order import OrderStatus
from certworker.core.renewal import choose_moment, drops_replaces, due_at
from certworker.core.retry import ErrorClass, Scope
from certworker.errors import AnswerFault, ProblemReported

from .test_with_pebble import Respond, answer_all, connect, look_until_settled, register

pytestmark = pytest.mark.pebble

DAY, SECOND = timedelta(days=1), timedelta(seconds=1)
TWENTY_SECONDS = {"description": "20 seconds", "validityPeriod": 20}


@dataclass(frozen=True, slots=True)
class Desk:
    """A Pebble, and an account at it whose challenges are answered."""

    pebble: Pebble
    client: Client
    account: Account

    def issue(self, dns_name: str = "a.test", profile: str = "default", replaces: str | None = None) -> str:
        """Go all the way; return the chain."""
        order = self.client.new_order(self.account, [dns_name], profile, replaces)
        answer_all(self.client, self.account, order)
        order = look_until_settled(self.client, self.account, order)
        csr = make_csr(make_key("ecdsa-p256"), [dns_name])
        order = self.client.finalize(self.account, order.finalize_url, csr, order.url)
        order = look_until_settled(self.client, self.account, order)
        assert order.certificate_url is not None
        return self.client.fetch_chain(self.account, order.certificate_url)

    def suggest(self, chain_pem: str, answer: str) -> None:
        """Let Pebble answer this when it is asked about the certificate."""
        leaf_pem = x509.load_pem_x509_certificates(chain_pem.encode())[0].public_bytes(Encoding.PEM).decode()
        self.pebble.management("/set-renewal-info/", {"Certificate": leaf_pem, "ARIResponse": answer})


@pytest.fixture
def desk(respond: Respond, start_pebble: Callable[..., Pebble]) -> Iterator[Desk]:
    pebble = start_pebble(profiles={"default": NINETY_DAYS, "tiny": TWENTY_SECONDS})
    with connect(pebble) as (client, _):
        key = AccountKey.generate()
        respond(pebble.http_port, key)
        yield Desk(pebble, client, register(client, key))


def renewal_id_of(leaf: Leaf) -> str:
    assert leaf.renewal_id is not None
    return leaf.renewal_id


def window(start: datetime, end: datetime, **more: object) -> str:
    return json.dumps({"suggestedWindow": {"start": start.isoformat(), "end": end.isoformat()}, **more})


def issue_replaceable(desk: Desk) -> str:
    """Return the renewal id of a certificate that Pebble lets be replaced.

    It does not find one whose serial number needs a leading byte 00, about one of 256.
    """
    while True:
        renewal_id = renewal_id_of(read_leaf(desk.issue()))
        serial = renewal_id.partition(".")[2]
        if urlsafe_b64decode(serial + "=" * (-len(serial) % 4))[0] != 0:
            return renewal_id


def test_every_certificate_is_known_by_its_renewal_id(desk: Desk) -> None:
    """Pebble suggests two thirds of the life, give or take a day, and wants to be asked every six hours."""
    with ThreadPoolExecutor(8) as threads:
        leaves = [read_leaf(chain) for chain in threads.map(lambda n: desk.issue(f"n{n}.test"), range(48))]
        answers = list(threads.map(desk.client.fetch_renewal_info, map(renewal_id_of, leaves)))

    for leaf, said in zip(leaves, answers, strict=True):
        middle = said.window.start + (said.window.end - said.window.start) / 2
        assert abs(middle - leaf.validity.not_before - leaf.validity.lifetime * 2 / 3) < 5 * SECOND
        assert said.window.end - said.window.start == 2 * DAY
        assert said.retry_after == timedelta(hours=6)
        assert said.window.start <= choose_moment(said.window, leaf.validity, 0.99) <= due_at(leaf.validity, None)


def test_a_life_of_seconds_is_not_renewed_again_and_again(desk: Desk) -> None:
    """All of it is the window then: a third of it is used on average, and never more than half."""
    leaf = read_leaf(desk.issue(profile="tiny"))
    said = desk.client.fetch_renewal_info(renewal_id_of(leaf))
    ages = [choose_moment(said.window, leaf.validity, n / 100) - leaf.validity.not_before for n in range(100)]

    assert (said.window.start, said.window.end) == (leaf.validity.not_before, leaf.validity.not_after)
    assert sum(ages, timedelta(0)) / 100 > leaf.validity.lifetime * 0.3
    assert max(ages) <= leaf.validity.lifetime / 2 + SECOND


@pytest.mark.parametrize(
    "answer",
    [
        "garbage",
        "{}",
        "null",
        window(datetime.now(UTC), datetime.now(UTC) - DAY),
        window(datetime.now(UTC), datetime.now(UTC) + DAY, explanationURL="x" * 200_000),
    ],
    ids=["garbage", "empty", "null", "backwards", "200 kB"],
)
def test_an_answer_of_no_use_is_refused(desk: Desk, answer: str) -> None:
    """And is nobody's trouble but this certificate's."""
    chain = desk.issue()
    desk.suggest(chain, answer)

    with pytest.raises(AnswerFault) as refused:
        desk.client.fetch_renewal_info(renewal_id_of(read_leaf(chain)))
    failure = classify(refused.value, Endpoint.RENEWAL_INFO)
    assert (failure.error_class, failure.scope) == (ErrorClass.TRANSIENT, Scope.ISSUANCE)


def test_a_window_of_the_past_and_a_link_to_nowhere(desk: Desk) -> None:
    """The window is obeyed, the link is not shown; an honest link is."""
    chain, now = desk.issue(), datetime.now(UTC)
    leaf = read_leaf(chain)
    for link, shown in (("javascript:alert(1)", None), ("https://ca.test/why", "https://ca.test/why")):
        desk.suggest(chain, window(now - 2 * DAY, now - DAY, explanationURL=link))
        said = desk.client.fetch_renewal_info(renewal_id_of(leaf))

        assert (said.explanation_url, said.window.end) == (shown, (now - DAY).replace(microsecond=0))
        assert choose_moment(said.window, leaf.validity, 0.99) <= leaf.validity.not_before + SECOND


def test_a_revoked_certificate_is_due(desk: Desk) -> None:
    """Its window is over, whenever it is asked about."""
    chain = desk.issue()
    certificate = x509.load_pem_x509_certificates(chain.encode())[0]
    desk.client.revoke(desk.account, certificate.public_bytes(Encoding.DER), reason=1)

    assert desk.client.fetch_renewal_info(renewal_id_of(read_leaf(chain))).window.end < datetime.now(UTC)


def test_a_certificate_is_replaced_once(desk: Desk) -> None:
    """The second time is refused with 409, and an order that does not say so goes through (RFC 9773 §5)."""
    old = issue_replaceable(desk)
    desk.issue(replaces=old)

    with pytest.raises(ProblemReported) as refused:
        desk.client.new_order(desk.account, ["a.test"], "default", old)
    assert (refused.value.problem.code, refused.value.problem.status) == ("alreadyReplaced", 409)
    assert drops_replaces(refused.value.problem)
    assert desk.client.new_order(desk.account, ["a.test"], "default").status is not OrderStatus.INVALID


def test_every_other_refusal_is_worth_an_order_without(desk: Desk) -> None:
    """Another account, no name in common, a certificate from before the CA was reset."""
    old = issue_replaceable(desk)
    stranger = register(desk.client, AccountKey.generate())
    refused = [refuse(desk, stranger, "a.test", old), refuse(desk, desk.account, "b.test", old)]
    desk.pebble.restart()
    refused.append(refuse(desk, register(desk.client, desk.account.key), "a.test", old))

    assert refused == [("unauthorized", 403), ("serverInternal", 500), ("malformed", 400)]
    with pytest.raises(ProblemReported, match="reading the renewal information"):
        desk.client.fetch_renewal_info(old)


def refuse(desk: Desk, account: Account, dns_name: str, replaces: str) -> tuple[str, int | None]:
    with pytest.raises(ProblemReported) as refused:
        desk.client.new_order(account, [dns_name], "default", replaces)
    assert drops_replaces(refused.value.problem)
    return refused.value.problem.code, refused.value.problem.status
