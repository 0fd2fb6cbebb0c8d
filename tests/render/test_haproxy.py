"""Golden files prove sameness, HAProxy's own check proves meaning, properties prove that nothing breaks out."""

import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given

from certworker.core.patterns import replace_end
from certworker.core.snapshot import Match, PathMatch, Snapshot
from certworker.errors import InputError
from certworker.node.folder import Folder
from certworker.node.haproxy import Haproxy, HaproxySetup
from certworker.node.pairs import render_pair
from certworker.node.patience import Patience
from certworker.node.state import Lists
from certworker.render.files import RenderedFile, RenderedFiles, ServedFile
from certworker.render.haproxy import (
    CONFIG,
    HaproxyOptions,
    list_path,
    quote,
    render_crt_list,
    render_haproxy,
    render_thumbprints,
    thumbprints_path,
)
from tests.node.conftest import Authority, uuid

from .golden import CASES, GOLDEN, load, print_haproxy
from .values import hosts, nasty, one_route, paths

OPTIONS = HaproxyOptions("/srv/gateway", number=42)


def text(snapshot: Snapshot, options: HaproxyOptions = OPTIONS) -> str:
    return render_haproxy(snapshot, options).files[CONFIG].content.decode()


@pytest.mark.parametrize("case", CASES)
def test_the_same_snapshot_gives_the_same_bytes(case: str) -> None:
    """A change here is a change for every gateway: write the golden files anew and read the diff."""
    assert print_haproxy(case) == (GOLDEN / case / CONFIG).read_bytes()


@pytest.mark.proxy
@pytest.mark.parametrize("case", CASES)
def test_haproxy_accepts_it_without_a_warning(case: str, haproxy_binary: Path, authority: Authority) -> None:
    """Warnings count as errors, once there is a certificate to serve."""
    with TemporaryDirectory(prefix="certworker-render-") as name:
        folder = Folder(Path(name))
        line = ServedFile(folder.write_certificate(render_pair(authority.issue(1, "a.test"))), ("a.test",))
        for listener in load(case).listeners:
            crt_list = Path(list_path(name, listener.tls_policy_id))
            crt_list.write_bytes(render_crt_list([line]))
        Path(thumbprints_path(name)).write_bytes(render_thumbprints({"a.test": "x" * 43}))
        config = folder.path / CONFIG
        config.write_bytes(print_haproxy(case, name))
        command = [str(haproxy_binary), "-dW", "-c", "-f", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    assert done.returncode == 0, done.stderr
    assert "[WARNING]" not in done.stderr


@pytest.mark.proxy
def test_an_empty_crt_list_is_the_one_expected_warning(haproxy_binary: Path) -> None:
    """HAProxy warns of an https listener without certificates; nothing else goes unsaid."""
    with TemporaryDirectory(prefix="certworker-render-") as name:
        folder = Folder(Path(name))
        proxy = Haproxy(folder, HaproxySetup(haproxy_binary), Patience())
        proxy.write_lists(Lists({None: frozenset(), uuid(41): frozenset()}))
        rendered = proxy.render(load("https"), 1)
        assert proxy.check(folder.write_version("1", rendered)) == ()

        config = rendered.files[CONFIG].content.replace(b"    timeout client 60s\n", b"")
        (warning, *_) = proxy.check(folder.write_version("2", RenderedFiles({CONFIG: RenderedFile(config)})))
        assert "missing timeouts" in warning


def test_the_challenge_route_comes_first_everywhere() -> None:
    """In every frontend that reads HTTP, no rule of a user's stands before it."""
    frontends = re.split(r"\n(?=frontend |backend )", text(load("https")))

    for frontend in (part for part in frontends if part.startswith("frontend")):
        rules = [line.strip() for line in frontend.splitlines() if " deny " in line or " return " in line]
        backends = [line.strip() for line in frontend.splitlines() if "use_backend" in line]
        assert all("acme_path" in rule for rule in rules)
        assert backends[0] == "use_backend acme_responder if acme_path"


def test_options_say_what_the_machine_decides() -> None:
    """User, group and limit are rendered only when given; IPv6 can be left out."""
    snapshot = load("http")
    told = text(snapshot, HaproxyOptions("/srv/gateway", 7, ipv6=False, user="www", group="www", max_connections=99))

    assert not re.search(r"^    (user|group|maxconn|chroot) ", text(snapshot), re.MULTILINE)
    assert "    user 'www'\n    group 'www'\n    maxconn 99\n" in told
    assert "description 'cfgver=7'" in told
    assert "    bind 0.0.0.0:80\n" in told


@pytest.mark.parametrize("folder", ["relative", "/a b", "/a'b", "/a\nb", "/a#b", "/a$b", "/a\\b", "/é", "/a:b", ""])
def test_a_folder_is_written_as_it_is_or_not_at_all(folder: str) -> None:
    """Paths stand unquoted in crt-lists and commands."""
    with pytest.raises(InputError, match="folder"):
        text(Snapshot(), HaproxyOptions(folder, 1))


@pytest.mark.parametrize("character", [b"\x00", b"\r", b"\t", b"\x1b", b"\x7f"])
def test_control_characters_are_caught_at_the_end(character: bytes) -> None:
    """Whatever a renderer let through."""
    with pytest.raises(InputError, match="control character"):
        RenderedFiles({"x": RenderedFile(b"global\n" + character)})


def words(line: str) -> list[str]:
    """Split a line as HAProxy does, as far as we use its syntax: blanks, single quotes, a quoted quote."""
    found = re.findall(r"(?:'[^']*'|\\'|[^\s'\\])+", line)
    return [re.sub(r"'([^']*)'|\\'", lambda part: part[1] if part[1] is not None else "'", word) for word in found]


@given(nasty)
def test_a_value_is_one_word(value: str) -> None:
    """Quoting and splitting come back to the value (without the line ends that no value has)."""
    value = re.sub(r"\s", "", value)

    assert words(f"a -- {quote(value)} b") == ["a", "--", value, "b"] if value else True


@given(paths)
def test_no_path_breaks_out(given_path: tuple[str, str]) -> None:
    """A path is refused, or it is one word in a line of its own and changes nothing else."""
    kind, value = given_path
    try:
        match = Match(path=PathMatch.model_validate({kind: value}))
    except ValueError:
        return
    plain = text(one_route(Match(path=PathMatch.model_validate({kind: "/x"})))).splitlines()
    lines = text(one_route(match)).splitlines()
    patterns = [line for line in lines if line.startswith("    acl r1_path")]

    whole = replace_end(value, r"\z")
    assert {words(line)[-1] for line in patterns} <= {value, f"{value}/", rf"^(?:{whole})\z"}
    assert [line for line in lines if line not in patterns] == [
        line for line in plain if not line.startswith("    acl r1_path")
    ]


@given(hosts)
def test_no_host_breaks_out(value: str) -> None:
    """A host is refused, or it is one word."""
    try:
        match = Match(host=value)
    except ValueError:
        return
    (pattern,) = (line for line in text(one_route(match)).splitlines() if line.startswith("    acl r1_host"))

    last = words(pattern)[-1]
    assert last == value.lower() or re.fullmatch(last, value.lower().replace("*", "label"))


@pytest.mark.proxy
def test_haproxy_takes_every_printable_character(haproxy_binary: Path) -> None:
    """All that a path may contain, and all punctuation that a regex may name, passes the real check."""
    path = "/" + "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in "%?#/")
    regex = "/" + "".join(f"\\{character}" for character in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    with TemporaryDirectory(prefix="certworker-render-") as name:
        folder = Folder(Path(name))
        proxy = Haproxy(folder, HaproxySetup(haproxy_binary), Patience())
        for number, match in enumerate((PathMatch(exact=path), PathMatch(prefix=path), PathMatch(regex=regex)), 1):
            rendered = proxy.render(one_route(Match(path=match)), number)
            assert proxy.check(folder.write_version(str(number), rendered)) == ()
