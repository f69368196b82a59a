"""Every parser against hostile input: what was a finding once, what hypothesis makes up, and what is long.

`make fuzz` does the same for as long as one likes, guided by coverage; what it finds belongs into `corpus/`.
"""

import logging
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.mutation import mutated_json, words_in
from fuzz.table import CORPUS, TARGETS, corpus

EXAMPLES = 150
LONG = 64 * 1024
BUDGET = 5.0
"""Seconds of processor time for `LONG` bytes, of which milliseconds are needed. With a step for each pair of bytes it
would be minutes."""


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    """What a parser says of each input is nobody's to read."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def test_every_directory_of_the_corpus_belongs_to_a_target() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)
    assert all(corpus(name) for name in TARGETS)


@pytest.mark.parametrize(
    "path", [path for name in TARGETS for path in corpus(name)], ids=lambda path: f"{path.parent.name}-{path.name}"
)
def test_the_corpus(path: Path) -> None:
    TARGETS[path.parent.name].check(path.read_bytes())


def inputs(name: str) -> st.SearchStrategy[bytes]:
    """Return input like a target's: words of it in any order, what is in its corpus with an edit, and mere bytes."""
    target = TARGETS[name]
    seeds = st.sampled_from([path.read_bytes() for path in corpus(name)])
    soup = st.lists(st.sampled_from(target.tokens) | st.binary(max_size=3), max_size=12).map(b"".join)
    place = st.integers(0, target.max_length)
    edited = st.builds(
        lambda seed, at, gone, new: seed[:at] + new + seed[at + gone :], seeds, place, st.integers(0, 20), soup
    )
    if not target.is_json:
        return soup | edited
    words = words_in(target.tokens)

    def mutated(seed: bytes, number: int, times: int) -> bytes:
        chance = random.Random(number)
        head, newline, rest = seed.partition(b"\n") if target.has_first_line else (b"", b"", seed)
        for _ in range(times):
            rest = mutated_json(rest, words, chance)
        return head + newline + rest

    return soup | edited | st.builds(mutated, seeds, st.integers(0, 2**32), st.integers(1, 4))


@pytest.mark.parametrize("name", TARGETS)
def test_made_up_input(name: str) -> None:
    """The same examples each time: who wants others runs `make fuzz`."""

    @settings(max_examples=EXAMPLES, derandomize=True, database=None)
    @given(inputs(name))
    def check(data: bytes) -> None:
        TARGETS[name].check(data)

    check()


@pytest.mark.parametrize("name", TARGETS)
def test_long_input_takes_no_longer_than_its_length(name: str) -> None:
    target = TARGETS[name]
    head = corpus(name)[0].read_bytes().partition(b"\n")[0] + b"\n" if target.has_first_line else b""
    for token in target.tokens:
        begun = time.process_time()
        target.check(head + token * (LONG // len(token)))
        assert time.process_time() - begun < BUDGET, token
