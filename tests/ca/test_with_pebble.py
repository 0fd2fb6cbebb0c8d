"""The client and the transport against a real Pebble, with its defaults and its faults."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from certworker.ca.client import Account, Client, ExternalAccount
from certworker.ca.csr import make_csr, make_key, spki_sha256
from certworker.ca.keys import AccountKey
from certworker.ca.problems import Endpoint, classify
from certworker.ca.transport import Transport
from certworker.cli.pebble import Pebble
from certworker.core.order import AuthorizationStatus, ChallengeStatus, Order, OrderStatus
from certworker.core.retry import ErrorClass, classify_order
from certworker.errors import ProblemReported, ProfileNotOffered, TermsNotAgreed, TransportFault

pytestmark = pytest.mark.pebble
Respond = Callable[[int, AccountKey], None]
EAB_KEY = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W"


@contextmanager
def connect(pebble: Pebble) -> Iterator[tuple[Client, Transport]]:
    """A client with a transport of its own."""
    transport = Transport(pebble.ca_bundle)
    try:
        yield Client(pebble.directory_url, transport, lambda: datetime.now(UTC)), transport
    finally:
        transport.close()


def register(client: Client, key: AccountKey) -> Account:
    return client.new_account(key, ["mailto:ops@certworker.test"], terms_agreed=True, eab=None)


def answer_all(client: Client, account: Account, order: Order) -> None:
    """Tell the CA to look wherever it has not yet."""
    for url in order.authorization_urls:
        authorization = client.fetch_authorization(account, url)
        challenge = authorization.http01()
        if authorization.status is AuthorizationStatus.PENDING and challenge:
            assert challenge.status is ChallengeStatus.PENDING
            client.answer_challenge(account, challenge.url)


def look_until_settled(client: Client, account: Account, order: Order) -> Order:
    """Look again while nothing is decided."""
    ends_at = time.monotonic() + 60
    while order.status in (OrderStatus.PENDING, OrderStatus.PROCESSING):
        assert time.monotonic() < ends_at, f"the order stayed {order.status}"
        time.sleep(0.02)
        order = client.fetch_order(account, order.url)
    return order


def issue(client: Client, account: Account, *dns_names: str) -> str:
    """Go all the way from the names to a checked chain."""
    order = client.new_order(account, dns_names, profile="default")
    answer_all(client, account, order)
    order = look_until_settled(client, account, order)
    key = make_key("ecdsa-p256")
    order = client.finalize(account, order.finalize_url, make_csr(key, dns_names), order.url)
    order = look_until_settled(client, account, order)
    assert order.certificate_url is not None
    chain = client.fetch_chain(account, order.certificate_url)
    leaf = x509.load_pem_x509_certificates(chain.encode())[0]
    assert spki_sha256(leaf.public_key()) == spki_sha256(key.public_key())
    return chain


@pytest.mark.parametrize(("strict", "nonce_reject"), [(False, 5), (True, 5), (True, 50)])
def test_a_certificate_is_issued(respond: Respond, key: AccountKey, strict: bool, nonce_reject: int) -> None:
    """In both of Pebble's modes, with half of all nonces refused; one connection carries it all."""
    with Pebble(strict=strict, nonce_reject=nonce_reject) as pebble, connect(pebble) as (client, transport):
        respond(pebble.http_port, key)
        account = register(client, key)
        chain = issue(client, account, "a.test", "b.test")

        names = x509.load_pem_x509_certificates(chain.encode())[0].extensions
        san = names.get_extension_for_class(x509.SubjectAlternativeName).value
        assert set(san.get_values_for_type(x509.DNSName)) == {"a.test", "b.test"}
        assert len(pebble.ledger()) == transport.connections_opened == 1


def test_a_lone_name_costs_seven_requests(respond: Respond, key: AccountKey) -> None:
    """The least there is, plus what looking again costs."""
    with Pebble(nonce_reject=0, authz_reuse=0) as pebble, connect(pebble) as (client, _):
        respond(pebble.http_port, key)
        account = register(client, key)
        before = pebble.requests()
        issue(client, account, "a.test")
        asked = pebble.requests() - before

    assert {path: count for (_, path), count in asked.items() if not path.startswith("/my-order")} == {
        "/order-plz": 1,
        "/authZ/": 1,
        "/chalZ/": 1,
        "/finalize-order/": 1,
        "/certZ/": 1,
    }


@pytest.mark.parametrize("algorithm", ["P-384", "RSA"])
def test_keys_of_other_clients_work(algorithm: str) -> None:
    """ES384 and RS256 are verified by an implementation that is not ours."""
    private = make_key({"P-384": "ecdsa-p384", "RSA": "rsa-2048"}[algorithm])
    with Pebble(nonce_reject=0) as pebble, connect(pebble) as (client, _):
        account = register(client, AccountKey(private))

        assert client.find_account(account.key) == account


def test_an_account_changes_its_key(key: AccountKey) -> None:
    """To another algorithm, too; the old key is nobody's then."""
    with Pebble(strict=True) as pebble, connect(pebble) as (client, _):
        account = register(client, key)
        changed = client.change_key(account, AccountKey(make_key("ecdsa-p384")))

        assert client.find_account(changed.key) == changed
        assert client.find_account(key) is None


def test_racing_workers_share_an_account(key: AccountKey) -> None:
    """Eight at once with one key: the CA makes one account."""
    with Pebble() as pebble, connect(pebble) as (client, transport), ThreadPoolExecutor(8) as pool:
        assert client.find_account(key) is None
        accounts = set(pool.map(lambda _: register(client, key), range(8)))

        assert accounts == {client.find_account(key)}
        assert transport.connections_opened <= 8


def test_terms_come_first(key: AccountKey) -> None:
    """Pebble's are no URL, and are shown all the same."""
    with Pebble() as pebble, connect(pebble) as (client, _), pytest.raises(TermsNotAgreed, match="data:text/plain"):
        client.new_account(key, (), terms_agreed=False, eab=None)


def test_external_accounts_are_bound(key: AccountKey) -> None:
    """Without, with the wrong one, with the right one."""
    with Pebble(eab={"kid-1": EAB_KEY}) as pebble, connect(pebble) as (client, _):
        assert client.directory().external_account_required
        for eab, said in ((None, "externalAccountRequired"), (ExternalAccount("kid-2", EAB_KEY), "unauthorized")):
            with pytest.raises(ProblemReported, match=said) as caught:
                client.new_account(key, (), terms_agreed=True, eab=eab)
            assert classify(caught.value, Endpoint.NEW_ACCOUNT).error_class is ErrorClass.ACTION_REQUIRED

        eab = ExternalAccount("kid-1", EAB_KEY)
        assert client.new_account(key, (), terms_agreed=True, eab=eab) == client.find_account(key)


@pytest.mark.parametrize(
    ("contacts", "code"),
    [(["mailto:foo"], "invalidContact"), (["tel:+1"], "unsupportedContact"), (["mailto:a@b.test"] * 3, "malformed")],
)
def test_contacts_are_the_cas_to_judge(key: AccountKey, contacts: list[str], code: str) -> None:
    """Its own words come back."""
    with Pebble() as pebble, connect(pebble) as (client, _), pytest.raises(ProblemReported) as caught:
        client.new_account(key, contacts, terms_agreed=True, eab=None)

    assert caught.value.problem.code == code


def test_refusals_are_told_apart(key: AccountKey) -> None:
    """A blocked name, a profile, a request too early; nothing is asked that the directory rules out."""
    with Pebble(nonce_reject=0) as pebble, connect(pebble) as (client, _):
        account = register(client, key)
        with pytest.raises(ProblemReported) as caught:
            client.new_order(account, ["a.test", "x.blocked-domain.example"], "default")
        failure = classify(caught.value, Endpoint.NEW_ORDER)
        assert (failure.error_class, failure.type.rpartition(":")[2]) == (ErrorClass.PERMANENT, "rejectedIdentifier")
        assert "x.blocked-domain.example" in failure.hint

        with pytest.raises(ProfileNotOffered, match="it offers: default"):
            client.new_order(account, ["a.test"], "other")
        assert pebble.requests()["POST", "/order-plz"] == 1

        order = client.new_order(account, ["a.test"], "default")
        with pytest.raises(ProblemReported, match="orderNotReady"):
            client.finalize(account, order.finalize_url, make_csr(make_key("ecdsa-p256"), ["a.test"]), order.url)


def test_a_name_that_answers_wrongly_fails(respond: Respond, key: AccountKey) -> None:
    """The reason of the challenge is the reason of the order."""
    with Pebble() as pebble, connect(pebble) as (client, _):
        respond(pebble.http_port, AccountKey.generate())
        account = register(client, key)
        order = client.new_order(account, ["a.test"], "default")
        answer_all(client, account, order)
        order = look_until_settled(client, account, order)
        failure = classify_order(order, [client.fetch_authorization(account, u) for u in order.authorization_urls])

    assert order.status is OrderStatus.INVALID
    assert (failure.error_class, failure.type.rpartition(":")[2]) == (ErrorClass.VALIDATION, "unauthorized")
    assert "a.test" in failure.hint


def test_a_name_that_nobody_answers_for_fails(key: AccountKey) -> None:
    """Nobody listens on its port 80."""
    with Pebble() as pebble, connect(pebble) as (client, _):
        account = register(client, key)
        order = client.new_order(account, ["a.test"], "default")
        answer_all(client, account, order)
        order = look_until_settled(client, account, order)
        failure = classify_order(order, [client.fetch_authorization(account, u) for u in order.authorization_urls])

    assert (failure.error_class, failure.type.rpartition(":")[2]) == (ErrorClass.VALIDATION, "connection")


def test_a_deactivated_account_is_for_the_operator(key: AccountKey) -> None:
    """Whatever is asked, also for a new account with the key."""
    with Pebble() as pebble, connect(pebble) as (client, _):
        account = register(client, key)
        client.update_contacts(account, ["mailto:new@certworker.test"])
        client.deactivate_account(account)
        for ask, doing in (
            (lambda: client.new_order(account, ["a.test"], "default"), Endpoint.NEW_ORDER),
            (lambda: client.find_account(key), Endpoint.NEW_ACCOUNT),
        ):
            with pytest.raises(ProblemReported, match="deactivated") as caught:
                ask()
            assert classify(caught.value, doing).error_class is ErrorClass.ACTION_REQUIRED


def test_a_certificate_is_revoked_by_its_account(respond: Respond, key: AccountKey) -> None:
    """Twice is fine."""
    with Pebble() as pebble, connect(pebble) as (client, _):
        respond(pebble.http_port, key)
        account = register(client, key)
        leaf = x509.load_pem_x509_certificates(issue(client, account, "a.test").encode())[0]
        for _ in range(2):
            client.revoke(account, leaf.public_bytes(Encoding.DER), reason=4)

        assert b"Revoked" in pebble.management(f"/cert-status-by-serial/{leaf.serial_number:x}")


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Kolkata"])
def test_the_wait_is_right_in_every_zone(
    respond: Respond, key: AccountKey, zone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pebble sends half of them as dates."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        with Pebble(retry_after=(0, 5), nonce_reject=0) as pebble, connect(pebble) as (client, _):
            respond(pebble.http_port, key)
            account = register(client, key)
            waits = []
            for n in range(6):
                order = client.new_order(account, [f"a{n}.test"], "default")
                answer_all(client, account, order)
                order = look_until_settled(client, account, order)
                csr = make_csr(make_key("ecdsa-p256"), [f"a{n}.test"])
                waits.append(client.finalize(account, order.finalize_url, csr, order.url).retry_after)
    finally:
        monkeypatch.undo()
        time.tzset()

    assert {wait is not None and 3 <= wait.total_seconds() <= 5 for wait in waits} == {True}


def test_sixteen_threads_issue_at_once(respond: Respond, key: AccountKey) -> None:
    """On at most sixteen connections, with one account and one certificate for each order."""
    with Pebble() as pebble, connect(pebble) as (client, transport), ThreadPoolExecutor(16) as pool:
        respond(pebble.http_port, key)
        account = register(client, key)
        chains = list(pool.map(lambda n: issue(client, account, f"n{n}.test"), range(64)))

        assert len(set(chains)) == len(pebble.ledger()) == 64
        assert transport.connections_opened <= 17


def test_a_restarted_ca_has_forgotten_us(respond: Respond, key: AccountKey) -> None:
    """Account and orders are gone; the kept connection is replaced; the same key can register again."""
    with Pebble(nonce_reject=0) as pebble, connect(pebble) as (client, transport):
        respond(pebble.http_port, key)
        account = register(client, key)
        order = client.new_order(account, ["a.test"], "default")
        pebble.restart()

        with pytest.raises(ProblemReported) as caught:
            client.fetch_order(account, order.url)
        assert caught.value.problem.code == "accountDoesNotExist"
        assert client.find_account(key) is None

        account = register(client, key)
        with pytest.raises(ProblemReported) as caught:
            client.fetch_order(account, order.url)
        assert classify(caught.value, Endpoint.ORDER).type == "certworker:order-lost"
        issue(client, account, "a.test")
        assert transport.connections_opened == 2


def test_a_ca_that_is_down_is_refused_at_once() -> None:
    """Also on a connection that was kept."""
    with Pebble() as pebble, connect(pebble) as (_, transport):
        transport.request("GET", pebble.directory_url)
        pebble.__exit__(None, None, None)

        with pytest.raises(TransportFault) as caught:
            transport.request("GET", pebble.directory_url)

    assert caught.value.kind == "connect"


def test_pebble_is_not_trusted_by_the_system() -> None:
    """Without ACME_CA_BUNDLE there is no connection, and the message names it."""
    with Pebble() as pebble, pytest.raises(TransportFault, match="set ACME_CA_BUNDLE") as caught:
        Transport().request("GET", pebble.directory_url)

    assert classify(caught.value, Endpoint.DIRECTORY).type == "certworker:ca-tls"
