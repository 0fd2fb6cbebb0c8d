"""The client against the fake CA: what is sent, what comes back, what is raised."""

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from certworker.ca.client import Account, Client, ExternalAccount
from certworker.ca.csr import make_csr, make_key, spki_sha256
from certworker.ca.keys import AccountKey
from certworker.ca.transport import Response
from certworker.core.order import AuthorizationStatus, ChallengeStatus, Order, OrderStatus
from certworker.core.renewal import Window, drops_replaces
from certworker.errors import (
    AnswerFault,
    CaError,
    InputError,
    ProblemReported,
    ProfileNotOffered,
    TermsNotAgreed,
    TransportFault,
)

from .conftest import NOW
from .fake import FakeCa
from .fake_state import Issued

NAMES = ("b.test", "a.test")


def make_ready(client: Client, account: Account, names: tuple[str, ...] = NAMES) -> Order:
    """Order, and answer what there is to answer."""
    order = client.new_order(account, names)
    for url in order.authorization_urls:
        challenge = client.fetch_authorization(account, url).http01()
        assert challenge is not None
        client.answer_challenge(account, challenge.url)
    return client.fetch_order(account, order.url)


def test_a_certificate_comes_of_seven_requests(ca: FakeCa, client: Client, account: Account) -> None:
    """Order, authorization, challenge, order, finalize, order, download: nothing more is asked for one name."""
    before = len(ca.requests)
    order = make_ready(client, account, ("a.test",))
    key = make_key("ecdsa-p256")
    order = client.finalize(account, order.finalize_url, make_csr(key, ["a.test"]), order.url)
    assert order.status is OrderStatus.PROCESSING
    order = client.fetch_order(account, order.url)
    assert order.certificate_url is not None
    chain = client.fetch_chain(account, order.certificate_url)

    assert len(ca.requests) - before == 7
    leaf, intermediate = x509.load_pem_x509_certificates(chain.encode())
    leaf.verify_directly_issued_by(intermediate)
    assert spki_sha256(leaf.public_key()) == spki_sha256(key.public_key())
    assert [line.serial for line in ca.issued] == [leaf.serial_number]


def test_an_order_knows_its_urls(client: Client, account: Account) -> None:
    """An answer without Location, as Pebble gives to finalize, still makes an order with its URL."""
    order = make_ready(client, account)
    final = client.finalize(account, order.finalize_url, make_csr(make_key("ecdsa-p256"), NAMES), order.url)

    assert final.url == order.url
    assert final.dns_names == order.dns_names == {"a.test", "b.test"}


def test_the_answer_to_a_challenge_is_an_empty_object(ca: FakeCa, client: Client, account: Account) -> None:
    """RFC 8555 §7.5.1 has nothing in it, and Pebble's strict mode holds us to that."""
    make_ready(client, account, ("a.test",))

    assert [seen.payload for seen in ca.requests if seen.path.startswith("/challenge/")] == [{}]


@pytest.mark.parametrize(("when", "status"), [("answer", ChallengeStatus.VALID), ("look", ChallengeStatus.PROCESSING)])
def test_the_ca_looks_when_it_likes(ca: FakeCa, client: Client, account: Account, when: str, status: str) -> None:
    """An answered challenge may be valid at once or only at the next look."""
    ca.validate_on = when  # type: ignore[assignment]
    url = client.new_order(account, ["a.test"]).authorization_urls[0]
    challenge = client.fetch_authorization(account, url).http01()
    assert challenge is not None

    assert client.answer_challenge(account, challenge.url).status == status
    assert client.fetch_authorization(account, url).status is AuthorizationStatus.VALID


# -- accounts -------------------------------------------------------------------------------------------


def test_a_key_has_one_account(ca: FakeCa, client: Client, key: AccountKey) -> None:
    """Asking again for an account finds the same one, so a lost answer costs nothing."""
    assert client.find_account(key) is None
    account = client.new_account(key, ["mailto:ops@example.com"], terms_agreed=True, eab=None)

    assert client.find_account(key) == account
    assert client.new_account(key, (), terms_agreed=True, eab=None) == account
    assert len(ca.accounts) == 1


def test_terms_are_agreed_to_by_people(ca: FakeCa, client: Client, key: AccountKey) -> None:
    """Without consent the terms are named and the CA is not asked."""
    ca.terms = "https://ca.test/terms"

    with pytest.raises(TermsNotAgreed, match=r"https://ca\.test/terms.*ACME_TOS_AGREED"):
        client.new_account(key, (), terms_agreed=False, eab=None)
    assert ca.count("POST", "*") == 0


def test_an_external_account_is_bound(ca: FakeCa, client: Client, key: AccountKey) -> None:
    """The binding verifies with the key that the CA gave out, and with no other."""
    ca.eab_keys = {"kid-1": b"0" * 32}
    wrong, right = ("MTEx" * 11)[:43], ("MDAw" * 11)[:43]

    with pytest.raises(ProblemReported, match="externalAccountRequired"):
        client.new_account(key, (), terms_agreed=True, eab=None)
    with pytest.raises(ProblemReported, match="unauthorized"):
        client.new_account(key, (), terms_agreed=True, eab=ExternalAccount("kid-1", wrong))
    assert client.new_account(key, (), terms_agreed=True, eab=ExternalAccount("kid-1", right)).url in ca.accounts


def test_a_broken_eab_key_is_not_repeated(client: Client, key: AccountKey) -> None:
    """A person gave it, so the setting is named; it is a secret, so its value is not."""
    eab = ExternalAccount("kid-1", "secrét!")

    with pytest.raises(InputError, match="ACME_EAB_HMAC_KEY") as caught:
        client.new_account(key, (), terms_agreed=True, eab=eab)
    assert "secr" not in str(caught.value) + repr(eab)


def test_a_deactivated_account_is_refused(client: Client, account: Account) -> None:
    """Every later request says so, also one for a new account with the same key."""
    client.deactivate_account(account)

    for ask in (lambda: client.new_order(account, ["a.test"]), lambda: client.find_account(account.key)):
        with pytest.raises(ProblemReported, match="deactivated"):
            ask()


def test_contacts_can_be_changed(ca: FakeCa, client: Client, account: Account) -> None:
    """RFC 8555 §7.3.2."""
    client.update_contacts(account, ["mailto:new@example.com"])

    assert ca.accounts[account.url].contact == ["mailto:new@example.com"]


def test_an_account_changes_its_key(client: Client, account: Account) -> None:
    """The new key has the account, the old one has none, and a key that has one cannot take another."""
    other = client.new_account(AccountKey.generate(), (), terms_agreed=True, eab=None)
    changed = client.change_key(account, AccountKey(make_key("ecdsa-p384")))

    assert client.find_account(changed.key) == changed
    assert (changed.url, client.find_account(account.key)) == (account.url, None)
    with pytest.raises(ProblemReported, match="conflict"):
        client.change_key(changed, other.key)


def test_a_valid_authorization_may_be_reused(ca: FakeCa, client: Client, account: Account) -> None:
    """Then the order is ready from the start, and there is nothing to answer."""
    ca.reuse_authorizations = True
    make_ready(client, account)

    assert client.new_order(account, NAMES).status is OrderStatus.READY


# -- nonces ---------------------------------------------------------------------------------------------


def test_every_answer_feeds_the_nonces(ca: FakeCa, client: Client, account: Account) -> None:
    """One newNonce in the life of a client: error answers bring nonces too."""
    for _ in range(3):
        client.new_order(account, ["a.test"])
        with pytest.raises(ProblemReported):
            client.fetch_order(account, "https://ca.test/order/none")

    assert ca.count("HEAD", "/new-nonce") == 1


def test_a_refused_nonce_is_followed_by_the_one_that_came_with_it(ca: FakeCa, client: Client, account: Account) -> None:
    """Nine refusals are not seen by the caller and cost no newNonce (RFC 8555 §6.5)."""
    ca.fail_next("POST", "/new-order", problem="badNonce", times=9)

    assert client.new_order(account, ["a.test"]).status is OrderStatus.PENDING
    assert ca.count("HEAD", "/new-nonce") == 1


def test_a_ca_that_refuses_every_nonce_is_given_up(ca: FakeCa, client: Client, account: Account) -> None:
    """Ten tries, then the caller decides."""
    ca.fail_next("POST", "/new-order", problem="badNonce", times=100)

    with pytest.raises(ProblemReported, match="badNonce"):
        client.new_order(account, ["a.test"])
    assert ca.count("POST", "/new-order") == 10


@pytest.mark.parametrize("nonce", ["", "a b", "ä", "x" * 2000, "A", "=="])
def test_an_unusable_nonce_is_as_good_as_none(ca: FakeCa, client: Client, account: Account, nonce: str) -> None:
    """It is dropped, and the next request asks for a new one (RFC 8555 §6.5.1)."""
    ca.fail_next("POST", "/new-order", problem="malformed", headers={"replay-nonce": nonce})
    with pytest.raises(ProblemReported, match="malformed"):
        client.new_order(account, ["a.test"])

    client.new_order(account, ["a.test"])
    assert ca.count("HEAD", "/new-nonce") == 2


def test_a_ca_without_nonces_is_unusable(ca: FakeCa, client: Client, key: AccountKey) -> None:
    """A proxy that drops Replay-Nonce is named as what to look for."""
    ca.fail_next("HEAD", "/new-nonce", status=200, body=b"", headers={"replay-nonce": ""})

    with pytest.raises(AnswerFault, match="check proxies"):
        client.find_account(key)


# -- directory ------------------------------------------------------------------------------------------


def test_the_directory_is_read_once_an_hour(ca: FakeCa) -> None:
    """And again when the hour is over: endpoints and profiles may change."""
    now = NOW
    client = Client(ca.directory_url, ca.http, lambda: now)
    for passed, reads in ((timedelta(0), 1), (timedelta(minutes=59), 1), (timedelta(minutes=60), 2)):
        now = NOW + passed
        client.directory()

        assert ca.count("GET", "/directory") == reads


def test_the_directory_is_asked_for_whatever_is_remembered(ca: FakeCa, client: Client) -> None:
    """A probe wants to know whether the CA answers now; what it says is remembered for an hour again."""
    client.directory()
    ca.profiles = {"short": timedelta(days=6)}

    assert set(client.refresh_directory().profiles) == set(client.directory().profiles) == {"short"}
    assert ca.count("GET", "/directory") == 2


@pytest.mark.parametrize("status", [404, 405])
def test_a_moved_endpoint_is_looked_up_again(ca: FakeCa, key: AccountKey, status: int) -> None:
    """A request that was refused where it used to go is sent to where the directory says now."""
    moving = Moving(ca, status)
    client = Client(ca.directory_url, moving, ca.now)

    assert client.new_account(key, (), terms_agreed=True, eab=None).url in ca.accounts


def test_an_endpoint_that_has_not_moved_is_asked_once(ca: FakeCa, client: Client, account: Account) -> None:
    """A refusal that the directory does not explain is the caller's."""
    ca.fail_next("POST", "/new-order", problem="malformed", status=404)

    with pytest.raises(ProblemReported, match="malformed"):
        client.new_order(account, ["a.test"])
    assert ca.count("POST", "/new-order") == 1


class Moving:
    """A CA whose first directory names a newAccount that is not there any more."""

    def __init__(self, ca: FakeCa, status: int) -> None:
        self._ca = ca
        self._reads = 0
        ca.fail_next("POST", "/old-account", problem="malformed", status=status)

    def request(self, method, url, body=None, headers=None, **more):  # type: ignore[no-untyped-def]
        response = self._ca.request(method, url, body, headers, **more)
        if method == "GET" and url.endswith("/directory"):
            self._reads += 1
            if self._reads == 1:
                old = response.body.replace(b"new-account", b"old-account")
                return type(response)(response.url, response.status, response.headers, old)
        return response


@pytest.mark.parametrize(
    "body", [b"<html>log in</html>", b"", b"null", b"[]", b"{}", b'{"newNonce": 5}', b"[" * 90_000]
)
def test_a_directory_that_is_none_is_unusable(ca: FakeCa, client: Client, body: bytes) -> None:
    """A captive portal's page, and whatever else may come with status 200."""
    ca.fail_next("GET", "/directory", status=200, body=body)

    with pytest.raises(AnswerFault, match=r"https://ca\.test/directory"):
        client.directory()


def test_a_redirected_directory_names_its_new_place(ca: FakeCa, client: Client) -> None:
    """The transport follows what is safe to follow; the rest is for a person."""
    ca.fail_next("GET", "/directory", status=302, body=b"", headers={"location": "https://other.test/"})

    with pytest.raises(AnswerFault, match=r"redirects to 'https://other\.test/'; check ACME_DIRECTORY_URL"):
        client.directory()


# -- orders that are refused ----------------------------------------------------------------------------


def test_a_profile_must_be_offered(ca: FakeCa, client: Client, account: Account) -> None:
    """One that is not listed is refused before the CA is asked, and what is offered is named."""
    ca.profiles = {"short": timedelta(days=6), "long": timedelta(days=90)}
    other = Client(ca.directory_url, ca.http, ca.now)

    with pytest.raises(ProfileNotOffered, match=r"'tiny'.*long, short"):
        other.new_order(account, ["a.test"], profile="tiny")
    assert ca.count("POST", "/new-order") == 0
    assert other.new_order(account, ["a.test"], profile="short").profile == "short"


def test_an_order_may_say_what_it_replaces(ca: FakeCa, client: Client, account: Account) -> None:
    """RFC 9773 §5; a second replacement of the same certificate is refused with its own code."""
    old = issue(ca, client, account)
    order = client.new_order(account, NAMES, replaces=old.renewal_id)
    assert ca.orders[order.url].replaces == old.renewal_id
    make_csr_and_finalize(client, account, order)

    with pytest.raises(ProblemReported) as caught:
        client.new_order(account, NAMES, replaces=old.renewal_id)
    assert (caught.value.problem.code, caught.value.problem.status) == ("alreadyReplaced", 409)


def test_a_ca_may_hold_an_order_for_a_replacement(ca: FakeCa, client: Client, account: Account) -> None:
    """Boulder refuses the second order although the first has led to nothing yet, until that one is invalid."""
    ca.replaced_by = "order"
    old = issue(ca, client, account)
    order = client.new_order(account, NAMES, replaces=old.renewal_id)

    with pytest.raises(ProblemReported, match="alreadyReplaced"):
        client.new_order(account, NAMES, replaces=old.renewal_id)
    ca.authorizations[order.authorization_urls[0]].status = "deactivated"
    client.fetch_order(account, order.url)
    assert client.new_order(account, NAMES, replaces=old.renewal_id).status is OrderStatus.PENDING


def test_what_cannot_be_replaced_is_refused(ca: FakeCa, client: Client, account: Account) -> None:
    """Another account's, one without a name in common, one from before the CA was reset: all worth an order without."""
    old = issue(ca, client, account)
    stranger = client.new_account(AccountKey.generate(), (), terms_agreed=True, eab=None)
    asked = [(stranger, NAMES, old.renewal_id), (account, ("c.test",), old.renewal_id), (account, NAMES, "AAAA.AQ")]
    refused = []
    for who, names, replaces in asked:
        with pytest.raises(ProblemReported) as caught:
            client.new_order(who, names, replaces=replaces)
        refused.append(caught.value.problem)

    assert [problem.code for problem in refused] == ["unauthorized", "serverInternal", "malformed"]
    assert all(drops_replaces(problem) for problem in refused)


def test_a_refused_name_is_told_apart(ca: FakeCa, client: Client, account: Account) -> None:
    """Subproblems say which of the names it was."""
    ca.refused_names = frozenset({"bad.test"})

    with pytest.raises(ProblemReported) as caught:
        client.new_order(account, ["a.test", "bad.test"])
    assert [problem.identifier for problem in caught.value.problem.subproblems] == ["bad.test"]


def test_a_lost_finalize_is_found_again(ca: FakeCa, client: Client, account: Account) -> None:
    """The CA did it although no answer came; reading the order says so, and one certificate exists."""
    order = make_ready(client, account)
    ca.fail_next("POST", "/finalize/*", raises=TransportFault("reset", order.finalize_url, "gone"), after=True)
    with pytest.raises(TransportFault):
        client.finalize(account, order.finalize_url, make_csr(make_key("ecdsa-p256"), NAMES), order.url)

    assert client.fetch_order(account, order.url).status in (OrderStatus.PROCESSING, OrderStatus.VALID)
    assert len(ca.issued) == 1


def test_a_finalize_too_early_is_refused(client: Client, account: Account) -> None:
    """RFC 8555 §7.4: 403 orderNotReady."""
    order = client.new_order(account, NAMES)

    with pytest.raises(ProblemReported, match="orderNotReady"):
        client.finalize(account, order.finalize_url, make_csr(make_key("ecdsa-p256"), NAMES), order.url)


def test_a_deactivated_authorization_spoils_its_order(ca: FakeCa, client: Client, account: Account) -> None:
    """RFC 8555 §7.1.6."""
    order = client.new_order(account, NAMES)
    ca.authorizations[order.authorization_urls[0]].status = "deactivated"

    assert client.fetch_order(account, order.url).status is OrderStatus.INVALID


class Bent:
    """The way to a CA whose answers name other addresses: from each path one text for another."""

    def __init__(self, ca: FakeCa, **changes: tuple[str, str]) -> None:
        self._ca = ca
        self._changes = changes
        self.hosts: set[str] = set()

    def request(self, method: str, url: str, *rest: Any, **more: Any) -> Response:
        self.hosts.add(urlsplit(url).netloc)
        answer = self._ca.request(method, url, *rest, **more)
        room = urlsplit(url).path.split("/")[1].replace("-", "_")
        old, new = self._changes.get(room, ("", ""))
        headers = {name: value.replace(old, new) for name, value in answer.headers.items()}
        return Response(url, answer.status, headers, answer.body.replace(old.encode(), new.encode()))


LED_AWAY = [
    ("new_account", "https://ca.test/account"), ("new_order", "https://ca.test/order"),
    ("new_order", "https://ca.test/finalize"), ("new_order", "https://ca.test/authorization"),
    ("authorization", "https://ca.test/challenge"), ("challenge", "https://ca.test/challenge"),
    ("order", "https://ca.test/finalize"), ("finalize", "https://ca.test/certificate"),
]  # fmt: skip


@pytest.mark.parametrize("host", ["https://other.test/", "https://ca.test:8443/", "https://ca.test.evil.test/"])
@pytest.mark.parametrize(("room", "address"), LED_AWAY)
def test_an_answer_leads_to_no_host_that_the_directory_does_not_name(
    ca: FakeCa, key: AccountKey, room: str, address: str, host: str
) -> None:
    """Port and all; the message says who was asked, and where it leads."""
    ca.processing_looks = 0
    bent = Bent(ca, **{room: (address, address.replace("https://ca.test/", host))})
    client = Client(ca.directory_url, bent, ca.now)

    with pytest.raises(AnswerFault, match="does not name") as refused:
        issue(ca, client, client.new_account(key, (), terms_agreed=True, eab=None))
    assert str(urlsplit(host).hostname) in str(refused.value)
    assert bent.hosts == {"ca.test"}


def test_a_ca_may_use_several_hosts(ca: FakeCa, key: AccountKey) -> None:
    """Those that its directory names, also in upper case or with the port that is meant anyway."""
    bent = Bent(
        ca,
        directory=("https://ca.test/new-order", "https://other.test/new-order"),
        new_order=("https://ca.test/finalize", "https://OTHER.test:443/finalize"),
    )
    client = Client(ca.directory_url, bent, ca.now)
    account = client.new_account(key, (), terms_agreed=True, eab=None)

    assert client.new_order(account, NAMES).finalize_url.startswith("https://OTHER.test:443/")


def test_an_open_order_stays_where_it_is(ca: FakeCa, key: AccountKey) -> None:
    """A directory that has moved to another host does not cut off what was begun at the old one."""
    before = Client(ca.directory_url, ca.http, ca.now)
    account = before.new_account(key, (), terms_agreed=True, eab=None)
    order = before.new_order(account, NAMES)
    bent = Bent(ca, directory=("https://ca.test/", "https://other.test/"))

    after = Client("https://other.test/directory", bent, ca.now).fetch_order(account, order.url)
    assert after.finalize_url == order.finalize_url


@pytest.mark.parametrize("body", [b"", b"<html>", b"\xff\xfe", b'{"status": "valid"}'])
def test_a_chain_without_certificates_is_unusable(ca: FakeCa, client: Client, account: Account, body: bytes) -> None:
    """What cannot be a chain never gets as far as being checked as one."""
    ca.fail_next("POST", "/certificate/*", status=200, body=body)

    with pytest.raises(AnswerFault, match="no PEM"):
        client.fetch_chain(account, "https://ca.test/certificate/x")


def test_revoking_twice_is_fine(ca: FakeCa, client: Client, account: Account) -> None:
    """What was wanted is so."""
    line = issue(ca, client, account)
    for _ in range(2):
        client.revoke(account, line.certificate.public_bytes(Encoding.DER), reason=1)

    assert ca.revoked == {line.serial}


# -- renewal information --------------------------------------------------------------------------------


def test_anybody_may_ask_when_to_renew(ca: FakeCa, client: Client, account: Account) -> None:
    """One GET, signed by nobody, answered with window, link and wait (RFC 9773 §4.1)."""
    old = issue(ca, client, account)
    start = NOW + timedelta(days=50)
    ca.renewal_windows[old.renewal_id] = (start, start + timedelta(days=2))
    ca.explanation_url = "https://ca.test/why"
    said = client.fetch_renewal_info(old.renewal_id)

    assert said.window == Window(start, start + timedelta(days=2))
    assert (said.explanation_url, said.retry_after) == ("https://ca.test/why", timedelta(hours=6))
    assert ca.count("GET", f"/renewal-info/{old.renewal_id}") == 1


def test_a_ca_that_does_not_inform_is_not_asked(ca: FakeCa, client: Client) -> None:
    """Only what the directory offers has an address."""
    ca.informs = False

    with pytest.raises(AnswerFault, match="offers no renewalInfo"):
        client.fetch_renewal_info("AAAA.AQ")
    assert ca.count("GET", "/renewal-info/*") == 0


@pytest.mark.parametrize("body", [b"", b"garbage", b"{}", b"null", b"[" * 9000, b'{"suggestedWindow": {}}', b"\xff"])
def test_renewal_information_that_is_none_is_refused(ca: FakeCa, client: Client, body: bytes) -> None:
    """The address that said it is named."""
    ca.fail_next("GET", "/renewal-info/*", status=200, body=body)

    with pytest.raises(AnswerFault, match=r"https://ca\.test/renewal-info/AAAA\.AQ"):
        client.fetch_renewal_info("AAAA.AQ")


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
def test_a_refusal_to_inform_keeps_its_wait(ca: FakeCa, client: Client, status: int) -> None:
    """A busy CA may say until when."""
    ca.fail_next("GET", "/renewal-info/*", problem="serverInternal", status=status, headers={"retry-after": "77"})

    with pytest.raises(ProblemReported, match="reading the renewal information") as caught:
        client.fetch_renewal_info("AAAA.AQ")
    assert (caught.value.problem.status, caught.value.problem.retry_after) == (status, timedelta(seconds=77))


# -- threads and secrets --------------------------------------------------------------------------------


def test_threads_may_share_a_client(ca: FakeCa, client: Client, account: Account) -> None:
    """Sixteen at once: nobody loses a nonce to another."""
    with ThreadPoolExecutor(16) as pool:
        orders = list(pool.map(lambda n: make_ready(client, account, (f"n{n}.test",)), range(64)))

    assert {order.status for order in orders} == {OrderStatus.READY}
    assert all(seen.method != "GET" or seen.path == "/directory" for seen in ca.requests)


def test_one_key_asked_for_by_many_threads_has_one_account(ca: FakeCa, client: Client, key: AccountKey) -> None:
    """They all get the same URL."""
    with ThreadPoolExecutor(8) as pool:
        accounts = set(pool.map(lambda _: client.new_account(key, (), terms_agreed=True, eab=None), range(8)))

    assert len(accounts) == len(ca.accounts) == 1


def test_nothing_secret_is_in_a_repr(client: Client, account: Account) -> None:
    """Keys and tokens stay out of logs and tracebacks."""
    url = client.new_order(account, ["a.test"]).authorization_urls[0]
    authorization = client.fetch_authorization(account, url)
    challenge = authorization.http01()
    assert challenge is not None
    shown = repr((authorization, account, account.key))

    assert challenge.token not in shown
    assert account.key.thumbprint not in shown


def test_another_key_cannot_sign_for_an_account(client: Client, account: Account) -> None:
    """The fake's own proof: it verifies what is signed."""
    forged = Account(account.url, AccountKey.generate())

    with pytest.raises(CaError, match="does not verify"):
        client.new_order(forged, ["a.test"])


def issue(ca: FakeCa, client: Client, account: Account) -> Issued:
    """Issue a certificate for NAMES and return its line in the ledger."""
    make_csr_and_finalize(client, account, make_ready(client, account))
    return ca.issued[-1]


def make_csr_and_finalize(client: Client, account: Account, order: Order) -> None:
    """Answer what is still open, and finalize."""
    for url in order.authorization_urls:
        challenge = client.fetch_authorization(account, url).http01()
        if challenge and challenge.status is ChallengeStatus.PENDING:
            client.answer_challenge(account, challenge.url)
    client.finalize(account, order.finalize_url, make_csr(make_key("ecdsa-p256"), NAMES), order.url)


def is_utc(at: datetime | None) -> bool:
    """Say whether an instant is aware and in UTC."""
    return at is not None and at.utcoffset() == timedelta(0)


def test_times_are_utc(client: Client, account: Account) -> None:
    """Whatever the zone of this machine."""
    order = client.new_order(account, ["a.test"])

    assert is_utc(order.expires_at)
    assert is_utc(client.fetch_authorization(account, order.authorization_urls[0]).expires_at)
