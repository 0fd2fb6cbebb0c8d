"""Small facts the program remembers about itself, by name."""

from sqlalchemy import Connection, delete, inspect, select

from certworker.store.rows import among, insert_new, put_row
from certworker.store.tables import settings_kv

KEK_CHECK = "kek_check"
"""A sealed word: it opens with the right key-encryption key only."""
ISSUER = "issuer"
"""CA, profile and key type of the last full reconcile."""
THUMBPRINT = "thumbprint"
"""What hosts answer challenges with where listeners are stateless; empty: none of them is any more."""
LAST_SCAN_AT = "last_scan_at"
LAST_SWEEP_AT = "last_sweep_at"
NODE_API = "node_api"
"""Certificate and sealed key of the node API, a JSON object: one for all workers."""
RELEASED_VERSION = "released_version"
"""Id of the version that nodes get that are no canaries."""
RELEASED_BEFORE = "released_before"
"""Id of the version that they got before it."""
NOT_YET_VALID = "not_yet_valid"
"""When the first of the uploaded certificates that are not valid yet will be."""
WRITTEN_AT = "written_at"
"""Written to find out whether the database can be."""


def is_there(tx: Connection) -> bool:
    """Say whether anything can be remembered: an empty or very old database has no table for it."""
    return inspect(tx).has_table(settings_kv.name)


def find(tx: Connection, key: str) -> str | None:
    """Return what is remembered under `key`."""
    return tx.execute(select(settings_kv.c.value).where(settings_kv.c.key == key)).scalar()


def find_all(tx: Connection, *keys: str) -> dict[str, str]:
    """Return what is remembered under these keys; those without anything are left out."""
    return {row[0]: row[1] for row in tx.execute(_FIND_ALL, {"keys": keys})}


_FIND_ALL = select(settings_kv.c.key, settings_kv.c.value).where(among(settings_kv.c.key, "keys"))


def put(tx: Connection, key: str, value: str) -> None:
    """Remember `value` under `key`."""
    put_row(tx, settings_kv, key=key, value=value)


def put_first(tx: Connection, key: str, value: str) -> str:
    """Remember `value` under `key` unless something is there; return what is there now."""
    insert_new(tx, settings_kv, key=key, value=value)
    return str(tx.execute(select(settings_kv.c.value).where(settings_kv.c.key == key)).scalar_one())


def forget(tx: Connection, key: str) -> None:
    """Remember nothing under `key` any more."""
    tx.execute(delete(settings_kv).where(settings_kv.c.key == key))
