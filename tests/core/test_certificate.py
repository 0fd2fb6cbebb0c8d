"""A chain is used only if it is what was ordered; every other one is refused with its reason."""

import ipaddress
import re
import ssl
from base64 import urlsafe_b64decode
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import permutations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID
from hypothesis import example, given, settings
from hypothesis import strategies as st

from certworker.core.certificate import (
    CLOCK_TOLERANCE,
    MAX_CHAIN_BYTES,
    MAX_CHAIN_LENGTH,
    Chain,
    Validity,
    check_chain,
    is_odd_life,
    normalise_pair,
    read_leaf,
    takes_over_at,
)
from certworker.errors import ChainRefused, InputError

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
NAMES = ("a.example.com", "b.example.com")

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def make_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


LEAF_KEY, ISSUER_KEY, ROOT_KEY, OTHER_KEY = (make_key() for _ in range(4))


@dataclass(frozen=True, slots=True)
class Draft:
    """A certificate to be made; the defaults are what a CA would send."""

    names: tuple[x509.GeneralName, ...] | None = tuple(map(x509.DNSName, NAMES))
    key: Key = LEAF_KEY
    signed_by: Key = ISSUER_KEY
    subject: str = ""
    issuer: str = "issuer"
    not_before: datetime = NOW - timedelta(hours=1)
    not_after: datetime = NOW + timedelta(days=90)
    ca: bool | None = False
    serial: int = 0xABC123
    authority_key: bytes | None = None

    def make(self) -> x509.Certificate:
        builder = x509.CertificateBuilder().subject_name(name(self.subject)).issuer_name(name(self.issuer))
        builder = builder.public_key(self.key.public_key()).serial_number(self.serial)
        builder = builder.not_valid_before(self.not_before).not_valid_after(self.not_after)
        if self.names is not None:
            builder = builder.add_extension(x509.SubjectAlternativeName(self.names), critical=False)
        if self.ca is not None:
            builder = builder.add_extension(x509.BasicConstraints(self.ca, None), critical=True)
        if self.authority_key is not None:
            identifier = x509.AuthorityKeyIdentifier(self.authority_key, None, None)
            builder = builder.add_extension(identifier, critical=False)
        return builder.sign(self.signed_by, hashes.SHA256())


def name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)] if common else [])


def pem(*certificates: x509.Certificate) -> str:
    return "".join(certificate.public_bytes(Encoding.PEM).decode() for certificate in certificates)


def key_pem(key: Key, form: PrivateFormat = PrivateFormat.PKCS8) -> str:
    return key.private_bytes(Encoding.PEM, form, NoEncryption()).decode()


LEAF = Draft().make()
ISSUER = Draft(None, ISSUER_KEY, ROOT_KEY, "issuer", "root", ca=True).make()
ROOT = Draft(None, ROOT_KEY, ROOT_KEY, "root", "root", ca=True).make()
STRANGER = Draft(None, OTHER_KEY, OTHER_KEY, "stranger", "stranger", ca=True).make()
SPKI = read_leaf(pem(LEAF)).spki_sha256


def check(text: str, names: tuple[str, ...] = NAMES, now: datetime = NOW, *, private_ca: bool = False) -> Chain:
    return check_chain(text, spki_sha256=SPKI, dns_names=names, now=now, private_ca=private_ca)


def test_a_good_chain_is_described() -> None:
    """Names, key, serial and dates are read from the leaf, the text is written anew."""
    chain = check(pem(LEAF, ISSUER, ROOT))

    assert chain.pem == pem(LEAF, ISSUER, ROOT)
    assert chain.leaf.dns_names == NAMES
    assert chain.leaf.serial == "abc123"
    assert chain.leaf.issuer == "issuer"
    assert chain.leaf.fingerprint == LEAF.fingerprint(hashes.SHA256()).hex()
    assert chain.leaf.validity.not_after == NOW + timedelta(days=90)
    assert chain.leaf.validity.lifetime == timedelta(days=90, hours=1)


@pytest.mark.parametrize("change", [
    lambda text: text.replace("\n", "\r\n"),
    lambda text: "\n\n" + text.replace("-----END CERTIFICATE-----\n", "-----END CERTIFICATE-----\n\n \n"),
])  # fmt: skip
def test_a_chain_is_written_anew(change: object) -> None:
    """Other line ends and blank lines, on which HAProxy's socket would choke, do not survive."""
    assert callable(change)
    assert check(change(pem(LEAF, ISSUER))).pem == pem(LEAF, ISSUER)


def test_order_and_case_of_names_do_not_matter() -> None:
    """What counts is the set of names."""
    leaf = Draft(tuple(map(x509.DNSName, ("B.example.com", "a.EXAMPLE.com")))).make()

    assert check(pem(leaf, ISSUER), names=NAMES[::-1]).leaf.dns_names == NAMES


def test_a_leaf_alone_and_one_without_basic_constraints_will_do() -> None:
    """A private CA may sign with its root and say nothing of constraints."""
    assert check(pem(Draft(ca=None).make()), private_ca=True).leaf.issuer == "issuer"


@pytest.mark.parametrize("order", list(permutations([LEAF, ISSUER, ROOT])))
def test_a_chain_is_put_in_order(order: tuple[x509.Certificate, ...]) -> None:
    """TLS wants each certificate to be followed by its issuer; not every CA keeps to RFC 8555 §9.1."""
    assert check(pem(*order)).pem == pem(LEAF, ISSUER, ROOT)


def test_a_root_signed_by_another_root_stays_where_it_was() -> None:
    """What is in order already is left as the CA sent it, whichever of two issuers comes first."""
    crossed = Draft(None, ROOT_KEY, OTHER_KEY, "root", "elder root", ca=True).make()

    for chain in (pem(LEAF, ISSUER, crossed), pem(LEAF, ISSUER, ROOT, crossed)):
        assert check(chain).pem == chain


def test_more_than_there_has_to_be_is_no_gap() -> None:
    """A root with two signatures in any order, and what a CA has sent twice: clients take all of these."""
    crossed = Draft(None, ROOT_KEY, OTHER_KEY, "root", "elder root", ca=True).make()

    for others in permutations([ISSUER, ROOT, crossed]):
        assert check(pem(LEAF, *others)).pem == pem(LEAF, ISSUER, ROOT, crossed)
    assert check(pem(LEAF, LEAF, ISSUER, ROOT, ISSUER)).pem == pem(LEAF, ISSUER, ROOT)


@pytest.mark.parametrize("private_ca", [True, False])
def test_a_gap_is_refused_by_whatever_ca(private_ca: bool) -> None:
    """A certificate of the file that leads nowhere shows that another one is missing, or does not belong there."""
    for chain in (pem(LEAF, ROOT), pem(LEAF, ISSUER, STRANGER), pem(LEAF, STRANGER)):
        with pytest.raises(ChainRefused, match="not every certificate"):
            check(chain, private_ca=private_ca)


def other_names(*values: x509.GeneralName) -> x509.Certificate:
    return Draft(values).make()


DNS = tuple(map(x509.DNSName, NAMES))
SECRET = key_pem(OTHER_KEY)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param(pem(Draft(key=OTHER_KEY).make(), ISSUER), "for another key", id="another key"),
        pytest.param(pem(other_names(*DNS, x509.DNSName("c.example.com"))), "not for what was ordered", id="superset"),
        pytest.param(pem(other_names(DNS[0])), "not for what was ordered", id="subset"),
        pytest.param(pem(other_names(x509.DNSName("*.example.com"))), "not for what was ordered", id="wildcard"),
        pytest.param(
            pem(other_names(*DNS, x509.IPAddress(ipaddress.ip_address("192.0.2.1")))), "more than the DNS", id="address"
        ),
        pytest.param(pem(other_names(*DNS, x509.RFC822Name("a@example.com"))), "more than the DNS", id="mailbox"),
        pytest.param(pem(Draft(names=None).make()), "no subjectAltName", id="no names"),
        pytest.param(pem(LEAF), "certificate of its issuer, issuer, is missing", id="the leaf alone"),
        pytest.param(pem(LEAF, LEAF), "certificate of its issuer, issuer, is missing", id="twice the leaf"),
        pytest.param(pem(Draft(signed_by=OTHER_KEY).make(), ISSUER), "not every certificate", id="forged signature"),
        pytest.param(pem(ISSUER, ROOT), "for another key", id="no leaf"),
        pytest.param(pem(Draft(ca=True).make(), ISSUER), "a CA certificate", id="a CA"),
        pytest.param(SECRET + pem(LEAF, ISSUER), "something else than certificates", id="key first"),
        pytest.param(pem(LEAF) + SECRET + pem(ISSUER), "something else than certificates", id="key inside"),
        pytest.param(
            pem(LEAF) + key_pem(OTHER_KEY, PrivateFormat.TraditionalOpenSSL), "something else", id="EC PRIVATE KEY"
        ),
        pytest.param(
            pem(LEAF).replace("-----END", SECRET + "-----END"), "something else than certificates", id="key nested"
        ),
        pytest.param(pem(LEAF) + "-----BEGIN X509 CRL-----\nAA==\n-----END X509 CRL-----\n", "else", id="a CRL"),
        pytest.param("subject=/CN=x\n" + pem(LEAF), "text outside", id="text before"),
        pytest.param(pem(LEAF) + "# issuer\n" + pem(ISSUER), "text outside", id="text between"),
        pytest.param(pem(LEAF) + "show info\n", "text outside", id="text after"),
        pytest.param(pem(LEAF).replace("-----END", "-----FIN"), "text outside", id="no end"),
        pytest.param(pem(LEAF) + pem(ISSUER).partition("-----END")[0], "text outside", id="no end of the last"),
        pytest.param(pem(LEAF).partition("-----END")[0] + pem(ISSUER), "cannot be read", id="no end of the first"),
        pytest.param(pem(*[ISSUER] * (MAX_CHAIN_LENGTH + 1)), "holds 21 certificates", id="too many"),
        pytest.param(pem(LEAF) + "\n" * MAX_CHAIN_BYTES, "at most 262144", id="too large"),
        pytest.param("", "holds no certificates", id="nothing"),
        pytest.param("<html>", "holds no certificates", id="html"),
        pytest.param("\ud800", "holds no certificates", id="a surrogate"),
        pytest.param(pem(LEAF)[:27] + "\ud800" + pem(LEAF)[27:], "cannot be read", id="a surrogate inside"),
        pytest.param("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "cannot be read", id="not DER"),
        pytest.param("-----BEGIN CERTIFICATE-----\n?\n-----END CERTIFICATE-----\n", "cannot be read", id="not base64"),
        pytest.param("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n", "cannot be read", id="empty block"),
    ],
)  # fmt: skip
def test_what_was_not_ordered_is_refused(text: str, reason: str) -> None:
    """RFC 8555 §11.4, and what a mixed-up or hostile CA could send; no refusal quotes a key."""
    with pytest.raises(ChainRefused, match=re.escape(reason)) as refused:
        check(text)
    assert "\n" not in str(refused.value)
    assert SECRET.splitlines()[1] not in str(refused.value)


@pytest.mark.parametrize("now", [NOW + timedelta(days=90), NOW + timedelta(days=900)])
def test_a_leaf_that_has_ended_is_refused(now: datetime) -> None:
    """In the second of its end as well."""
    with pytest.raises(ChainRefused, match="has expired already"):
        check(pem(LEAF, ISSUER), now=now)


@pytest.mark.parametrize("now", [NOW + timedelta(days=90) - timedelta(seconds=1), NOW - timedelta(days=9)])
def test_a_leaf_of_later_is_what_was_ordered(now: datetime) -> None:
    """When it serves is another question."""
    assert check(pem(LEAF, ISSUER), now=now)


# -- when it serves ------------------------------------------------------------------------------------

DAY = timedelta(days=1)
PRESENT = Validity(NOW - 80 * DAY, NOW + 10 * DAY)


@pytest.mark.parametrize(
    ("starts", "present", "takes_over"),
    [
        (-DAY, PRESENT, timedelta(0)),
        (CLOCK_TOLERANCE, PRESENT, timedelta(0)),
        (CLOCK_TOLERANCE + timedelta(seconds=1), PRESENT, 2 * CLOCK_TOLERANCE + timedelta(seconds=1)),
        (DAY, PRESENT, DAY + CLOCK_TOLERANCE),
        (30 * DAY, PRESENT, 10 * DAY),  # a day too late is no worse than none
        (30 * DAY, Validity(NOW - 90 * DAY, NOW - DAY), timedelta(0)),
        (30 * DAY, None, timedelta(0)),
    ],
)
def test_a_certificate_that_starts_later_waits(
    starts: timedelta, present: Validity | None, takes_over: timedelta
) -> None:
    """Until every client's clock has it valid, as long as something else serves."""
    assert takes_over_at(Validity(NOW + starts, NOW + 90 * DAY), present, NOW) == NOW + takes_over


@pytest.mark.parametrize(
    ("days", "last", "odd"), [(90, 90, False), (90, 80, False), (64, 90, True), (90, 45, True), (0.04, None, True),
                              (0.04, 0.04, False), (6, None, False)],
)  # fmt: skip
def test_an_odd_life_is_another_one_than_the_last(days: float, last: float | None, odd: bool) -> None:
    """Said once: the next one like it is what was to be expected."""
    before = None if last is None else Validity(NOW, NOW + last * DAY)
    assert is_odd_life(Validity(NOW, NOW + days * DAY), before) is odd


# -- garbage -------------------------------------------------------------------------------------------


@given(st.text(max_size=200) | st.text("-BEGIN CERTFAD\n", max_size=200))
def test_garbage_is_refused(text: str) -> None:
    """Whatever comes, ChainRefused is all that is raised."""
    with pytest.raises(ChainRefused):
        check(text)


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@settings(max_examples=400)
@example(at=14, bit=7)  # a negative serial number
@example(at=11, bit=0)  # a version that X.509 does not know
@given(at=st.integers(0, len(LEAF.tbs_certificate_bytes) + 3), bit=st.integers(0, 7))
def test_no_flipped_bit_passes_with_its_issuer(at: int, bit: int) -> None:
    """A leaf that differs anywhere in what is signed is not its issuer's any more, or cannot be read.

    (Behind it, the count of unused bits before the signature may differ and mean the same.)
    """
    der = bytearray(LEAF.public_bytes(Encoding.DER))
    der[at] ^= 1 << bit
    with pytest.raises(ChainRefused):
        check(ssl.DER_cert_to_PEM_cert(bytes(der)) + pem(ISSUER))


# -- what the CA calls it ------------------------------------------------------------------------------


def test_the_renewal_id_is_the_one_of_the_rfc() -> None:
    """The example of RFC 9773 §4.1, whose serial needs a leading byte 00."""
    authority_key = bytes.fromhex("69885b6b87464041e1b37b847ba0ae2cde01c8d4")
    leaf = read_leaf(pem(Draft(serial=0x87654321, authority_key=authority_key).make()))

    assert leaf.renewal_id == "aYhba4dGQEHhs3uEe6CuLN4ByNQ.AIdlQyE"


@given(serial=st.integers(1, 2**159 - 1), authority_key=st.binary(min_size=1, max_size=64))
def test_a_renewal_id_tells_what_it_names(serial: int, authority_key: bytes) -> None:
    """Two parts of unpadded base64url: the key identifier, and the serial as the shortest signed number."""
    renewal_id = read_leaf(pem(Draft(serial=serial, authority_key=authority_key).make())).renewal_id
    assert renewal_id is not None
    first, second = (urlsafe_b64decode(part + "=" * (-len(part) % 4)) for part in renewal_id.split("."))

    assert re.fullmatch(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+", renewal_id)
    assert first == authority_key
    assert int.from_bytes(second, "big", signed=True) == serial
    assert second[0] != 0 or len(second) == 1 or second[1] >= 0x80


@pytest.mark.parametrize(
    "authority_key", [None, b"", b"k" * 300], ids=["no extension", "an empty one", "too long for a URL"]
)
def test_a_certificate_may_have_no_renewal_id(authority_key: bytes | None) -> None:
    """Its CA cannot be asked about it; all else is as usual."""
    leaf = read_leaf(pem(Draft(authority_key=authority_key).make()))

    assert (leaf.renewal_id, leaf.serial) == (None, "abc123")


def test_an_authority_without_a_key_is_none() -> None:
    """RFC 5280 §4.2.1.1 has the key identifier optional."""
    authority = x509.AuthorityKeyIdentifier(None, [x509.DirectoryName(name("root"))], 5)
    builder = x509.CertificateBuilder().subject_name(name("")).issuer_name(name("issuer")).serial_number(7)
    builder = builder.public_key(LEAF_KEY.public_key()).not_valid_before(NOW).not_valid_after(NOW + timedelta(days=1))
    builder = builder.add_extension(x509.SubjectAlternativeName(DNS), critical=False)
    leaf = builder.add_extension(authority, critical=False).sign(ISSUER_KEY, hashes.SHA256())

    assert read_leaf(pem(leaf)).renewal_id is None


# -- a certificate and its key -------------------------------------------------------------------------


@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def test_a_pair_is_written_anew(form: PrivateFormat) -> None:
    """Text around the key is gone; the key is the same."""
    chain, secret = normalise_pair(
        pem(LEAF, ISSUER).replace("\n", "\r\n"), f"Bag Attributes\n\n{key_pem(LEAF_KEY, form)}\n\ntrailing: text\n"
    )

    assert chain == pem(LEAF, ISSUER)
    assert secret == key_pem(LEAF_KEY)


def test_an_rsa_pair_is_taken() -> None:
    """The kind of the key does not matter."""
    key = rsa.generate_private_key(65537, 2048)
    _, secret = normalise_pair(pem(Draft(key=key).make()), key_pem(key, PrivateFormat.TraditionalOpenSSL))

    assert load_pem_private_key(secret.encode(), None).private_numbers() == key.private_numbers()  # type: ignore[union-attr]


ENCRYPTED = LEAF_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")).decode()


@pytest.mark.parametrize(
    ("chain", "secret", "reason"),
    [
        (pem(LEAF), key_pem(OTHER_KEY), "does not belong to the certificate"),
        (pem(ISSUER, LEAF), key_pem(LEAF_KEY), "no subjectAltName"),
        (pem(LEAF), ENCRYPTED, "unencrypted PEM"),
        (pem(LEAF), "", "unencrypted PEM"),
        (pem(LEAF), "\ud800", "unencrypted PEM"),
        (pem(LEAF), pem(LEAF), "unencrypted PEM"),
        (pem(LEAF) + key_pem(LEAF_KEY), key_pem(LEAF_KEY), "something else than certificates"),
        ("", key_pem(LEAF_KEY), "holds no certificates"),
    ],
)
def test_an_odd_pair_is_refused(chain: str, secret: str, reason: str) -> None:
    """InputError says why, and quotes no key."""
    with pytest.raises(InputError, match=reason) as refused:
        normalise_pair(chain, secret)
    assert "PRIVATE" not in str(refused.value)
    assert refused.value.__cause__ is None


@given(chain=st.text(max_size=60), secret=st.text(max_size=60))
def test_a_garbage_pair_is_refused(chain: str, secret: str) -> None:
    """InputError is all that is raised, whichever half is garbage."""
    for pair in ((chain, key_pem(LEAF_KEY)), (pem(LEAF), secret)):
        with pytest.raises(InputError):
            normalise_pair(*pair)
