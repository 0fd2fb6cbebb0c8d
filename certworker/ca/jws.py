"""Signs requests (RFC 8555 §6.2, RFC 7515 §7.2.2). The only place that knows how a JWS is made.

Over `cryptography`: a fifth of what `acme.jws` and josepy take, which are loaded only where an account is bound to an
external one.
"""

import json
from collections.abc import Mapping
from typing import Any

from certworker.ca.keys import AccountKey, base64url
from certworker.errors import InputError

print_json = json.JSONEncoder(separators=(",", ":")).encode
"""Without blanks; `json.dumps` makes an encoder each time it is told how."""
_FLATTENED = '{"protected":"%(protected)s","payload":"%(payload)s","signature":"%(signature)s"}'
"""As JSON has it: nothing of base64url is escaped there."""


def sign(key: AccountKey, payload: bytes, *, url: str, nonce: str, kid: str | None) -> bytes:
    """Return a request body for `url`: signed for the account at `kid`, or naming the bare key if there is none."""
    return (_FLATTENED % _sign(key, payload, {"nonce": nonce, "url": url}, kid)).encode()


def bind_external(key: AccountKey, *, url: str, kid: str, hmac_key: str) -> Mapping[str, Any]:
    """Return the proof that `key` may use the external account `kid` (RFC 8555 §7.3.4)."""
    # Slow to import (it pulls in `requests`), and needed once in the life of an account.
    from acme.messages import Directory, ExternalAccountBinding
    from josepy.jwk import JWK

    try:
        public = JWK.from_json(dict(key.public_jwk))
        return ExternalAccountBinding.from_data(public, kid, hmac_key, Directory({"newAccount": url}))
    except ValueError:
        raise InputError("ACME_EAB_HMAC_KEY: must be the base64url text that the CA gave") from None


def endorse_key(old: AccountKey, new: AccountKey, *, url: str, account_url: str) -> Mapping[str, Any]:
    """Return the proof, signed by `new`, that it may take the place of `old` (RFC 8555 §7.3.5)."""
    payload = {"account": account_url, "oldKey": old.public_jwk}
    return _sign(new, print_json(payload).encode(), {"url": url}, kid=None)


def _sign(key: AccountKey, payload: bytes, header: Mapping[str, str], kid: str | None) -> dict[str, str]:
    """Return a flattened JWS; RFC 8555 §6.2 wants either `kid` or `jwk`."""
    signer = {"jwk": key.public_jwk} if kid is None else {"kid": kid}
    protected = base64url(print_json({"alg": key.algorithm, **header, **signer}).encode())
    encoded = base64url(payload)
    signature = base64url(key.sign(f"{protected}.{encoded}".encode()))
    return {"protected": protected, "payload": encoded, "signature": signature}
