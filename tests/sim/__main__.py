"""`make sim ARGS="--seeds 10000"`: many simulated meshes; each failing seed is printed with the command that repeats it."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Sequence

from tests.sim.many import many
from tests.sim.world import Simulation, forget_template


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 when a seed fails."""
    parser = argparse.ArgumentParser(prog="sim", description="Simulate the control plane and its agents on virtual time.")
    parser.add_argument("--seeds", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, help="one seed, with its story")
    parser.add_argument("--actions", type=int, default=14)
    parser.add_argument("--faults", choices=["all", "read"], default="all")
    args = parser.parse_args(argv)
    if args.seed is not None:
        return _one(args.seed, args.actions, args.faults)
    began = time.monotonic()
    outcomes = many(range(args.first, args.first + args.seeds), actions=args.actions, faults=args.faults, say=True)
    failed = [o.seed for o in outcomes if o.failed]
    virtual, checks = sum(o.virtual_s for o in outcomes), sum(o.checks for o in outcomes)
    spent = time.monotonic() - began
    print(f"{len(outcomes)} seeds, {len(failed)} failed {failed or ''}, {virtual:.0f} virtual s in {spent:.1f} s, {checks} checks")
    return int(bool(failed))


def _one(seed: int, actions: int, faults: str) -> int:
    """One seed with its story."""
    one = Simulation(seed, actions=actions, faults=faults)
    try:
        one.run()
        failed = False
    except Exception:
        traceback.print_exc()
        failed = True
    finally:
        forget_template()
    print("\n".join(one.story))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
