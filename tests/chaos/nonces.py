"""Measures what refused nonces cost: `python -m tests.chaos.nonces [PERCENT ...] [--count N]`.

A worker in a process of its own, on SQLite, with its own settings and no clock but the real one. Ten names are
wanted at a time. What is printed are the figures of promise G6.
"""

import argparse
import statistics
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

from sqlalchemy import select, text

from certworker.cli.pebble import Pebble
from certworker.store.tables import issuances

from .proxy import FaultProxy
from .worker import Rig, rigged

_AT_ONCE = 10
_HOPELESS = 60.0
"""Seconds that a CA is watched which refuses every nonce."""


def main() -> None:
    """Measure, and print a line for each percentage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("percent", type=int, nargs="*", default=[5, 50, 90, 100])
    parser.add_argument("--count", type=int, default=100)
    asked = parser.parse_args()
    for percent in asked.percent:
        print(measure(percent, asked.count), flush=True)


def measure(percent: int, count: int) -> str:
    """Issue `count` certificates at a CA that refuses so many nonces, and say what it took."""
    with TemporaryDirectory(prefix="cw-nonces-") as name:
        folder = Path(name)
        url = f"sqlite:///{folder / 'data' / 'certworker.db'}"
        (folder / "data").mkdir(mode=0o700)
        with (
            redirect_stdout(StringIO()),  # a rig shows its log when it ends
            Pebble(nonce_reject=percent, authz_reuse=0) as ca,
            FaultProxy(ca, folder / "proxy") as proxy,
            rigged(ca, proxy, folder, url, LOG_LEVEL="warning") as rig,
        ):
            rig.worker.start()
            return _hopeless(rig) if percent >= 100 else _all(rig, percent, count)


def _all(rig: Rig, percent: int, count: int) -> str:
    started, wanted = time.monotonic(), 0
    while (done := len(durations(rig))) < count:
        while wanted < count and wanted - done < _AT_ONCE:
            rig.want(f"{wanted}.nonces.test")
            wanted += 1
        time.sleep(0.2)
    took, posts = durations(rig), rig.proxy.posts()
    assert len(rig.ledger()) == count, "one certificate each"
    opened, whole = rig.worker.said().count("ca.unavailable"), time.monotonic() - started
    rig.worker.stop()
    return (
        f"{percent:3} % refused: {count} issued in {whole:.0f} s, each in {statistics.median(took):.1f} s (median), "
        f"{statistics.quantiles(took, n=20)[-1]:.1f} s (19 of 20), {max(took):.1f} s (most); "
        f"{sum(one > 300 for one in took)} took more than 5 min; {posts / count:.1f} POSTs each; "
        f"{opened} times nobody asked the CA"
    )


def _hopeless(rig: Rig) -> str:
    rig.want(*[f"{number}.nonces.test" for number in range(_AT_ONCE)])
    time.sleep(_HOPELESS)
    state, error = rig.db.read(lambda tx: tx.execute(text("SELECT state, error FROM ca_breakers")).one())
    told = rig.worker.said().count("ca.unavailable")
    rig.worker.stop()
    return f"100 % refused: {rig.proxy.posts()} POSTs in {_HOPELESS:.0f} s; CA {state}, told {told} time(s): {error}"


def durations(rig: Rig) -> list[float]:
    """Return the seconds from the queue to the certificate, of those that are done."""
    done = select(issuances.c.created_at, issuances.c.closed_at).where(issuances.c.state == "done")
    rows = rig.db.read(lambda tx: tx.execute(done).all())
    return [(row.closed_at - row.created_at).total_seconds() for row in rows]


if __name__ == "__main__":
    main()
