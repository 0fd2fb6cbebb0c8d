"""Golden files prove sameness, nginx's own check proves meaning, properties prove that nothing breaks out."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certworker.core.snapshot import Match, PathMatch, Snapshot, read_snapshot
from certworker.errors import InputError
from certworker.node.folder import Folder
from certworker.node.nginx import Nginx, NginxSetup
from certworker.node.pairs import render_pair
from certworker.node.patience import Patience
from certworker.node.state import Lists
from certworker.render.files import RenderedFile, RenderedFiles, ServedFile
from certworker.render.nginx import CONFIG, NginxOptions, render_nginx
from certworker.render.nginx_lists import PairText, literal, quote, render_certificates, render_thumbprints
from tests.node.conftest import Authority, uuid

from .golden import CASES, GOLDEN, load, print_nginx
from .values import hosts, nasty, one_route, paths

OPTIONS = NginxOptions("/srv/gateway", number=42)


def text(snapshot: Snapshot, options: NginxOptions = OPTIONS) -> str:
    return render_nginx(snapshot, options).files[CONFIG].content.decode()


@pytest.mark.parametrize("case", CASES)
def test_the_same_snapshot_gives_the_same_bytes(case: str) -> None:
    """A change here is a change for every gateway: write the golden files anew and read the diff."""
    assert print_nginx(case) == (GOLDEN / case / CONFIG).read_bytes()


@pytest.mark.proxy
@pytest.mark.parametrize("case", CASES)
def test_nginx_accepts_it_without_a_warning(case: str, nginx_binary: Path, authority: Authority) -> None:
    """Warnings count as errors, with certificates and without."""
    with TemporaryDirectory(prefix="certworker-render-") as name:
        folder = Folder(Path(name))
        proxy = Nginx(folder, NginxSetup(nginx_binary), Patience())
        build = proxy._find_build()
        config = {CONFIG: RenderedFile(print_nginx(case, name, build.stream_module, build.version))}
        version = folder.write_version("1", RenderedFiles(config))
        names = ("*.b.test", "a.test")
        line = ServedFile(folder.write_certificate(render_pair(authority.issue(1, *names))), names)
        for served in (frozenset[ServedFile](), frozenset({line})):
            proxy.write_lists(Lists({None: served, uuid(41): served}, {"a.test": "x" * 43}))
            assert proxy.check(version) == ()


@pytest.mark.proxy
def test_what_nginx_complains_of_is_said(nginx_binary: Path) -> None:
    """In one line, without the numbers of processes."""
    with TemporaryDirectory(prefix="certworker-render-") as name:
        folder = Folder(Path(name))
        proxy = Nginx(folder, NginxSetup(nginx_binary), Patience())
        proxy.write_lists(Lists())
        config = print_nginx("empty", name)
        doubled = config.replace(b"    access_log off;\n", b"    access_log off;\n    server_tokens on;\n")
        version = folder.write_version("1", RenderedFiles({CONFIG: RenderedFile(doubled)}))
        with pytest.raises(Exception, match=r'^nginx refuses 1: "server_tokens" directive is duplicate in [^;]*$'):
            proxy.check(version)


def test_newer_versions_are_spoken_to_in_their_words() -> None:
    """Without warnings of what they have replaced, and with what keeps reloads from clients."""
    old, new = text(load("https")), text(load("https"), NginxOptions("/srv/gateway", 42, version=(1, 30, 6)))

    assert " ssl http2" in old
    assert "http2 on;" not in old
    assert " ssl http2" not in new
    assert "http2 on;" in new
    assert "keepalive_min_timeout" in new
    assert "keepalive_min_timeout" not in old


def test_options_say_what_the_machine_decides() -> None:
    """User, limits and addresses are the machine's; IPv6 can be left out; a module is loaded where it is needed."""
    told = text(load("http"), NginxOptions("/srv/gateway", 7, ipv6=False, user="www", max_connections=99))

    assert told.startswith('user "www";\n')
    assert "load_module" not in told
    assert "worker_connections 99;" in told
    assert "[::]" not in told
    assert 'return 200 "7 $lists";' in told
    assert "load_module" not in text(load("https"), NginxOptions("/srv/gateway", 7, stream_module="/m.so"))


def test_a_name_that_does_not_resolve_takes_no_other_target_along() -> None:
    """It is left out; a pool without any other target says 503."""
    snapshot = load("names")
    assert "server 127.0.0.1:8080 " in text(snapshot)
    alone = snapshot.model_dump()
    alone["pools"][0]["targets"] = alone["pools"][0]["targets"][:1]
    assert "return 503;" in text(Snapshot.model_validate(alone))


def test_a_name_leads_to_nothing_of_ours() -> None:
    """An address is left out where port and place are a responder's or another one's of ours; every other one stays."""
    snapshot = json.loads(load("names").canonical())
    snapshot["pools"][0]["targets"][0]["port"] = 8402
    snapshot["responders"] = [{"host": "worker.internal", "port": 8402}]
    addresses = {
        "app.internal": ("127.0.0.1", "192.0.2.1", "192.0.2.7", "192.0.2.8"),
        "worker.internal": ("192.0.2.7",),
    }
    options = NginxOptions("/srv", 1, addresses=addresses, reserved=("0.0.0.0:8402", "192.0.2.8:8400"))
    told = text(read_snapshot(snapshot), options)

    assert re.findall(r"server (\S+:8402) weight", told) == ["192.0.2.1:8402", "192.0.2.8:8402"]
    assert "server 192.0.2.7:8402 max_fails=0;" in told


@pytest.mark.parametrize("folder", ["relative", "/a b", "/a'b", "/a\nb", "/a#b", "/a$b", "/a\\b", "/é", "/a:b", ""])
def test_a_folder_is_written_as_it_is_or_not_at_all(folder: str) -> None:
    """Paths stand unquoted."""
    with pytest.raises(InputError, match="folder"):
        text(Snapshot(), NginxOptions(folder, 1))


def test_a_dollar_is_refused_where_it_would_be_expanded() -> None:
    """nginx has no escape for it."""
    for print_it in (
        lambda: literal("a$b"),
        lambda: render_thumbprints({"a.test": "$host"}),
        lambda: render_certificates(None, [ServedFile("f", ("a.test",))], {"f": PairText("$host", "key")}),
        lambda: render_certificates(None, [ServedFile("f", ("a.test",))], {"f": PairText("chain", "$host")}),
        lambda: text(Snapshot(), NginxOptions("/srv", 1, user="$host")),
    ):
        with pytest.raises(InputError, match=r"expand the \$"):
            print_it()


_TOKEN = re.compile(r'\s+|#[^\n]*|(?P<special>[{};])|"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<plain>[^\s{};"]+)', re.DOTALL)


def words(config: str) -> Iterator[str]:
    """Split a configuration as nginx does, as far as we use its syntax; braces and ends of lines stay special."""
    at = 0
    while at < len(config):
        token = _TOKEN.match(config, at)
        assert token is not None, config[at : at + 40]
        at = token.end()
        if token["special"]:
            yield f"<{token['special']}>"
        elif token["quoted"] is not None:
            # nginx would read \n and its like as something else.
            assert "\\" not in re.sub(r"\\[\\\"]", "", token["quoted"])
            yield re.sub(r"\\(.)", r"\1", token["quoted"])
        elif token["plain"]:
            yield token["plain"]


def parse(config: str) -> list[Any]:
    """Return the directives: a list of words each, with a list of directives at the end of a block's."""
    stack: list[list[Any]] = [[]]
    line: list[Any] = []
    for word in words(config):
        if word == "<;>":
            stack[-1].append(line)
            line = []
        elif word == "<{>":
            stack.append([])
            line.append(stack[-1])
            stack[-2].append(line)
            line = []
        elif word == "<}>":
            stack.pop()
        else:
            line.append(word)
    assert len(stack) == 1
    assert line == []
    return stack[0]


def route_map(snapshot: Snapshot) -> tuple[list[list[str]], list[Any]]:
    """Return the rows of the only listener's route map, and everything else."""
    config = parse(text(snapshot))
    (http,) = (line[-1] for line in config if line[0] == "http")
    (found,) = (line for line in http if line[:1] == ["map"] and line[2] == "$L1_route")
    return found[-1], [line for line in config if line[0] != "http"] + [line for line in http if line is not found]


def takes(match: Match, kind: str, path: str, host: str, upgrade: bool) -> bool:
    """Say what the rendered map says of a request, whose path is decoded and whose host is lower case."""
    rows, _ = route_map(one_route(match, kind))
    (pattern, result) = rows[-1]
    assert (rows[0], result, pattern[0]) == (["default", "none"], "r1", "~")
    return re.search(pattern[1:].replace(r"\z", r"\Z"), f"{path}/{int(upgrade)}{host}") is not None


@given(nasty)
def test_a_value_is_one_word(value: str) -> None:
    """Quoting and splitting come back to the value."""
    assert list(words(f"a {quote(value)} b;")) == ["a", value, "b", "<;>"]


@given(paths)
def test_no_path_breaks_out(given_path: tuple[str, str]) -> None:
    """A path is refused, or it is one word in one row and changes nothing else."""
    kind, value = given_path
    try:
        match = Match(path=PathMatch.model_validate({kind: value}))
    except ValueError:
        return
    rows, others = route_map(one_route(match))

    assert len(rows) == 2
    assert others == route_map(one_route(Match(path=PathMatch(exact="/x"))))[1]


@given(hosts)
def test_no_host_breaks_out(value: str) -> None:
    """The same for a host."""
    try:
        match = Match(host=value)
    except ValueError:
        return
    rows, others = route_map(one_route(match))

    assert len(rows) == 2
    assert others == route_map(one_route(Match()))[1]


request_paths = st.text(alphabet="/ab.-$\n", max_size=8).map("/{}".format)
request_hosts = st.sampled_from(["", "a.test", "b.a.test", "c.b.a.test", "axtest", "[::1]"])


@given(
    st.sampled_from([None, "a.test", "*.a.test", "*.test"]),
    st.none() | st.tuples(st.sampled_from(["exact", "prefix"]), st.text("/ab.-$", max_size=4).map("/{}".format)),
    st.sampled_from(["path", "ws"]),
    request_paths,
    request_hosts,
    st.booleans(),
)
def test_a_route_takes_what_the_model_says(
    host: str | None, part: tuple[str, str] | None, kind: str, path: str, request_host: str, upgrade: bool
) -> None:
    """The rendered pattern and a plain reading of the model agree on every request."""
    try:
        match = Match(host=host, path=PathMatch.model_validate(dict([part])) if part else None)
    except ValueError:
        return
    label, _, rest = request_host.partition(".")
    host_fits = host is None or host == request_host or (bool(label) and host == f"*.{rest}")
    fits = {
        None: True,
        "exact": part is not None and path == part[1],
        "prefix": part is not None and (path == part[1] or path.startswith(part[1].removesuffix("/") + "/")),
    }[part[0] if part else None]

    assert takes(match, kind, path, request_host, upgrade) == (host_fits and fits and (upgrade or kind == "path"))


@given(
    st.sampled_from(["/a", "/a|/b", "^/a$", "/a$|/b", ".*", "[^x]+", "/a.*", "a.*", "/a[$^]*", "/.*/[01]a", "/a\\$"]),
    st.text("/ab$^01.", max_size=8).map("/{}".format),
    request_hosts,
)
def test_a_regex_sees_the_path_and_nothing_else(regex: str, path: str, host: str) -> None:
    """Neither the host nor what stands between them, whatever the pattern or the request look like."""
    match = Match(path=PathMatch(regex=regex))

    assert takes(match, "path", path, host, False) == bool(re.search(rf"\A(?:{regex})\Z", path))


names = st.from_regex(r"(\*\.)?[a-z0-9]{1,8}(\.[a-z]{1,4}){0,2}", fullmatch=True)


@given(st.dictionaries(names, st.text("abc", min_size=1), max_size=4))
def test_thumbprints_come_back_as_they_were(rows: dict[str, str]) -> None:
    """Also for names that are words of nginx's own in a map."""
    rows |= {"default": "a", "include": "b", "hostnames": "c", "volatile": "d"}
    exact = {name: value for name, value in rows.items() if not name.startswith("*")}
    parsed = parse(render_thumbprints(exact).decode())

    assert {key.removeprefix("\\"): value for key, value in parsed} == exact
    assert all(key.startswith("\\") for key, _ in parsed)


@given(st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 9000)), max_size=4))
def test_long_chains_and_keys_come_back_whole(sizes: list[tuple[int, int]]) -> None:
    """In parts, of which nginx can read each."""
    pairs = {f"f{n}": PairText("c\n" * chain + str(n), "k\n" * key + str(n)) for n, (chain, key) in enumerate(sizes)}
    served = [ServedFile(file, (f"{file}.test",)) for file in pairs]
    files = render_certificates(None, served, pairs)
    maps = {line[2]: dict(line[-1]) for line in parse(files["all.maps.conf"].decode())}
    server = dict(line for line in parse(files["all.server.conf"].decode()) if line[0] != "server_name")

    for file, pair in pairs.items():
        number = maps["$c_all"][f"\\{file}.test"]
        for directive, whole in (("ssl_certificate", pair.chain), ("ssl_certificate_key", pair.key)):
            variables = re.findall(r"\$\w+", server[directive])
            assert server[directive] == "data:" + "".join(variables)
            assert "".join(maps[name].get(number, "") for name in variables) == whole
    longest = max(map(len, words(files["all.maps.conf"].decode())), default=0)
    assert longest < 4096


def longest() -> Iterator[Match]:
    """Give what has the longest words when it is printed: nginx reads none of more than 4,096 bytes."""
    host = "*." + ".".join(["a" + "-" * 61 + "a"] * 3 + ["a" + "-" * 57 + "a"])
    for path in ({"prefix": "/" + "." * 1023}, {"prefix": "/" + "\\" * 511}, {"regex": "$" * 64 + "\\\\" * 96}):
        yield Match(host=host, path=PathMatch.model_validate(path))


@pytest.mark.proxy
def test_nginx_takes_every_printable_character(nginx_binary: Path) -> None:
    """All that a path may contain, and all punctuation that a regex may name; the longest words too."""
    path = "/" + "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in "%?#/")
    regex = "/" + "".join(f"\\{character}" for character in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    with TemporaryDirectory(prefix="certworker-render-") as name:
        folder = Folder(Path(name))
        proxy = Nginx(folder, NginxSetup(nginx_binary), Patience())
        proxy.write_lists(Lists())
        every = [
            Match(path=PathMatch.model_validate(one)) for one in ({"exact": path}, {"prefix": path}, {"regex": regex})
        ]
        for number, match in enumerate([*every, *longest()], 1):
            rendered = proxy.render(one_route(match), number)
            assert proxy.check(folder.write_version(str(number), rendered)) == ()


@pytest.mark.proxy
def test_nginx_loads_long_names_and_long_chains(nginx_binary: Path) -> None:
    """A name of 253 characters, and a certificate with a hundred of them."""
    long = ".".join(["a" * 63] * 3 + ["b" * 61])
    with TemporaryDirectory(prefix="certworker-render-") as name:
        folder = Folder(Path(name))
        proxy = Nginx(folder, NginxSetup(nginx_binary), Patience())
        pair = "-----BEGIN CERTIFICATE-----\n" + "A" * 9000 + "\n-----BEGIN PRIVATE KEY-----\nAAAA\n"
        file = folder.write_certificate(pair.encode())
        served = frozenset({ServedFile(file, (long, f"*.{long[64:]}"))})
        proxy.write_lists(Lists({None: served, uuid(41): served}, {long: "x" * 43}))

        assert proxy.check(folder.write_version("1", proxy.render(load("stateless"), 1))) == ()
