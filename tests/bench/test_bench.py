"""The bench's own parts: what it counts, compares and prints is what happened."""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.bench import report, scale
from tests.bench.__main__ import DOCUMENT, SUITE, _parser
from tests.bench.contestants import CONTESTANTS, ROOT
from tests.bench.profile import share
from tests.bench.race import Run, count_good, resident, tree, tree_cpu

PEM = serialization.Encoding.PEM


def pair(*names: str, curve: ec.EllipticCurve | None = None) -> tuple[bytes, bytes]:
    """Return a certificate that signs itself, and its key."""
    key, now = ec.generate_private_key(curve or ec.SECP256R1()), datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(x509.Name([]))
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + timedelta(days=1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), False)
    plain = serialization.NoEncryption()
    key_pem = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, plain)
    return builder.sign(key, hashes.SHA256()).public_bytes(PEM), key_pem


def run(contestant: str, seconds: float, number: int, fault: str = "") -> dict[str, Any]:
    asked = {"POST /order-plz": 100}
    return Run(
        contestant, 100, 100, seconds, 1.0, 1.0, 0.1, 0.0, 40.0, asked, fault, 0.5, round=number
    ).document()  # fmt: skip


def test_only_good_pairs_count() -> None:
    """A certificate counts with its name alone and its own P-256 key, and once."""
    good, other = pair("a.test"), pair("b.test")
    bad = [(good[0], other[1]), pair("c.test", "d.test"), pair("e.test", curve=ec.SECP384R1()), pair("f.test")]

    assert count_good([good, good, *bad], [f"{letter}.test" for letter in "abcde"]) == 1


def test_ratios_are_of_one_round() -> None:
    """A machine that was slow for a while was so for both; what did not count is left out."""
    ours = [run("certworker", 10, 0), run("certworker", 40, 1), run("certworker", 1, 2, "Pebble deadlocked")]
    theirs = [run("minimal", 5, 0), run("minimal", 20, 1), run("minimal", 5, 2)]
    found = report.entries([*ours, *theirs])

    assert report.ratio(found["certworker", 100], found["minimal", 100]) == 0.5


def test_table_and_picture_name_everybody() -> None:
    """Each contestant has a line and a bar; what was run again is told."""
    runs = [run("certworker", 10, 0), run("caddy-free", 5, 0), run("minimal", 1, 0, "Pebble deadlocked")]
    table = "\n".join(report.race_table(runs))
    bars = ET.fromstring(report.picture(runs)).iter("{http://www.w3.org/2000/svg}rect")

    assert "(`caddy-free`) | 100 | 1 | 20 " in table
    assert "| 0.5 x |" in table
    assert "minimal at 100: Pebble deadlocked" in table
    assert len(list(bars)) == 1 + 2


def test_a_tree_is_counted_whole() -> None:
    """What a shell started is the shell's."""
    with subprocess.Popen(["bash", "-c", "sleep 30 & echo; wait"], stdout=subprocess.PIPE) as shell:
        assert shell.stdout is not None
        shell.stdout.readline()
        pids = list(tree(shell.pid))
        memory = [resident(pid) for pid in pids]
        os.kill(pids[1], 9)
        shell.kill()

    assert len(pids) == 2
    assert min(memory) > 0
    assert tree_cpu(os.getpid()) > 0


def test_statements_and_commits_are_counted(tmp_path: Path) -> None:
    """The program does what it does, and what it sent is known by the step that sent it."""
    environ = os.environ | {"CERTWORKER_DATA_DIR": str(tmp_path), "CERTWORKER_ACME_TOS_AGREED": "true"}
    subprocess.run([sys.executable, "-m", "certworker", "init"], env=environ, check=True, capture_output=True)
    command = [sys.executable, "-m", "tests.bench.counted", tmp_path / "counts", "renew", "--dry-run"]
    subprocess.run(command, env=environ, cwd=ROOT, check=True, capture_output=True)
    counts = json.loads((tmp_path / "counts").read_text())

    assert counts["statements"]["all"] > counts["reading commits"]["all"] > 0
    assert any(name.startswith("reconcile.") for name in counts["statements"]["by"])


def test_samples_are_sorted_by_the_outermost_work() -> None:
    """A stack belongs to the step that it is below, and to the first kind that matches."""
    crew = "run (threading.py:1);_work (x/certworker/steps/crew.py:1);"
    found = share([f"{crew}write (x/sqlalchemy/engine/base.py:2) 3", f"{crew}sign (x/certworker/ca/jws.py:2) 2", "a 1"])

    assert dict(found) == {
        ("an issuance moves (crew)", "SQL: statements built, sent, read"): 3,
        ("an issuance moves (crew)", "signing"): 2,
        ("else", "else"): 1,
    }


def test_bulk_rows_are_as_certworker_leaves_them(tmp_path: Path, sqlite_template: Path) -> None:
    """They satisfy every rule of the schema, and so many are due as are said to be."""
    path = tmp_path / "certworker.db"
    shutil.copy(sqlite_template, path)
    scale._fill_sqlite(path, 1000, datetime.now(UTC))
    with sqlite3.connect(path) as connection:
        due = connection.execute(
            "SELECT count(*) FROM lineages WHERE next_check_at < ?", (scale._for_sqlite(datetime.now(UTC)),)
        )
        broken = connection.execute("PRAGMA foreign_key_check").fetchall()

        assert due.fetchone() == (scale.DUE,)
    connection.close()
    assert broken == []


def test_the_suite_measures_every_table() -> None:
    """What `make bench` does fills the marks of docs/performance.md, each of them, with contestants that there are."""
    races = [_parser().parse_args(line.split()) for line in SUITE if line.startswith("race ")]
    others = {line.split()[0] for line in SUITE} - {"race"}
    marks = re.findall(r"<!-- bench: (\w+) -->", DOCUMENT.read_text())

    assert others == {"count", "scale"}
    assert sorted(marks) == sorted(["machine", "counts", "scale", *(race.name for race in races)])
    assert {word.partition(":")[0] for race in races for word in race.contestants} <= CONTESTANTS.keys()


def test_lock_names_no_index() -> None:
    """Whoever installs the peers decides where they come from; the hashes decide which they are."""
    text = (ROOT / "requirements-bench.lock").read_text()

    assert "://" not in text
    assert text.count("==") <= text.count("--hash=sha256:")
