"""Signs requests (RFC 8555 §6.2, RFC 7515 §7.2.2). The only place that knows how a JWS is made.

`acme.jws` and josepy sign some 4,000 requests a second; a CA takes far fewer. `acme.messages` is loaded
only where an account is bound to an external one: it pulls in `requests`, which nothing else here needs.
"""

import json
from collections.abc import Mapping
from typing import Any

from acme.jws import JWS
from josepy.b64 import b64decode

from certworker.ca.keys import AccountKey
from certworker.errors import InputError


def sign(key: AccountKey, payload: bytes, *, url: str, nonce: str, kid: str | None) -> bytes:
    """Return a request body for `url`: signed for the account at `kid`, or naming the bare key if there is none."""
    jws = JWS.sign(payload, key=key.jwk, alg=key.algorithm, nonce=b64decode(nonce), url=url, kid=kid)
    return str(jws.json_dumps()).encode()


def bind_external(key: AccountKey, *, url: str, kid: str, hmac_key: str) -> Mapping[str, Any]:
    """Return the proof that `key` may use the external account `kid` (RFC 8555 §7.3.4)."""
    from acme.messages import Directory, ExternalAccountBinding

    try:
        return ExternalAccountBinding.from_data(key.jwk.public_key(), kid, hmac_key, Directory({"newAccount": url}))
    except ValueError:
        raise InputError("ACME_EAB_HMAC_KEY: must be the base64url text that the CA gave") from None


def endorse_key(old: AccountKey, new: AccountKey, *, url: str, account_url: str) -> Mapping[str, Any]:
    """Return the proof, signed by `new`, that it may take the place of `old` (RFC 8555 §7.3.5)."""
    payload = {"account": account_url, "oldKey": old.jwk.public_key().to_partial_json()}
    jws = JWS.sign(json.dumps(payload).encode(), key=new.jwk, alg=new.algorithm, nonce=None, url=url)
    return dict(jws.to_partial_json())
