"""Mutations that keep the form of JSON: what changes bits alone hardly ever gets past a parser."""

import json
import random
from collections.abc import Sequence
from typing import Any

_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 0.5, 1e308, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, -(2**63) - 1, 10**30),
    *("", "a", "/", "a/b", "\0", "\x1b[31m", "\n", "\ud800", "é", "x" * 300, "0", "-1", "0001-01-01T00:00:00Z"),
    *("9999-12-31T23:59:59-23:59", "2026-01-31T12:00:00.5+00:00", [], {}, [[]], [None], [0], [""], {"": {}}, {"a": 0}),
)
_RAW = (b"1e999", b"-0", b"NaN", b"1" * 5000, b"[" * 3000, b'"\\ud800\\ud800"', b"1.0", b"{", b"}", b",", b'"')


def mutated_json(data: bytes, words: Sequence[str], chance: random.Random) -> bytes:
    """Return JSON that differs from `data` in one place or a few; `words` are keys and texts that mean something.

    What is no JSON object or list is replaced by one.
    """
    try:
        value = json.loads(data)
        for _ in range(chance.choice((1, 1, 1, 2, 4))):
            value = _changed(value, words, chance, depth=0)
        text = json.dumps(value).encode()
    except (ValueError, RecursionError):
        text = json.dumps(_grown({}, words, chance)).encode()
    if chance.random() < 0.1:
        place = chance.randrange(len(text) + 1)
        text = text[:place] + chance.choice(_RAW) + text[place:]
    return text


def words_in(tokens: Sequence[bytes]) -> list[str]:
    """Return the texts among tokens that are JSON texts."""
    found = []
    for token in tokens:
        try:
            value = json.loads(token)
        except ValueError:
            continue
        found += [value] if isinstance(value, str) else []
    return found


def _changed(value: Any, words: Sequence[str], chance: random.Random, depth: int) -> Any:
    """Return a value with one change, here or further down."""
    if depth > 20 or not isinstance(value, dict | list) or chance.random() < 0.15:
        return _new(words, chance) if depth or not isinstance(value, dict | list) else value
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    choice = chance.random()
    if not keys or choice < 0.2:
        return _grown(value, words, chance)
    key = chance.choice(keys)
    copy = value.copy()
    if choice < 0.3:
        del copy[key]
    elif choice < 0.4 and isinstance(copy, dict):
        copy[_word(words, chance)] = copy.pop(key)
    else:
        copy[key] = _changed(value[key], words, chance, depth + 1)
    return copy


def _grown(value: Any, words: Sequence[str], chance: random.Random) -> Any:
    if isinstance(value, dict):
        return value | {_word(words, chance): _new(words, chance)}
    return [*value, _new(words, chance)]


def _new(words: Sequence[str], chance: random.Random) -> Any:
    return chance.choice(_VALUES) if chance.random() < 0.7 else _word(words, chance)


def _word(words: Sequence[str], chance: random.Random) -> str:
    return chance.choice(words) if words else ""
