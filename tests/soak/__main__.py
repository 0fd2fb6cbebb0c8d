"""`python -m tests.soak`: a soak by hand; ends with 1 if any oracle fails, and leaves its folder then."""

import argparse
import secrets
import shutil
import signal
import sys
from datetime import timedelta
from pathlib import Path
from tempfile import mkdtemp

from .run import LIFE, Plan, soak

KILLS = ("SIGKILL",)


def main() -> int:
    """Read the command line, run the soak, print what came of it."""
    asked = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # on the way out everything is ended
    plan = _plan(asked)
    print(f"seed {plan.seeds[0]}, {plan.workers} workers on {plan.database}, {plan.names} names", flush=True)
    folder = asked.folder or Path(mkdtemp(prefix="certworker-soak-"))
    folder.mkdir(exist_ok=True)
    outcome = soak(plan, folder, tell=lambda line: print(line, flush=True))
    print("\n".join(outcome.lines()))
    if outcome.faults:
        print(f"logs: {folder}")
        return 1
    if asked.folder is None:
        shutil.rmtree(folder)
    return 0


def _plan(asked: argparse.Namespace) -> Plan:
    seed = asked.seed if asked.seed is not None else secrets.randbelow(10**6)
    workers = 1 if asked.database == "sqlite" else asked.workers
    plan = Plan(asked.minutes * 60, (seed,), workers, asked.database, asked.names, timedelta(seconds=asked.life))
    changes = {
        "ca_resets": asked.ca_resets,
        "by_hand": asked.minutes < 5,
        "every": asked.every,
        "renew_per_second": asked.renew,
    }
    if asked.issue:
        changes |= {"names": asked.issue, "until_issued": True, "only": KILLS if asked.kills else ()}
    return Plan(**{**plan.__dict__, **changes})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=10, help="of faults (10); with --issue, at most")
    add("--workers", type=int, default=4, help="processes (4); on sqlite always one")
    add("--database", choices=["postgresql", "sqlite"], default="postgresql")
    add("--seed", type=int, help="chooses the faults; random and printed if not given")
    add("--names", type=int, default=40, help="certificates for one name each (40)")
    add("--life", type=int, default=int(LIFE.total_seconds()), help="seconds that a certificate is valid (240)")
    add("--every", type=float, default=1.2, help="seconds between two faults, on average (1.2)")
    add("--renew", type=int, default=2, help="certificates renewed each second, besides those that are due (2)")
    add("--ca-resets", action="store_true", help="the CA forgets everything now and then")
    add("--issue", type=int, help="so many certificates of 90 days, each once, instead of renewals")
    add("--kills", action="store_true", help="with --issue: workers are killed meanwhile")
    add("--folder", type=Path, help="where logs and files stay; else a temporary one, kept if an oracle fails")
    return parser


sys.exit(main())
