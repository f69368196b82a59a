"""`make bench`: execgate, the bare runtime and the engines of this machine, measured in turns."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import machine
from bench.arena import NAMES, RUNTIMES, Arena, open_arena
from bench.contestants import DOCKERD, PODMAN
from bench.engines import EngineProgram, find_engines
from bench.measures import BLOCK, Streaming, Turns
from bench.results import Results
from bench.stored import write

MEASURES = ("memory", "latency", "rate", "throughput", "interactive")
"""In this order: memory is that of a service which has not been under load yet."""

PARALLEL = (1, 8, 32)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    options = _parser().parse_args(arguments)
    if options.quick:
        options.rounds, options.latency_rounds, options.seconds = 1, 5, 0.5
        options.megabytes, options.sessions, options.tries = 64, 5, 20
    if os.geteuid() != 0:
        print("bench: containers of runc and crun need root: run 'sudo make bench'", file=sys.stderr)
        return 1
    begin = time.monotonic()
    engines = [*find_engines(DOCKERD, options.dockerd), *find_engines(PODMAN, options.podman)]
    names, runtimes = options.contestant or NAMES, options.runtime or list(RUNTIMES)
    with open_arena(names, runtimes, engines, _say, options.conmon) as arena:
        results = measure(arena, engines, options)
        results.machine = {**results.machine, "load after": machine.load()}
        # Before everything is ended: what goes wrong with that must not cost the figures.
        print(results.report(), flush=True)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write(results, options.json)
    _say(f"took {time.monotonic() - begin:.0f} s; every sample is in {options.json}")
    return 1 if results.failures or not arena.contestants else 0


def measure(arena: Arena, engines: Sequence[EngineProgram], options: argparse.Namespace) -> Results:
    """Take every measure that is asked for of all contestants."""
    turns = Turns(_say)
    measures = options.only or MEASURES
    results = Results(
        machine.describe(), machine.versions(engines, options.conmon), _plain(options), arena.absent, turns.failures
    )
    if "memory" in measures:
        results.memory = turns.memory(arena.served, options.sessions)
    if "latency" in measures:
        results.latency, results.latency_cpu = turns.latency(
            [*arena.contestants, *arena.guarded], options.latency_rounds
        )
    if "rate" in measures:
        results.rate = {
            parallel: turns.rate(arena.contestants, options.rounds, parallel=parallel, seconds=options.seconds)
            for parallel in PARALLEL
        }
    if "throughput" in measures:
        streaming: list[Streaming] = [*arena.served, *arena.relays]
        results.stdout, results.stdin = turns.throughput(streaming, options.rounds, options.megabytes * BLOCK)
    if "interactive" in measures:
        results.interactive = turns.interactive(arena.served, options.rounds, options.tries)
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of little: shows that all works, not figures")
    parser.add_argument("--only", action="append", choices=MEASURES, help="take only this measure (repeatable)")
    parser.add_argument("--contestant", action="append", choices=NAMES, help="measure only this one (repeatable)")
    parser.add_argument("--runtime", action="append", choices=RUNTIMES, help="use only this runtime (repeatable)")
    for name in (DOCKERD, PODMAN):
        what = f"one more {name}, beside those on the PATH (repeatable)"
        parser.add_argument(f"--{name}", action="append", type=_program, default=[], help=what, metavar="PROGRAM")
    what = "one more conmon for execgate, beside the one on the PATH, told from it by its file name (repeatable)"
    parser.add_argument("--conmon", action="append", type=_program, default=[], help=what, metavar="PROGRAM")
    parser.add_argument("--rounds", type=_positive, default=5, help="rounds of rate and throughput (%(default)s)")
    parser.add_argument("--latency-rounds", type=_positive, default=100, help="rounds of latency (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of one turn of rate (%(default)s)")
    parser.add_argument("--megabytes", type=_positive, default=256, help="MiB in one turn of throughput (%(default)s)")
    parser.add_argument("--sessions", type=_positive, default=50, help="idle sessions (%(default)s)")
    parser.add_argument("--tries", type=_positive, default=200, help="keys and pings in a round (%(default)s)")
    parser.add_argument("--json", type=Path, default=Path("build/bench.json"), help="where samples go (%(default)s)")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _program(text: str) -> Path:
    if not os.access(text, os.X_OK):
        raise argparse.ArgumentTypeError(f"{text} is no program")
    return Path(text)


def _plain(options: argparse.Namespace) -> dict[str, object]:
    """Return the options as JSON has them; where the samples go is none of their properties."""
    plain = {name: value for name, value in vars(options).items() if name != "json"}
    return plain | {name: [path.name for path in plain[name]] for name in (DOCKERD, PODMAN, "conmon")}


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
