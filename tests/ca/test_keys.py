"""Account keys, certificate keys and requests: each held against another implementation."""

import subprocess
import sys

import pytest
from acme import challenges
from acme import jws as acme_jws
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from josepy.b64 import b64encode
from josepy.jwk import JWK, JWKEC, JWKRSA
from josepy.util import ComparableECKey, ComparableRSAKey

from certworker.ca.csr import KEY_TYPES, key_to_pem, make_csr, make_key, spki_sha256
from certworker.ca.jws import sign
from certworker.ca.keys import AccountKey
from certworker.errors import InputError

from . import fake_jws


def pem(key: PrivateKeyTypes) -> str:
    assert isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | dsa.DSAPrivateKey)
    return key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()).decode()


ACCOUNT_KEYS: list[ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey] = [
    ec.generate_private_key(ec.SECP256R1()),
    ec.generate_private_key(ec.SECP384R1()),
    rsa.generate_private_key(65537, 2048),
]
UNUSABLE = [
    "",
    "secret",
    pem(ec.generate_private_key(ec.SECP521R1())),
    pem(rsa.generate_private_key(65537, 1024)),
    pem(dsa.generate_private_key(2048)),
    ed25519.Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
    ACCOUNT_KEYS[0].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")).decode(),
]


@pytest.mark.parametrize("private", ACCOUNT_KEYS)
def test_a_key_of_another_client_can_be_used(private) -> None:  # type: ignore[no-untyped-def]
    """It signs so that cryptography alone can verify it, and comes back out as the same key."""
    key = AccountKey.from_pem(pem(private))
    jws = fake_jws.parse(sign(key, b"{}", url="https://ca.test/", nonce="abcd", kid=None))

    assert fake_jws.is_signed(jws, jws.header["jwk"])
    assert fake_jws.thumbprint(jws.header["jwk"]) == key.thumbprint
    assert AccountKey.from_pem(key.to_pem()) == key
    assert key != AccountKey.generate()


@pytest.mark.parametrize("private", ACCOUNT_KEYS)
def test_a_key_authorization_is_the_librarys(private) -> None:  # type: ignore[no-untyped-def]
    """What we compute without loading acme.challenges is what it computes (RFC 8555 §8.1)."""
    key, jwk = AccountKey(private), oracle(private)
    token = b"0123456789abcdef0123456789abcdef"

    assert key.key_authorization(b64encode(token).decode()) == challenges.HTTP01(token=token).validation(jwk)


@pytest.mark.parametrize("private", ACCOUNT_KEYS)
def test_a_request_is_what_the_library_reads(private) -> None:  # type: ignore[no-untyped-def]
    """josepy finds the same key, accepts the signature, and says the same of the key as we do."""
    key, jwk = AccountKey(private), oracle(private)
    body = sign(key, b'{"a":1}', url='https://ca.test/"\\', nonce="abcd", kid=None)
    jws = acme_jws.JWS.json_loads(body.decode())

    assert jws.verify()
    assert (jws.payload, jws.signature.combined.jwk) == (b'{"a":1}', jwk.public_key())
    assert jws.signature.combined.url == 'https://ca.test/"\\'
    assert dict(key.public_jwk) == jwk.public_key().to_partial_json()


def test_leading_zeros_are_kept() -> None:
    """A coordinate or half of a signature may begin with zeros (RFC 7518 §3.4, §6.2.1.2)."""
    for secret in range(2, 600):
        key = AccountKey(ec.derive_private_key(secret, ec.SECP256R1()))

        assert {len(key.public_jwk["x"]), len(key.public_jwk["y"])} == {43}
        assert len(key.sign(b"")) == 64


def oracle(private: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> JWK:
    """The same key as josepy has it."""
    if isinstance(private, rsa.RSAPrivateKey):
        return JWKRSA(key=ComparableRSAKey(private))
    return JWKEC(key=ComparableECKey(private))


def test_a_request_names_the_account_or_the_key() -> None:
    """Exactly one of them, and the URL and nonce it was made for (RFC 8555 §6.2)."""
    key = AccountKey.generate()
    bare = fake_jws.parse(sign(key, b"", url="https://ca.test/1", nonce="abcd", kid=None))
    named = fake_jws.parse(sign(key, b"", url="https://ca.test/1", nonce="abcd", kid="https://ca.test/account/1"))

    assert set(bare.header) == {"alg", "jwk", "nonce", "url"}
    assert set(bare.header["jwk"]) == {"crv", "kty", "x", "y"}
    assert dict(named.header) == {
        "alg": "ES256",
        "kid": "https://ca.test/account/1",
        "nonce": "abcd",
        "url": "https://ca.test/1",
    }
    assert named.payload == b""


@pytest.mark.parametrize("text", UNUSABLE)
def test_a_key_that_cannot_be_used_is_refused(text: str) -> None:
    """And not shown."""
    with pytest.raises(InputError, match="account key: must be") as caught:
        AccountKey.from_pem(text)

    assert caught.value.__cause__ is None
    assert not text or text not in str(caught.value)


@pytest.mark.parametrize("key_type", KEY_TYPES)
def test_a_request_asks_for_exactly_the_names(key_type: str) -> None:
    """Whatever their order; nothing else is in it."""
    key = make_key(key_type)
    csr = x509.load_der_x509_csr(make_csr(key, ["b.test", "*.a.test", "b.test"]))
    names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value

    assert names.get_values_for_type(x509.DNSName) == ["*.a.test", "b.test"]
    assert (len(csr.subject), len(csr.extensions), csr.is_signature_valid) == (0, 1, True)
    assert spki_sha256(csr.public_key()) == spki_sha256(key.public_key())
    stored = load_pem_private_key(key_to_pem(key).encode(), None)
    assert spki_sha256(stored.public_key()) == spki_sha256(key.public_key())  # type: ignore[arg-type]


def test_a_key_type_is_one_of_ours() -> None:
    """The others are named."""
    with pytest.raises(InputError, match=r"'dsa'.*ecdsa-p256, ecdsa-p384, rsa-2048"):
        make_key("dsa")


def test_a_nonce_is_sent_back_as_it_came() -> None:
    """It is the CA's text, whatever it means."""
    for nonce in ("abcd", "A-_z", "ab"):
        body = sign(AccountKey.generate(), b"", url="https://ca.test/", nonce=nonce, kid=None)

        assert fake_jws.parse(body).header["nonce"] == nonce


def test_this_room_is_light() -> None:
    """A short command must not wait for an HTTP library that it does not use."""
    code = "import sys, certworker.ca.client, certworker.ca.csr; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()

    assert not {"requests", "acme", "josepy"} & set(loaded)
