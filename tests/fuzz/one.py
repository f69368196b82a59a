"""One target under atheris, in a process of its own: `python -m fuzz.one NAME [libFuzzer's arguments]`.

libFuzzer ends its process without Python's farewells; what a target makes on disk is below $TMPDIR, which is the
parent's to remove.
"""

import logging
import random
import sys
from collections.abc import Callable

import atheris

with atheris.instrument_imports(include=["execgate"]):
    from fuzz.table import TARGETS
from fuzz.mutation import mutated_json, words_in
from fuzz.target import Target


def main() -> None:
    """Fuzz the target that the command line names."""
    target = TARGETS[sys.argv.pop(1)]
    logging.disable()  # what a parser says of each input is nobody's to read
    options = {"custom_mutator": _mutator(target)} if target.is_json else {}
    atheris.Setup(sys.argv, target.check, **options)
    atheris.Fuzz()


def _mutator(target: Target) -> Callable[[bytes, int, int], bytes]:
    """Return a mutator that keeps the form of JSON every other time."""
    words = words_in(target.tokens)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        chance = random.Random(seed)
        head, newline, rest = data.partition(b"\n") if target.has_first_line else (b"", b"", data)
        if chance.random() < 0.5:
            mutated = head + newline + mutated_json(rest, words, chance)
            if len(mutated) <= max_size:
                return mutated
        return bytes(atheris.Mutate(data, max_size))

    return mutate


if __name__ == "__main__":
    main()
