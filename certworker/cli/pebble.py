"""Pebble and its DNS stand-in on loopback: the CA of `certworker demo` and of the tests.

`pebble` is Let's Encrypt's test CA (RFC 8555, RFC 9773); `pebble-challtestsrv` answers its DNS
questions, here with 127.0.0.1 for every name. Nothing of them is reachable from another machine.
Their binaries come from `make setup`, or from the environment variables PEBBLE and CHALLTESTSRV.
"""

import base64
import http.client
import ipaddress
import json
import os
import re
import secrets
import shutil
import socket
import ssl
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, NamedTuple, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from certworker.errors import CertworkerError, UsageError

HOST = "127.0.0.1"
CHECKOUT_TOOLS = Path(__file__).resolve().parents[2] / ".tools" / "bin"
START_LIMIT = timedelta(seconds=15)
STOP_LIMIT = timedelta(seconds=5)
ANSWER_LIMIT = timedelta(seconds=5)
USER_AGENT = "certworker-pebble"
"""Pebble refuses a request that names no user agent."""
NINETY_DAYS = {"description": "90 days", "validityPeriod": 90 * 86400}

_ISSUED = re.compile(r"Issued certificate serial (\S+) for order (\S+)")
_REQUEST = re.compile(r"([A-Z]+) (\S+) -> calling handler\(\)")


class Issued(NamedTuple):
    """One line of the CA's ledger."""

    serial: str
    """Hexadecimal, as Pebble prints it."""
    order: str


@dataclass(kw_only=True, eq=False)
class Pebble:
    """A running Pebble, between `__enter__` and `__exit__`; the fields say how it behaves.

    The defaults are Pebble's own, save that it does not sleep before a validation.
    """

    strict: bool = False
    nonce_reject: int = 5
    """Percent of good nonces that are refused."""
    authz_reuse: int = 50
    """Percent of orders that get a valid authorization again; 0 still leaves 1."""
    va_sleep: int | None = 0
    """A validation waits a random 0 to n - 1 seconds; 0 is no wait, None is Pebble's own 5."""
    retry_after: tuple[int, int] = (0, 0)
    """Seconds in Retry-After of authorizations and orders, half of them sent as a date; 0 sends none."""
    profiles: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"default": NINETY_DAYS})
    """Pebble picks one at random for an order that names none."""
    blocklist: Sequence[str] = ("blocked-domain.example",)
    eab: Mapping[str, str] = field(default_factory=dict)
    """External account keys, base64url, by key id; any makes a binding compulsory."""
    key_algorithm: str = "ecdsa"
    alternate_roots: int = 0
    chain_length: int = 1
    """Number of intermediates."""
    http_port: int = 0
    """Where HTTP-01 is fetched, and `tls_port` likewise; 0 picks a free port."""
    tls_port: int = 0
    workdir: Path | None = None
    """Configuration, TLS files and logs; a folder that is given is kept, else a temporary one is removed."""
    gomaxprocs: int | None = 1
    """Pebble 2.10 can deadlock: reading an authorization holds it and wants the store, newOrder holds
    the store and wants every authorization, a writer waits between them. With Go's default of one
    thread a core that is once in some 2,000 certificates, with one thread once in 100,000."""

    def __post_init__(self) -> None:
        ports = free_ports(6)
        self._acme_port, self._management_port, self._dns_port, self._challtest_port = ports[:4]
        self.http_port = self.http_port or ports[4]
        self.tls_port = self.tls_port or ports[5]
        self.directory_url = f"https://{HOST}:{self._acme_port}/dir"
        self.dns_address = f"{HOST}:{self._dns_port}"

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self.workdir is None:
                folder = Path(stack.enter_context(TemporaryDirectory(prefix="pebble-")))
            else:
                folder = self.workdir.resolve()
                folder.mkdir(parents=True, exist_ok=True)
            self.ca_bundle, key = make_listener_certificate(folder)
            self._trust = ssl.create_default_context(cafile=str(self.ca_bundle))
            self._config = folder / "pebble.json"
            self._config.write_text(json.dumps({"pebble": self._settings(key)}, indent=2))
            self.log_path = folder / "pebble.log"
            self.log_path.write_bytes(b"")
            self._processes: dict[str, subprocess.Popen[bytes]] = {}
            stack.callback(self._stop, "pebble", "pebble-challtestsrv")
            self._start_challtestsrv(folder / "challtestsrv.log")
            self._start_pebble()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def restart(self) -> None:
        """Stop Pebble and start it on the same ports: a CA with a new root that forgot everything.

        The ledger and the request counts go on, they are of both lives.
        """
        self._stop("pebble")
        self._start_pebble()

    def ledger(self) -> list[Issued]:
        """Return every certificate that Pebble issued, in order: what the CA itself says."""
        return [Issued(*found) for found in _ISSUED.findall(self._log())]

    def requests(self) -> Counter[tuple[str, str]]:
        """Count the requests so far by method and route, such as ("POST", "/order-plz")."""
        return Counter(_REQUEST.findall(self._log()))

    def directory(self) -> dict[str, Any]:
        """Return the directory (RFC 8555 §7.1.1)."""
        return dict(json.loads(_ask(self._acme_port, "/dir", trust=self._trust)))

    def root_pem(self, index: int = 0) -> str:
        """Return a root that issued certificates lead to; a restart makes new ones."""
        return self.management(f"/roots/{index}").decode()

    def intermediate_pem(self, index: int = 0) -> str:
        """Return the intermediate that signs the leaves of root `index`."""
        return self.management(f"/intermediates/{index}").decode()

    def management(self, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """Ask Pebble's management port: GET, or POST of `body` as JSON.

        Routes: /roots/N, /intermediates/N, /cert-status-by-serial/HEX, and
        /set-renewal-info/ with {"Certificate": PEM, "ARIResponse": text}.
        """
        return _ask(self._management_port, path, body, self._trust)

    def challtest(self, verb: str, body: Mapping[str, Any]) -> bytes:
        """Tell the DNS stand-in what to answer: add-a, clear-a, add-aaaa, set-servfail, set-default-ipv4 ..."""
        return _ask(self._challtest_port, f"/{verb}", body)

    def deadlocked(self) -> bool:
        """Say whether Pebble hangs in its known deadlock: ask before blaming the client.

        The directory and newNonce answer even then, so this asks for an account that does not exist.
        """
        url = self.directory_url.removesuffix("/dir")
        header = {"alg": "ES256", "kid": f"{url}/my-account/0", "nonce": "AAAA", "url": f"{url}/order-plz"}
        protected = base64.urlsafe_b64encode(json.dumps(header).encode()).decode().rstrip("=")
        body = {"protected": protected, "payload": "", "signature": "AAAA"}
        try:
            _ask(self._acme_port, "/order-plz", body, self._trust)
        except CertworkerError:
            return False  # a refusal is an answer
        except TimeoutError:
            return True
        return False

    def _settings(self, key: Path) -> dict[str, Any]:
        return {
            "listenAddress": f"{HOST}:{self._acme_port}",
            "managementListenAddress": f"{HOST}:{self._management_port}",
            "certificate": str(self.ca_bundle),
            "privateKey": str(key),
            "httpPort": self.http_port,
            "tlsPort": self.tls_port,
            "ocspResponderURL": "",
            "externalAccountBindingRequired": bool(self.eab),
            "externalAccountMACKeys": dict(self.eab),
            "domainBlocklist": list(self.blocklist),
            "retryAfter": {"authz": self.retry_after[0], "order": self.retry_after[1]},
            "keyAlgorithm": self.key_algorithm,
            "profiles": self.profiles,
        }

    def _environment(self) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PEBBLE_")}
        environment["PEBBLE_WFE_NONCEREJECT"] = str(self.nonce_reject)
        environment["PEBBLE_AUTHZREUSE"] = str(self.authz_reuse)
        environment["PEBBLE_ALTERNATE_ROOTS"] = str(self.alternate_roots)
        environment["PEBBLE_CHAIN_LENGTH"] = str(self.chain_length)
        if self.va_sleep == 0:
            environment["PEBBLE_VA_NOSLEEP"] = "1"
        elif self.va_sleep is not None:
            environment["PEBBLE_VA_SLEEPTIME"] = str(self.va_sleep)
        if self.gomaxprocs is not None:
            environment["GOMAXPROCS"] = str(self.gomaxprocs)
        return environment

    def _start_pebble(self) -> None:
        command = [find_binary("pebble"), "-config", str(self._config), "-dnsserver", self.dns_address]
        self._start("pebble", [*command, "-strict"] if self.strict else command, self.log_path)
        self._await("pebble", lambda: self.root_pem() and self.directory())

    def _start_challtestsrv(self, log: Path) -> None:
        command = [find_binary("pebble-challtestsrv"), "-dnsserver", self.dns_address]
        command += ["-management", f"{HOST}:{self._challtest_port}"]
        # Pebble asks for AAAA first and does not fall back, and only our proxies shall answer challenges.
        command += ["-defaultIPv4", HOST, "-defaultIPv6", ""]
        command += ["-http01", "", "-https01", "", "-tlsalpn01", "", "-doh", ""]
        self._start("pebble-challtestsrv", command, log)
        probe = {"type": "dns", "host": "ready."}
        self._await("pebble-challtestsrv", lambda: self.challtest("clear-request-history", probe))

    def _start(self, name: str, command: list[str], log: Path) -> None:
        with log.open("ab") as output:
            self._processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                process_group=0,  # Ctrl-C is for us: the CA stays up while its client drains
            )

    def _await(self, name: str, answers: Callable[[], object]) -> None:
        give_up_at = time.monotonic() + START_LIMIT.total_seconds()
        while True:
            try:
                answers()
            except (OSError, http.client.HTTPException) as error:
                if self._processes[name].poll() is not None or time.monotonic() > give_up_at:
                    raise CertworkerError(f"cannot start {name}: {self._last_words()}") from error
                time.sleep(0.02)
            else:
                return

    def _stop(self, *names: str) -> None:
        processes = [self._processes.pop(name) for name in names if name in self._processes]
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(STOP_LIMIT.total_seconds())
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def _last_words(self) -> str:
        lines = [path.read_text(errors="replace").strip()[-400:] for path in self.log_path.parent.glob("*.log")]
        return " / ".join(line for line in lines if line) or "it said nothing"


def find_binary(name: str) -> str:
    """Return the path of `pebble` or `pebble-challtestsrv`: environment, checkout, then PATH."""
    variable = name.removeprefix("pebble-").upper()
    search = os.pathsep.join([str(CHECKOUT_TOOLS), os.environ.get("PATH", os.defpath)])
    found = os.environ.get(variable) or shutil.which(name, path=search)
    if not found:
        raise UsageError(f"{name} is not installed: run `make setup`, or set {variable} to its path")
    return found


def port_range() -> range:
    """Return the ports below those that the kernel gives to outgoing connections."""
    try:
        top = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        top = 32768
    return range(min(10240, top - 1000), top)


_given: set[int] = set()


def free_ports(count: int) -> list[int]:
    """Return `count` loopback ports that are free now, and that this process was not given before.

    So a port which is bound only later (the HTTP-01 one) is still free then.
    """
    choice = port_range()
    with ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            port = secrets.choice(choice)
            listener = held.enter_context(socket.socket())
            try:
                listener.bind((HOST, port))
            except OSError:
                continue
            if port not in _given:
                _given.add(port)
                ports.append(port)
        return ports


def make_listener_certificate(folder: Path) -> tuple[Path, Path]:
    """Write a certificate for Pebble's own listeners, which is its own trust anchor, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Pebble on this machine")])
    addresses = [x509.IPAddress(ipaddress.ip_address(text)) for text in (HOST, "::1")]
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost"), *addresses]), False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
    certificate_path, key_path = folder / "listener.pem", folder / "listener.key"
    pem = serialization.Encoding.PEM
    certificate_path.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(pem))
    key_path.touch(mode=0o600)
    key_path.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return certificate_path, key_path


def _ask(port: int, path: str, body: Mapping[str, Any] | None = None, trust: ssl.SSLContext | None = None) -> bytes:
    limit = ANSWER_LIMIT.total_seconds()
    connection = (
        http.client.HTTPSConnection(HOST, port, timeout=limit, context=trust)
        if trust
        else http.client.HTTPConnection(HOST, port, timeout=limit)
    )
    headers = {"User-Agent": USER_AGENT, "Content-Type": "application/jose+json"}
    try:
        connection.request("GET" if body is None else "POST", path, json.dumps(body) if body else None, headers)
        answer = connection.getresponse()
        content = answer.read()
    finally:
        connection.close()
    if answer.status >= http.HTTPStatus.BAD_REQUEST:
        raise CertworkerError(f"pebble answered {answer.status} to {path}: {content[:200].decode(errors='replace')}")
    return content
