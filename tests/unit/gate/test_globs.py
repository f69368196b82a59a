"""Globs: what they mean, against fnmatch and a matcher that is slow and plain; and that nothing makes them slow."""

import fnmatch
import time
from functools import cache

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from execgate.gate.globs import Globs


def matches(glob: str, text: str) -> bool:
    return Globs((glob,)).match(text)


@pytest.mark.parametrize(
    ("glob", "yes", "no"),
    [
        ("web", ["web"], ["Web", "web1", "aweb", "web/x", ""]),
        ("web-*", ["web-", "web-1"], ["web", "web-a/b", "xweb-1"]),
        ("*", ["", "a", "a b\nc", "."], ["/", "a/b", ".."]),
        ("?", ["a", "é"], ["", "/", "ab"]),
        ("a?c", ["abc"], ["a/c", "ac"]),
        ("[ab]x", ["ax", "bx"], ["cx", "x"]),
        ("[!ab]x", ["cx"], ["ax", "/x", "x"]),
        ("[a-c]", ["a", "b", "c"], ["d", "-"]),
        ("[a-]", ["a", "-"], ["b"]),
        ("[]a]", ["]", "a"], ["b"]),
        ("[*]", ["*"], ["a", "**"]),
        ("[[]x]", ["[x]"], ["x"]),
        ("[^a]", ["^", "a"], ["b"]),
        ("[\\]", ["\\"], ["a"]),
        ("{a,b}", ["{a,b}"], ["a", "b"]),
        ("a.c+", ["a.c+"], ["abc", "a.cc"]),
        ("/var/log/*", ["/var/log/x", "/var/log/"], ["/var/log", "/var/log/a/b", "/var/log/.."]),
        ("/var/log/**", ["/var/log", "/var/log/", "/var/log/a", "/var/log/a/b"], ["/var/logs", "/var"]),
        ("/var/log/**", [], ["/var/log/..", "/var/log/../../etc/shadow", "/var/log/a/../b"]),
        ("/var/log/**", ["/var/log/..a/b", "/var/log/...", "/var/log/a..b"], []),
        ("/a/../b", ["/a/../b"], ["/b", "/a/x/b"]),
        ("**", ["", "a", "a/b", "/", "//"], ["..", "a/..", "../b"]),
        ("**/app", ["app", "a/app", "a/b/app", "/app"], ["xapp", "app/b"]),
        ("a/**/z", ["a/z", "a/b/z", "a/b/c/z"], ["az", "a", "z", "b/a/z"]),
        ("a/**/**/z", ["a/z", "a/b/z"], ["az"]),
        ("**/a/**/b/c", ["a/b/c", "x/a/b/c/b/c", "a/b/b/c"], ["a/b/d", "a/c/b"]),
        ("*/**", ["", "a", "a/b/c"], []),
        ("prod/*/app", ["prod/pod-1/app"], ["prod/app", "prod/a/b/app"]),
        ("ghcr.io/acme/*:1.*", ["ghcr.io/acme/web:1.2"], ["ghcr.io/acme/x/web:1.2", "ghcrxio/acme/web:1.2"]),
        ("spiffe://example.org/ns/*/sa/ci", ["spiffe://example.org/ns/a/sa/ci"], ["spiffe://example.org/ns/a/b/sa/ci"]),
        ("*.example.org", ["a.example.org", "a.b.example.org"], ["example.org", "a.example.org.evil"]),
    ],
)
def test_what_a_glob_matches(glob: str, yes: list[str], no: list[str]) -> None:
    assert [text for text in yes if not matches(glob, text)] == []
    assert [text for text in no if matches(glob, text)] == []


def test_any_of_several() -> None:
    globs = Globs(("web", "db-*", "**/cache"))
    assert [globs.match(text) for text in ("web", "db-1", "x/cache", "db", "")] == [True, True, True, False, False]
    assert not Globs(()).match("")


@pytest.mark.parametrize(
    ("glob", "said"),
    [
        ("a**", "whole parts"),
        ("***", "whole parts"),
        ("/a/**b", "whole parts"),
        ("[a", "without its"),
        ("[", "without its"),
        ("[]", "without its"),
        ("[!]", "without its"),
        ("[a/b]", "without its"),
        ("[z-a]", "range z-a is empty"),
        ("[+-9]", "slash"),
        ("/a/../*", "match nothing together"),
    ],
)
def test_globs_that_cannot_be_meant(glob: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Globs((glob,))


TEXTS = st.text("ab.-]\n*", max_size=12).filter(lambda text: text != "..")
PIECES = st.sampled_from(["a", "b", ".", "\n", "*", "?", "[ab]", "[!a]", "[!-b]", "[a-b.]", "[*]"])
WITHIN = st.lists(PIECES, max_size=8).map("".join).filter(lambda glob: "**" not in glob)


@given(WITHIN, TEXTS)
@example("*a*b*a", "aabba")
def test_within_a_part_a_glob_is_what_fnmatch_makes_of_it(glob: str, text: str) -> None:
    assert matches(glob, text) == fnmatch.fnmatchcase(text, glob)


def by_parts(glob: str, text: str) -> bool:
    """The definition, and nothing but it."""
    globs, texts = glob.split("/"), text.split("/")

    @cache
    def rest(at: int, part: int) -> bool:
        if at == len(globs):
            return part == len(texts)
        if globs[at] == "**":
            return rest(at + 1, part) or (part < len(texts) and rest(at, part + 1))
        return part < len(texts) and fnmatch.fnmatchcase(texts[part], globs[at]) and rest(at + 1, part + 1)

    return rest(0, 0)


PARTS = st.lists(st.one_of(st.just("**"), WITHIN.filter(lambda part: part != "..")), min_size=1, max_size=6).map(
    "/".join
)
PATHS = st.text("ab/", max_size=16)


@given(PARTS, PATHS)
@example("**/a*b/**/a", "a/ab/b/a")
@example("**/a/b/**/b", "a/a/b/b")
def test_parts_are_matched_as_they_are_defined(glob: str, text: str) -> None:
    assert matches(glob, text) == by_parts(glob, text)


@given(st.text("a.*/[]?!-", max_size=10), st.text("a./", max_size=10))
def test_a_text_that_goes_up_is_matched_by_itself_only(glob: str, text: str) -> None:
    try:
        globs = Globs((glob,))
    except ValueError:
        return
    if ".." in text.split("/") and globs.match(text):
        assert glob == text


@pytest.mark.parametrize(
    "glob",
    [
        "*a" * 30 + "b",
        "*a*a*a*a*a*b/x",
        "**/*a*a*b/*a*a*b/x",
        "**/a/**/a/**/a/**/b",
        "**/" * 20 + "b",
        "*?*?*?*?*?*?b",
        "[ab]*[ab]*[ab]*[ab]*c",
        "**/*a/*a/*a/b",
    ],
)
@pytest.mark.parametrize("unit", ["a", "/", "a/", "ab/", "aaaaaaaaaaaaaaaaaaaaaaaa/"])
def test_no_text_takes_long(glob: str, unit: str) -> None:
    """The longest argument that the kernel takes, made for backtracking: what is not linear takes hours."""
    text = (unit * 131_071)[:131_071]
    globs = Globs((glob,))
    before = time.perf_counter()
    globs.match(text)
    assert time.perf_counter() - before < 5
