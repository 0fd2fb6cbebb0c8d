"""`config`: one document in and out, and nothing stored of a wrong one."""

import io
import json
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from .conftest import Cli

DOCUMENT = """
upstream_pools = [{ name = "web", health_check = { kind = "tcp", interval_secs = 1 } }, { name = "api" }]
upstream_targets = [
  { pool_id = "web", address = "127.0.0.1:8080", weight = 3 },
  { pool_id = "web", address = "[::1]:8080", enabled = false },
]
listeners = [{ name = "http", port = 80, protocol = "http" }, { name = "https", port = 443, protocol = "https" }]
routes = [
  { listener_id = "https", match_expr = { host = "a.test", path = { prefix = "/" } }, upstream_pool_id = "web" },
]
tls_policies = [{ domains = ["MÜNCHEN.test", "a.test"] }, { domains = ["b.test"], mode = "manual", shared = true }]
"""
NOBODY = "00000000-0000-4000-8000-000000000009"
NAMES = {"listeners", "routes", "upstream_pools", "upstream_targets", "tls_policies"}

Write = Callable[[str, str], str]


def test_a_document_becomes_rows_once(cli: Cli, write: Write) -> None:
    """It says what changed; applying it again changes nothing."""
    file = write("gateway.toml", DOCUMENT)

    assert cli("config", "apply", file, "--json").json == {
        "changed": {"upstream_pools": 2, "upstream_targets": 2, "tls_policies": 2, "listeners": 2, "routes": 1}
    }
    content = cli.content()
    again = cli("config", "apply", file)
    assert again.out == (
        "upstream_pools: 0 changed, upstream_targets: 0 changed, tls_policies: 0 changed, listeners: 0 changed, "
        "routes: 0 changed\n"
    )
    assert cli.content() == content
    assert cli.audited() == ["config.applied"]


@pytest.mark.parametrize("form", ["toml", "yaml", "json"])
@pytest.mark.parametrize("given", ["file", "option"])
def test_an_export_can_be_applied_anywhere(cli: Cli, write: Write, form: str, given: str) -> None:
    """In all three forms: here it changes nothing, in an emptied database it brings everything back."""
    cli("config", "apply", write("gateway.toml", DOCUMENT))
    file = cli.folder / f"export.{form}"
    if given == "file":
        assert cli("config", "export", str(file)).out == ""
    else:
        file.write_text(cli("config", "export", "--format", form).out)
    reader = {"toml": tomllib.loads, "yaml": yaml.safe_load, "json": json.loads}[form]
    assert set(reader(file.read_text())) == NAMES

    before = cli.content()
    assert set(cli("config", "apply", str(file), "--json").json["changed"].values()) == {0}
    assert cli.content() == before
    cli("config", "apply", write("empty.json", json.dumps({name: [] for name in NAMES})))
    assert cli.sql("SELECT count(*) FROM listeners") == [(0,)]
    cli("config", "apply", str(file))
    after = cli("config", "export", "--format", form).out
    assert after == file.read_text()


def test_only_named_tables_change(cli: Cli, write: Write) -> None:
    """A row that a document leaves out of a table it names is removed; other tables stay."""
    cli("config", "apply", write("gateway.toml", DOCUMENT))
    before = cli.content()

    changed = cli("config", "apply", write("less.toml", 'tls_policies = [{ domains = ["a.test"] }]'), "--json").json
    assert changed == {"changed": {"tls_policies": 3}}
    after = cli.content()
    assert [after[name] for name in NAMES - {"tls_policies"}] == [before[name] for name in NAMES - {"tls_policies"}]
    assert cli("config", "apply", write("none.toml", "")).out == "nothing named\n"


def test_unique_values_can_change_places(cli: Cli, write: Write) -> None:
    """Two listeners swap their ports, two pools their names: rows are told apart by their ids."""
    cli("config", "apply", write("gateway.toml", DOCUMENT))
    document = json.loads(cli("config", "export", "--format", "json").out)
    first, second = document["upstream_pools"]
    first["name"], second["name"] = second["name"], first["name"]

    done = cli("config", "apply", write("swapped.json", json.dumps(document)), "--json")
    assert done.code == 0, done.err
    assert dict(cli.sql("SELECT id, name FROM upstream_pools")) == {
        first["id"]: first["name"], second["id"]: second["name"],
    }  # fmt: skip


def test_standard_input_will_do(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """`-` is TOML."""
    monkeypatch.setattr("sys.stdin", io.StringIO(DOCUMENT))

    assert cli("config", "apply", "-").code == 0
    assert cli.sql("SELECT count(*) FROM routes") == [(1,)]


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("a.toml", "listeners = [", ["a.toml", "is not TOML"]),
        ("a.json", "{", ["is not JSON"]),
        ("a.yaml", "a: [", ["is not YAML"]),
        ("a.yml", "a:\n\t- b", ["is not YAML"]),
        ("a.yaml", "- a", ["must hold tables by name"]),
        ("a.json", "[]", ["must hold tables by name"]),
        ("a.yaml", "", ["must hold tables by name"]),
        ("a.json", "[" * 100_000, ["nested too deep"]),
        ("a.json", '{"routes": [], "routes": []}', ["'routes' is given twice"]),
        ("a.yaml", "routes: []\nlisteners: []\nroutes: []", ["'routes' is given twice"]),
        ("a.yaml", "a: &x [1]\nb: *x", ["aliases are not read"]),
        ("a.yaml", "listeners: !!python/object/apply:os.system [id]", ["is not YAML"]),
        ("a.yaml", "[1]: []", ["key"]),
        ("a.yaml", "5: []", ["'5': there is no such table"]),
        ("a.toml", "users = []", ["users: there is no such table"]),
        ("a.toml", "listeners = 5", ["listeners: must be an array of tables"]),
        ("a.toml", 'listeners = [{ port = 80, protocol = "gopher" }]', ["protocol 'gopher'", "http, https"]),
        ("a.toml", 'routes = []\nlisteners = [{ port = 99999, protocol = "http" }]', ["listeners ", "port", "99999"]),
        ("a.toml", 'routes = []\nlisteners = [{ port = 0, protocol = "http" }]', ["listeners ", "port"]),
        (
            "a.toml",
            'routes = []\nlisteners = [{ port = 80, protocol = "http" }, { port = 80, protocol = "https" }]',
            ["port", "used by another listener"],
        ),
        (
            "a.toml",
            'listeners = [{ port = 80, protocol = "http" }, { port = 80, protocol = "http" }]',
            ["listeners 2: is the same row as listeners 1"],
        ),
        (
            "a.toml",
            'listeners = [{ port = 443, protocol = "https", tls_policy_id = "nobody" }]',
            ["listeners 1: tls_policy_id 'nobody'", "UUID"],
        ),
        (
            "a.toml",
            f'routes = []\nlisteners = [{{ port = 443, protocol = "https", tls_policy_id = "{NOBODY}" }}]',
            ["tls_policy_id", "names no TLS policy"],
        ),
        (
            "a.toml",
            'listeners = [{ port = 443, protocol = "http" }]',
            ["listeners: ", "is left out, but routes ", "still names it"],
        ),
        ("a.toml", "upstream_pools = []", ["upstream_pools: ", "is left out, but upstream_targets ", "still names it"]),
        ("a.toml", 'upstream_targets = [{ pool_id = "none", address = "a:1" }]', ["pool_id 'none'", "there is none"]),
        (
            "a.toml",
            'upstream_pools = [{ name = "web" }]\nupstream_targets = [{ pool_id = "web", address = "a" }]',
            ["address", "'a'", "host:port"],
        ),
        (
            "a.toml",
            'upstream_pools = [{ name = "web", health_check = { kind = "http" } }, { name = "api" }]',
            ["health_check", "'http'"],
        ),
        ("a.toml", 'upstream_pools = [{ name = "web", health_check = { at = 2026-01-01 } }]', ["JSON"]),
        ("a.toml", 'tls_policies = [{ domains = ["ok.test", "a..b"] }]', ["tls_policies 1: domains: name 'a..b'"]),
        ("a.toml", "tls_policies = [{ domains = [] }]", ["at least one"]),
        ("a.json", '{"listeners": [{"port": 80, "protocol": "http", "name": "\\ud800"}]}', ["no database stores"]),
    ],
)  # fmt: skip
def test_a_wrong_document_changes_nothing(cli: Cli, write: Write, name: str, text: str, parts: list[str]) -> None:
    """One line with table, row, field, value and rule; exit code 2; every table as it was."""
    cli("config", "apply", write("gateway.toml", DOCUMENT))
    content = cli.content()

    cli("config", "apply", write(name, text)).refused(2, *parts)
    assert cli.content() == content


def test_a_file_that_cannot_be_used_is_named(cli: Cli) -> None:
    """Missing, not text, too large; and one that cannot be written."""
    missing, binary, large = (cli.folder / name for name in ("none.toml", "binary.toml", "large.toml"))
    binary.write_bytes(b"\xff\xfe")
    large.write_bytes(b"#" * (10 * 1024 * 1024 + 1))

    cli("config", "apply", str(missing)).refused(2, str(missing), "No such file")
    cli("config", "apply", str(binary)).refused(2, str(binary), "UTF-8")
    cli("config", "apply", str(large)).refused(2, str(large), "10485760")
    cli("config", "export", str(cli.folder / "no" / "folder.toml")).refused(2, "cannot write", "No such file")


def test_a_wrong_row_of_another_program_stops_nobody(cli: Cli, write: Write) -> None:
    """What was wrong before may stay wrong while a person changes something else; nothing new may become wrong."""
    now = "2026-01-01T00:00:00.000000Z"
    cli("config", "apply", write("gateway.toml", DOCUMENT))
    cli.sql(
        "INSERT INTO upstream_targets (id, pool_id, address, created_at, updated_at) "
        "SELECT '00000000-0000-4000-8000-000000000001', id, 'nonsense', ?, ? FROM upstream_pools LIMIT 1",
        now, now,
    )  # fmt: skip

    assert cli("config", "apply", write("policy.toml", 'tls_policies = [{ domains = ["c.test"] }]')).code == 0
    wrong = 'listeners = [{ port = 99999, protocol = "http" }]\nroutes = []'
    cli("config", "apply", write("wrong.toml", wrong)).refused(2, "99999")


def test_an_export_holds_no_key(cli: Cli, write: Write) -> None:
    """It is made to be shared: no certificate, no account, no key-encryption key."""
    cli("config", "apply", write("gateway.toml", DOCUMENT))
    for form in ("toml", "yaml", "json"):
        text = cli("config", "export", "--format", form).out
        assert "PRIVATE" not in text
        assert "cw1." not in text
        assert (cli.data / "kek").read_text().strip() not in text


def test_an_export_obeys_the_umask(cli: Cli) -> None:
    """An ordinary file: the document is no secret."""
    path = cli.folder / "out.toml"
    cli("config", "export", str(path))
    assert stat.S_IMODE(Path(path).stat().st_mode) & 0o400


@pytest.mark.parametrize("form", ["toml", "yaml", "json"])
def test_standard_input_in_every_form(cli: Cli, write: Write, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """What `export --format` prints, `apply - --format` reads, and nothing changes."""
    cli("config", "apply", write("gateway.toml", DOCUMENT))
    monkeypatch.setattr("sys.stdin", io.StringIO(cli("config", "export", "--format", form).out))

    again = cli("config", "apply", "-", "--format", form, "--json")

    assert again.code == 0, again
    assert set(again.json["changed"].values()) == {0}


def test_a_null_inside_a_column_is_left_out_of_toml(cli: Cli, write: Write) -> None:
    """TOML has none; another program's JSON may."""
    cli("config", "apply", write("gateway.json", json.dumps({
        "upstream_pools": [{"name": "web", "health_check": {"kind": "tcp", "timeout_ms": None}}]})))  # fmt: skip
    shown = cli("config", "export")

    assert shown.code == 0, shown
    assert tomllib.loads(shown.out)["upstream_pools"][0]["health_check"] == {"kind": "tcp"}
