"""Keys at rest: what opens where, what does not, and the file that the key-encryption key is in."""

import base64
import os
import secrets
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from threading import Barrier

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certworker import wiring
from certworker.core.rollout import NodeCertificate
from certworker.errors import CertworkerError, SealError, SettingsError
from certworker.settings import Settings, load
from certworker.store import accounts, certificates, issuances, policies, schema, settings_kv
from certworker.store.accounts import StoredAccount
from certworker.store.certificates import StoredCertificate
from certworker.store.database import SCHEMA_REVISION, Database, open_database
from certworker.store.schema import upgrade
from certworker.store.seal import PREFIX, Sealer, is_sealed, make_kek, read_kek

from .conftest import NOW

KEK = bytes(range(32))
PLAIN = "-----BEGIN PRIVATE KEY-----\ncanary\n-----END PRIVATE KEY-----\n"
HERE = {"table": "certificates", "column": "key_pem", "row_id": "4444"}


@given(plain=st.text(max_size=200))
def test_what_is_sealed_opens(plain: str) -> None:
    """In the same place, with the same key, to the same text; and does not show before."""
    sealer = Sealer(KEK)
    sealed = sealer.seal(plain, **HERE)

    assert sealed.startswith(PREFIX)
    assert is_sealed(sealed)
    assert sealer.open(sealed, **HERE) == plain
    assert sealed != sealer.seal(plain, **HERE)


def test_sealed_text_does_not_hold_the_plain_one() -> None:
    """Neither as it is nor in base64."""
    blob = base64.urlsafe_b64decode(Sealer(KEK).seal(PLAIN, **HERE).removeprefix(PREFIX))

    assert b"canary" not in blob
    assert b"PRIVATE" not in blob


@pytest.mark.parametrize("moved", [{"table": "issuances"}, {"column": "cert_pem"}, {"row_id": "4445"}])
def test_moved_text_does_not_open(moved: dict[str, str]) -> None:
    """A ciphertext copied to another row, column or table is worth nothing there."""
    sealed = Sealer(KEK).seal(PLAIN, **HERE)

    with pytest.raises(SealError, match="cannot be opened: it was changed, or copied from another row"):
        Sealer(KEK).open(sealed, **{**HERE, **moved})


SEALED = Sealer(KEK).seal(PLAIN, **HERE)


@given(at=st.integers(0, len(SEALED) - 1), other=st.characters(codec="utf-8"))
def test_a_changed_character_does_not_open(at: int, other: str) -> None:
    """Any other character at any place; a changed prefix makes it some other program's text, returned as it is."""
    changed = SEALED[:at] + other + SEALED[at + 1 :]
    if changed == SEALED:
        assert Sealer(KEK).open(changed, **HERE) == PLAIN
    elif at < len(PREFIX):
        assert Sealer(KEK).open(changed, **HERE) == changed
    else:
        with pytest.raises(SealError):
            Sealer(KEK).open(changed, **HERE)


@given(data=st.data())
def test_a_changed_byte_does_not_open(data: st.DataObject) -> None:
    """Nor a bit of it, spelled in good base64; nor a shorter or a longer text."""
    blob = bytearray(base64.urlsafe_b64decode(SEALED.removeprefix(PREFIX)))
    how = data.draw(st.sampled_from(["flip", "cut", "add"]))
    if how == "flip":
        blob[data.draw(st.integers(0, len(blob) - 1))] ^= data.draw(st.integers(1, 255))
    elif how == "cut":
        del blob[data.draw(st.integers(0, len(blob) - 1)) :]
    else:
        blob += data.draw(st.binary(min_size=1, max_size=20))

    with pytest.raises(SealError):
        Sealer(KEK).open(PREFIX + base64.urlsafe_b64encode(blob).decode(), **HERE)


@pytest.mark.parametrize("spelled", [lambda s: s + "=", lambda s: s + "\n", lambda s: s[:9] + "!" + s[9:]])
def test_text_with_additions_does_not_open(spelled: object) -> None:
    """Python's base64 skips what it does not know."""
    with pytest.raises(SealError):
        Sealer(KEK).open(spelled(SEALED), **HERE)  # type: ignore[operator]


def test_another_key_and_no_key_are_told_apart() -> None:
    """Both errors name the place and the setting, and neither the value."""
    sealed = Sealer(KEK).seal(PLAIN, **HERE)

    with pytest.raises(SealError, match="sealed with another key-encryption key: check CERTWORKER_KEK_FILE"):
        Sealer(bytes(32)).open(sealed, **HERE)
    with pytest.raises(SealError, match="there is no key-encryption key") as caught:
        Sealer(None, sealing=False).open(sealed, **HERE)
    assert "certificates.key_pem of row 4444" in str(caught.value)
    assert sealed not in str(caught.value)


def test_plain_pem_of_other_programs_is_read_as_it_is() -> None:
    """With sealing on or off, with a key or without."""
    for sealer in (Sealer(KEK), Sealer(KEK, sealing=False), Sealer(None, sealing=False)):
        assert sealer.open(PLAIN, **HERE) == PLAIN


def test_without_sealing_plain_text_is_written() -> None:
    """For gateways that read the column themselves; what was sealed before still opens."""
    assert Sealer(None, sealing=False).seal(PLAIN, **HERE) == PLAIN
    assert Sealer(KEK, sealing=False).seal(PLAIN, **HERE) == PLAIN
    assert Sealer(KEK, sealing=False).open(SEALED, **HERE) == PLAIN
    with pytest.raises(SealError, match="certworker init"):
        Sealer(None)


# -- the key file -------------------------------------------------------------------------------------


def test_a_key_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    """32 random bytes, mode 0600 whatever the umask, and nothing else left in the folder."""
    before = os.umask(0)
    try:
        assert make_kek(tmp_path / "kek")
    finally:
        os.umask(before)
    kek = read_kek(tmp_path / "kek")

    assert stat.S_IMODE((tmp_path / "kek").stat().st_mode) == 0o600
    assert len(kek) == 32
    assert not make_kek(tmp_path / "kek")
    assert read_kek(tmp_path / "kek") == kek
    assert [path.name for path in tmp_path.iterdir()] == ["kek"]
    assert make_kek(tmp_path / "other")
    assert read_kek(tmp_path / "other") != kek


def test_keys_made_at_the_same_time_are_one(tmp_path: Path) -> None:
    """Whoever finds it there finds it whole."""
    start = Barrier(4)

    def make(_: int) -> tuple[bool, bytes]:
        start.wait()
        return make_kek(tmp_path / "kek"), read_kek(tmp_path / "kek")

    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(make, range(4)))

    assert sorted(first for first, _ in made) == [False, False, False, True]
    assert len({kek for _, kek in made}) == 1


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """The error says what to type."""
    make_kek(tmp_path / "kek")
    for mode in (0o640, 0o604, 0o620, 0o666):
        (tmp_path / "kek").chmod(mode)
        with pytest.raises(SealError, match=r"can be read by others: run `chmod 600 .*kek`"):
            read_kek(tmp_path / "kek")
    (tmp_path / "kek").chmod(0o400)
    read_kek(tmp_path / "kek")


@pytest.mark.parametrize(
    "content", [b"", b"short", base64.b64encode(bytes(31)), base64.b64encode(bytes(33)), bytes(32)]
)
def test_a_damaged_key_is_refused(tmp_path: Path, content: bytes) -> None:
    """Its content is not shown."""
    (tmp_path / "kek").touch(mode=0o600)
    (tmp_path / "kek").write_bytes(content)

    with pytest.raises(SealError, match="is damaged: it must hold 32 bytes in base64"):
        read_kek(tmp_path / "kek")


def test_a_missing_key_says_what_to_do(tmp_path: Path) -> None:
    """On a new system and on an old one; and a place where none can be written is one line too."""
    with pytest.raises(SealError, match="`certworker init` on a new system, restore the file from your backup"):
        read_kek(tmp_path / "kek")
    with pytest.raises(SealError, match="cannot write the key-encryption key"):
        make_kek(tmp_path / "no" / "folder" / "kek")


# -- at the start -------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load({"CERTWORKER_DATA_DIR": str(tmp_path / "data")})


def test_init_makes_everything_once(settings: Settings) -> None:
    """Folder, key and schema, then nothing more however often it is repeated."""
    made = wiring.initialise(settings, upgrade)
    kek = read_kek(wiring.kek_path(settings))

    schema_made = f"database schema {SCHEMA_REVISION}"
    assert [line.split(" /")[0] for line in made] == ["data folder", "key-encryption key", schema_made]
    assert stat.S_IMODE(settings.data_dir.stat().st_mode) == 0o700
    assert wiring.initialise(settings, upgrade) == []
    assert read_kek(wiring.kek_path(settings)) == kek
    app = wiring.open_app(settings)
    assert app.sealer.open(app.sealer.seal(PLAIN, **HERE), **HERE) == PLAIN
    app.close()


def test_init_goes_on_where_it_was_stopped(settings: Settings) -> None:
    """After the folder, after the key, after the schema."""

    def stop(_: Database) -> tuple[None, None]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wiring.initialise(settings, stop)
    kek = read_kek(wiring.kek_path(settings))
    wiring.initialise(settings, upgrade)
    db = open_database(settings.database_url)
    db.write(lambda tx: settings_kv.forget(tx, settings_kv.KEK_CHECK))
    db.close()

    assert wiring.initialise(settings, upgrade) == []
    assert read_kek(wiring.kek_path(settings)) == kek


def test_nothing_opens_without_the_key(settings: Settings) -> None:
    """One line before any work, and `init` makes no new key beside a sealed database."""
    wiring.initialise(settings, upgrade)
    kek = wiring.kek_path(settings)
    saved = kek.read_bytes()
    kek.unlink()

    with pytest.raises(SealError, match="cannot read the key-encryption key"):
        wiring.open_app(settings)
    with pytest.raises(SealError, match="restore that file from your backup"):
        wiring.initialise(settings, upgrade)
    assert not kek.exists()

    kek.touch(mode=0o600)
    kek.write_bytes(base64.b64encode(secrets.token_bytes(32)))
    with pytest.raises(SealError, match="another key-encryption key"):
        wiring.open_app(settings)
    with pytest.raises(SealError, match="another key-encryption key"):
        wiring.initialise(settings, upgrade)

    kek.write_bytes(saved)
    wiring.open_app(settings).close()


@pytest.mark.parametrize("harm", ["mode", "content", "folder"])
def test_a_key_file_that_is_no_good_is_one_line(settings: Settings, harm: str) -> None:
    """Readable by others, damaged, or a folder."""
    wiring.initialise(settings, upgrade)
    kek = wiring.kek_path(settings)
    if harm == "mode":
        kek.chmod(0o644)
    elif harm == "content":
        kek.write_bytes(b"damaged")
    else:
        kek.unlink()
        kek.mkdir()

    with pytest.raises(SealError) as caught:
        wiring.open_app(settings)
    assert "\n" not in str(caught.value)
    assert str(kek) in str(caught.value)


def test_nothing_opens_without_a_database_or_with_another_schema(settings: Settings) -> None:
    """What is missing is said, and nothing is made by the way."""
    with pytest.raises(SettingsError, match="run `certworker init`"):
        wiring.open_app(settings)
    assert not settings.data_dir.exists()

    wiring.initialise(settings, upgrade)
    db = open_database(settings.database_url)
    schema.downgrade(db, "0001")
    db.close()
    with pytest.raises(CertworkerError, match="run `certworker db upgrade`"):
        wiring.open_app(settings)
    wiring.initialise(settings, upgrade)
    wiring.open_app(settings).close()


def test_init_takes_over_a_database_of_the_first_revision(settings: Settings) -> None:
    """It has no table to remember a key in, so none can be missing."""
    settings.data_dir.mkdir()
    db = open_database(settings.database_url)
    upgrade(db, "0001")
    db.close()

    wiring.initialise(settings, upgrade)

    wiring.open_app(settings).close()


def test_a_place_where_no_key_can_be_written_is_one_line(settings: Settings, tmp_path: Path) -> None:
    """KEK_FILE in a folder that is not there."""
    elsewhere = settings.model_copy(update={"kek_file": tmp_path / "no" / "folder" / "kek"})

    with pytest.raises(SealError, match="cannot write the key-encryption key"):
        wiring.initialise(elsewhere, upgrade)


def test_without_sealing_no_key_is_made(settings: Settings) -> None:
    """And switching it on later makes one, which then is the database's."""
    plain = settings.model_copy(update={"seal": "off"})
    wiring.initialise(plain, upgrade)
    assert not wiring.kek_path(plain).exists()
    app = wiring.open_app(plain)
    assert app.sealer.seal(PLAIN, **HERE) == PLAIN
    app.close()

    with pytest.raises(SealError, match="certworker init"):
        wiring.open_app(settings)
    wiring.initialise(settings, upgrade)
    wiring.open_app(settings).close()
    wiring.open_app(plain).close()
    wiring.kek_path(settings).unlink()
    with pytest.raises(SealError):
        wiring.open_app(plain)


# -- what never shows ---------------------------------------------------------------------------------


def test_no_repr_shows_a_key(db: Database, lineage_id: str) -> None:
    """Logs and tracebacks are made of them."""
    canary = "canary-of-a-key"
    db.write(lambda tx: issuances.queue(tx, lineage_id, "first", NOW))
    (claimed,) = db.write(lambda tx: issuances.claim(tx, lineage_id, NOW, 1))
    issuance = db.write(lambda tx: issuances.record(tx, claimed, NOW, key_pem=canary, csr_der=canary.encode(),
                                                    chain_pem=canary))  # fmt: skip
    plain = Sealer(None, sealing=False)
    db.write(lambda tx: accounts.add(tx, "https://ca.test/dir", canary, [], None, plain, NOW))
    account = db.read(lambda tx: accounts.find_default(tx, "https://ca.test/dir"))
    assert account is not None
    assert account.open(account.key, plain) == issuance.key_pem == canary
    stored = StoredCertificate("id", "a.test", canary, canary, NOW, "active", None, None, None, None, None, None, None)
    node = NodeCertificate("id", frozenset(), (), "chain", canary, "", NOW + timedelta(days=1), 1)
    kek = canary.ljust(32).encode()

    for shown in (issuance, account, stored, node, Sealer(kek), policies.find):
        assert "canary" not in repr(shown)
        assert "canary" not in f"{[shown]}"
    assert "canary" in repr(StoredAccount("id", canary, {}))
    assert certificates.StoredCertificate is StoredCertificate


def test_an_account_s_key_is_sealed_in_its_row(db: Database) -> None:
    """It opens for its own row only."""
    sealer = Sealer(KEK)
    db.write(lambda tx: accounts.add(tx, "https://ca.test/dir", PLAIN, ["mailto:a@a.test"], None, sealer, NOW))
    account = db.read(lambda tx: accounts.find_default(tx, "https://ca.test/dir"))
    assert account is not None

    assert is_sealed(account.credentials_json["key"])
    assert account.open(account.key, sealer) == PLAIN
    with pytest.raises(SealError):
        StoredAccount("other", account.directory_url, account.credentials_json).open(account.key, sealer)
