"""Asks one CA: one call is one look or one act (RFC 8555 §7, RFC 9773).

Nothing waits, polls or decides here. Every call returns what the CA said, or raises a CaError that
`problems.classify` turns into what to do next. Any number of threads may share a client.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from certworker.ca import jws, messages
from certworker.ca.headers import read_nonce
from certworker.ca.keys import AccountKey, base64url
from certworker.ca.messages import Directory
from certworker.ca.problems import Endpoint, read_problem
from certworker.ca.transport import ANSWER_LIMIT, Http, Response
from certworker.ca.urls import host_of
from certworker.core.order import Authorization, Challenge, Order
from certworker.core.renewal import RenewalInfo
from certworker.errors import AnswerFault, CaError, ProblemReported, ProfileNotOffered, TermsNotAgreed

Clock = Callable[[], datetime]

_NONCE_TRIES = 10
"""With half of all nonces refused, one request in a thousand still fails."""
_NONCES_KEPT = 64
"""More than there are requests at once; old nonces are the first that a CA forgets."""
_DIRECTORY_LIFETIME = timedelta(hours=1)
_CHAIN_LIMIT = 256 * 1024
_RENEWAL_INFO_LIMIT = 16 * 1024
"""Bytes; an honest answer has some two hundred."""
_JOSE = {"Content-Type": "application/jose+json"}
_MOVED = (404, 405)


@dataclass(frozen=True, slots=True)
class Account:
    """An account at a CA: where it is, and the key that proves it is ours (RFC 8555 §7.1.2)."""

    url: str
    key: AccountKey


@dataclass(frozen=True, slots=True)
class ExternalAccount:
    """What a CA gave to a customer so that an account can be bound to theirs (RFC 8555 §7.3.4)."""

    kid: str
    hmac_key: str = field(repr=False)
    """Base64url."""


class Client:
    """Speaks with the CA at `directory_url` over `transport`."""

    def __init__(self, directory_url: str, transport: Http, now: Clock) -> None:
        self.directory_url = directory_url
        self._http = transport
        self._now = now
        self._nonces: deque[str] = deque(maxlen=_NONCES_KEPT)
        self._directory: tuple[Directory, datetime] | None = None
        self._hosts: frozenset[tuple[str, int]] = frozenset()
        """That the directory was at, or has named."""

    # -- the CA itself ---------------------------------------------------------------------------------

    def directory(self) -> Directory:
        """Return what the CA offers; asked for once an hour (RFC 8555 §7.1.1)."""
        cached = self._directory
        # Threads that come at once all ask: in line they would wait for each other's time limits.
        return cached[0] if cached and self._now() < cached[1] else self.refresh_directory()

    def refresh_directory(self) -> Directory:
        """Ask what the CA offers, whatever is remembered: shows whether it answers at all."""
        with _asking(Endpoint.DIRECTORY):
            response = self._expect("reading the directory", self._http.request("GET", self.directory_url))
            directory = messages.read_directory(response)
        self._directory = directory, self._now() + _DIRECTORY_LIFETIME
        self._hosts = frozenset(map(host_of, (self.directory_url, *directory.urls)))
        return directory

    # -- accounts --------------------------------------------------------------------------------------

    def find_account(self, key: AccountKey) -> Account | None:
        """Return the account that this key has, None if it has none (RFC 8555 §7.3.1)."""
        try:
            response = self._create("finding the account", "new_account", {"onlyReturnExisting": True}, key)
        except ProblemReported as error:
            if error.problem.code == "accountDoesNotExist":
                return None
            raise
        return self._account(response, key)

    def new_account(
        self, key: AccountKey, contacts: Sequence[str], terms_agreed: bool, eab: ExternalAccount | None
    ) -> Account:
        """Return the account of this key, making it if there is none (RFC 8555 §7.3).

        `contacts` are URLs such as mailto:ops@example.com. Raises TermsNotAgreed, without asking the
        CA, if it has terms and nobody has agreed to them.
        """
        directory = self.directory()
        if directory.terms_of_service and not terms_agreed:
            raise TermsNotAgreed(directory.terms_of_service)
        payload: dict[str, Any] = {"termsOfServiceAgreed": terms_agreed, "contact": list(contacts)}
        if eab is not None:
            binding = jws.bind_external(key, url=directory.new_account, kid=eab.kid, hmac_key=eab.hmac_key)
            payload["externalAccountBinding"] = binding
        return self._account(self._create("making an account", "new_account", payload, key), key)

    def update_contacts(self, account: Account, contacts: Sequence[str]) -> None:
        """Replace the account's contact URLs (RFC 8555 §7.3.2)."""
        self._post("changing the account's contacts", account, account.url, {"contact": list(contacts)})

    def change_key(self, account: Account, new_key: AccountKey) -> Account:
        """Give the account another key (RFC 8555 §7.3.5).

        If no answer comes, `find_account` of the new key and then of the old says which one it has.
        """
        url = self.directory().key_change
        endorsed = jws.endorse_key(account.key, new_key, url=url, account_url=account.url)
        self._post("changing the account's key", account, url, endorsed)
        return Account(account.url, new_key)

    def deactivate_account(self, account: Account) -> None:
        """Give up the account for good (RFC 8555 §7.3.6)."""
        self._post("deactivating the account", account, account.url, {"status": "deactivated"})

    # -- orders ----------------------------------------------------------------------------------------

    def new_order(
        self, account: Account, dns_names: Collection[str], profile: str | None = None, replaces: str | None = None
    ) -> Order:
        """Order a certificate for these A-labels (RFC 8555 §7.4).

        Raises ProfileNotOffered, without asking the CA, for a profile that its directory does not
        list. `replaces` is the identifier of the certificate that this one renews (RFC 9773 §5).
        """
        offered = self.directory().profiles
        if profile is not None and profile not in offered:
            raise ProfileNotOffered(profile, offered)
        identifiers = [{"type": "dns", "value": name} for name in sorted(set(dns_names))]
        payload = {"identifiers": identifiers, "profile": profile, "replaces": replaces}
        given = {name: value for name, value in payload.items() if value is not None}
        return self._order(self._create("ordering a certificate", "new_order", given, account))

    def fetch_order(self, account: Account, url: str) -> Order:
        """Return where the order stands."""
        return self._order(self._look("reading the order", account, url), url)

    def fetch_authorization(self, account: Account, url: str) -> Authorization:
        """Return where the authorization stands, and its challenges."""
        response = self._look("reading the authorization", account, url)
        authorization = messages.read_authorization(response, self._now(), url)
        if (challenge := authorization.http01()) is not None:  # the others are never asked
            self._check_hosts(response, challenge.url)
        return authorization

    def answer_challenge(self, account: Account, url: str) -> Challenge:
        """Tell the CA that it may look now (RFC 8555 §7.5.1)."""
        response = self._post("answering the challenge", account, url, {})
        challenge = messages.read_challenge(response)
        self._check_hosts(response, challenge.url)
        return challenge

    def finalize(self, account: Account, finalize_url: str, csr_der: bytes, order_url: str) -> Order:
        """Ask for the certificate; the order is at `order_url`, which the answer may not repeat."""
        response = self._post("finalizing the order", account, finalize_url, {"csr": base64url(csr_der)})
        return self._order(response, order_url)

    def fetch_chain(self, account: Account, url: str) -> str:
        """Return the certificate and its chain as the CA sent them, in PEM (RFC 8555 §7.4.2)."""
        accept = {"Accept": "application/pem-certificate-chain"}
        return messages.read_chain(self._look("downloading the certificate", account, url, accept, _CHAIN_LIMIT))

    def revoke(self, account: Account, certificate_der: bytes, reason: int | None = None) -> None:
        """Revoke a certificate of this account's; one that is revoked already is fine (RFC 8555 §7.6).

        `reason` is a number of RFC 5280 §5.3.1, for example 1 for a key that has leaked.
        """
        payload: dict[str, Any] = {"certificate": base64url(certificate_der)}
        if reason is not None:
            payload["reason"] = reason
        try:
            self._create("revoking the certificate", "revoke_cert", payload, account)
        except ProblemReported as error:
            if error.problem.code != "alreadyRevoked":
                raise

    # -- renewal information ---------------------------------------------------------------------------

    def fetch_renewal_info(self, renewal_id: str) -> RenewalInfo:
        """Return when the CA wants a certificate of its own renewed; anybody may ask (RFC 9773 §4.1).

        AnswerFault when its directory offers no such information, as every other answer that is of no use.
        """
        base = self.directory().renewal_info
        if base is None:
            raise AnswerFault(self.directory_url, "it offers no renewalInfo")
        response = self._http.request("GET", f"{base}/{renewal_id}", max_bytes=_RENEWAL_INFO_LIMIT)
        return messages.read_renewal_info(self._expect("reading the renewal information", response), self._now())

    # -- answers ---------------------------------------------------------------------------------------

    def _account(self, response: Response, key: AccountKey) -> Account:
        url = messages.read_location(response)
        self._check_hosts(response, url)
        return Account(url, key)

    def _order(self, response: Response, url: str | None = None) -> Order:
        order = messages.read_order(response, self._now(), url)
        certificate_urls = [order.certificate_url] if order.certificate_url is not None else []
        self._check_hosts(response, order.url, order.finalize_url, *order.authorization_urls, *certificate_urls)
        return order

    def _check_hosts(self, response: Response, *urls: str) -> None:
        """Refuse to be led away: what we sign and send must not go to whatever host an answer names.

        A CA may use several hosts, and its directory is trusted to name them. The host that has just answered
        is one of them, also if the directory has moved on since.
        """
        here = host_of(response.url)
        for there in map(host_of, urls):
            if there != here and there not in self._hosts:
                host, port = there
                raise AnswerFault(
                    response.url, f"it leads to {host!a} port {port}, which the CA's directory does not name"
                )

    # -- requests --------------------------------------------------------------------------------------

    def _create(self, doing: str, resource: str, payload: Mapping[str, Any], signer: Account | AccountKey) -> Response:
        """Post to an address of the directory's; if it has moved, once more to where it is now."""
        url: str = getattr(self.directory(), resource)
        try:
            return self._post(doing, signer, url, payload)
        except ProblemReported as error:
            if error.problem.status not in _MOVED:
                raise
            moved: str = getattr(self.refresh_directory(), resource)
            if moved == url:
                raise
            return self._post(doing, signer, moved, payload)

    def _look(
        self,
        doing: str,
        account: Account,
        url: str,
        headers: Mapping[str, str] | None = None,
        max_bytes: int = ANSWER_LIMIT,
    ) -> Response:
        """POST-as-GET (RFC 8555 §6.3): changes nothing, so it may be sent twice."""
        return self._send(doing, account, url, b"", {**_JOSE, **(headers or {})}, max_bytes, repeatable=True)

    def _post(self, doing: str, signer: Account | AccountKey, url: str, payload: Mapping[str, Any]) -> Response:
        body = jws.print_json(payload).encode()
        return self._send(doing, signer, url, body, _JOSE, ANSWER_LIMIT, repeatable=False)

    def _send(
        self,
        doing: str,
        signer: Account | AccountKey,
        url: str,
        payload: bytes,
        headers: Mapping[str, str],
        max_bytes: int,
        *,
        repeatable: bool,
    ) -> Response:
        """Sign and post until the CA takes the nonce; a refusal brings the next one along (RFC 8555 §6.5)."""
        key, kid = (signer.key, signer.url) if isinstance(signer, Account) else (signer, None)
        nonce = self._take_nonce()
        for tries_left in range(_NONCE_TRIES - 1, -1, -1):
            body = jws.sign(key, payload, url=url, nonce=nonce, kid=kid)
            response = self._http.request("POST", url, body, headers, max_bytes=max_bytes, repeatable=repeatable)
            fresh = read_nonce(response.headers)
            try:
                answer = self._expect(doing, response)
            except ProblemReported as error:
                if error.problem.code == "badNonce" and tries_left:
                    nonce = fresh or self._fetch_nonce()
                    continue
                self._keep_nonce(fresh)
                raise
            self._keep_nonce(fresh)
            return answer
        raise AssertionError("unreachable: the last try returns or raises")

    def _expect(self, doing: str, response: Response) -> Response:
        """Return a good answer, or raise what the CA said instead."""
        if response.status >= 400:
            raise ProblemReported(doing, read_problem(response, self._now()))
        if not 200 <= response.status < 300:
            target = response.headers.get("location", "nowhere")[:200]
            raise AnswerFault(response.url, f"it redirects to {target!a}; check ACME_DIRECTORY_URL")
        return response

    def _take_nonce(self) -> str:
        try:
            return self._nonces.pop()
        except IndexError:
            return self._fetch_nonce()

    def _keep_nonce(self, nonce: str | None) -> None:
        if nonce is not None:
            self._nonces.append(nonce)

    def _fetch_nonce(self) -> str:
        """Ask for a nonce (RFC 8555 §7.2)."""
        url = self.directory().new_nonce
        with _asking(Endpoint.NEW_NONCE):
            nonce = read_nonce(self._expect("asking for a nonce", self._http.request("HEAD", url)).headers)
            if nonce is None:
                raise AnswerFault(url, "its Replay-Nonce is missing or not base64url; check proxies in between")
        return nonce


@contextmanager
def _asking(endpoint: Endpoint) -> Iterator[None]:
    """Let an error say that it came of what every act needs first."""
    try:
        yield
    except CaError as error:
        error.asked = endpoint
        raise
