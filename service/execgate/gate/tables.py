"""A rule as it is written: what a `[[rule]]` may hold, and what it means.

Everything is judged here, in words for whoever wrote it; `gate.rules` gets numbers, ranges and globs that can be meant.
Names of users and groups are looked up now, once, and are numbers from then on.
"""

import difflib
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeGuard

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    field_validator,
)

from execgate.gate.globs import Globs
from execgate.gate.rules import ALL_VERBS, Argv, IdRange, Label, Rule, Who
from execgate.model.access import Record, Verb
from execgate.model.config import OnDisconnect
from execgate.model.container import EngineName
from execgate.model.durations import parse_duration
from execgate.model.principal import certificate_name
from execgate.oci.text import shown

_MAX_ID = 2**32 - 2  # the last one means "no change" to the kernel, setreuid(2)
_MAX_SECONDS = 30 * 86400

Ids = Callable[[str, str], int | None]
"""Looks up a `user` or `group` by name: its number. Raises ValueError, or returns None for one that is to be nobody."""


def _texts(value: object) -> list[str]:
    """Return a list of texts, as one alone may be written too."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("a list of texts is expected")
    if not texts:
        raise ValueError("an empty list would allow nothing; leave the key out if anything is meant")
    return texts


def _globs(value: object) -> Globs:
    texts = _texts(value)
    if "" in texts:
        raise ValueError("an empty text matches nothing")
    return Globs(tuple(texts))


def _workdirs(value: object) -> Globs:
    texts = _texts(value)
    for text in texts:
        if not text.startswith(("/", "**/")) and text != "**":
            raise ValueError(f"{text!r} is not absolute")
        if {"", ".", ".."}.intersection(text.split("/")[1:]) and text != "/":
            raise ValueError(f"{text!r}: write it without `..`, `.`, `//`, or a slash at the end")
    return Globs(tuple(texts))


def _labels(value: object) -> tuple[Label, ...]:
    found = []
    for text in _texts(value):
        name, equals, rest = text.partition("=")
        if not name:
            raise ValueError(f"{text!r}: KEY or KEY=GLOB is expected")
        found.append(Label(name, Globs((rest,)) if equals else None))
    return tuple(found)


def _argv(value: object) -> tuple[Argv, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(one, list) and one for one in value):
        raise ValueError('a list of lists is expected, one for each command: [["ls", "*"], ["df"]]')
    return tuple(_command(one) for one in value)


def _command(texts: list[Any]) -> Argv:
    *arguments, last = _texts(texts)
    rest = last == "**"
    arguments += [] if rest else [last]
    if "**" in arguments:
        raise ValueError("`**` by itself means any further arguments, and must be the last; `*/**` is any one argument")
    if not arguments:
        raise ValueError("the program is missing; leave argv out if any command is meant")
    return Argv(tuple(Globs((text,)) for text in arguments), rest)


def _id_ranges(value: object) -> tuple[IdRange, ...]:
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ValueError("an empty list would allow nothing; leave the key out if anything is meant")
    return tuple(_id_range(str(item) if _is_number(item) else item) for item in items)


def _id_range(item: object) -> IdRange:
    found = re.fullmatch(r"([0-9]{1,10})(?:-([0-9]{1,10}))?", item) if isinstance(item, str) else None
    if found is None:
        hint = "names are the container's to give, so only numbers can be trusted"
        raise ValueError(f"{shown(str(item))!r} is neither a number nor a range like 1000-1999 ({hint})")
    first, last = int(found[1]), int(found[2] or found[1])
    if not first <= last <= _MAX_ID:
        raise ValueError(f"{item!r} is no range within 0-{_MAX_ID}")
    return first, last


def _seconds(value: object) -> float:
    """Return a time: a number of seconds, or a text like `90s`, `5m`, `2h`."""
    if _is_number(value):
        seconds = min(value, 2 * _MAX_SECONDS)  # an integer of TOML can be too large for a float
    elif isinstance(value, str):
        seconds = parse_duration(value)
    else:
        raise ValueError("a number of seconds is expected, or a text like 30s, 5m, 2h")
    if not 0 < seconds <= _MAX_SECONDS:
        raise ValueError(f"more than 0 and at most {_MAX_SECONDS // 86400} days is expected")
    return float(seconds)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _tty(value: object) -> bool | None:
    if value == "any" or isinstance(value, bool):
        return None if value == "any" else bool(value)
    raise ValueError('true, false or "any" is expected')


_DISCONNECTS = {choice.value or "docker": choice for choice in OnDisconnect}


def _disconnects(value: object) -> tuple[OnDisconnect, ...]:
    texts = _texts(value)
    if unknown := [text for text in texts if text not in _DISCONNECTS]:
        raise ValueError(f"{shown(unknown[0])!r} is none of {', '.join(_DISCONNECTS)}")
    return tuple(_DISCONNECTS[text] for text in texts)


def _others(value: frozenset[Verb]) -> frozenset[Verb]:
    if Verb.TOP in value:
        raise ValueError("top is about a container and not a session: it belongs to verbs")
    return value


def _who(value: object, info: ValidationInfo) -> Who:
    found: dict[str, list[str]] = {"user": [], "uid": [], "group": [], "gid": [], "cert": [], "token": []}
    texts = _texts(value)
    for text in texts:
        kind, _, rest = text.partition(":")
        if kind not in found or not rest:
            expected = "user:NAME, uid:N, group:NAME, gid:N, cert:GLOB or token:GLOB is expected"
            raise ValueError(f"{shown(text)!r}: {expected}; there is none for everybody")
        found[kind].append(rest)
    assert info.context is not None
    look_up: Ids = info.context
    by_name = {kind: [look_up(kind, name) for name in found[kind]] for kind in ("user", "group")}
    return Who(
        text=", ".join(texts),
        uids=frozenset([*map(_number, found["uid"]), *(one for one in by_name["user"] if one is not None)]),
        gids=frozenset([*map(_number, found["gid"]), *(one for one in by_name["group"] if one is not None)]),
        certificates=Globs(tuple(map(certificate_name, found["cert"]))),
        tokens=Globs(tuple(found["token"])),
    )


def _number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) > _MAX_ID:
        raise ValueError(f"{shown(text)!r} is no number within 0-{_MAX_ID}; names are user:NAME and group:NAME")
    return int(text)


_Globs = Annotated[Globs, PlainValidator(_globs)]
_Seconds = Annotated[float, PlainValidator(_seconds)]
_Ids = Annotated[tuple[IdRange, ...], PlainValidator(_id_ranges)]
_Flag = Annotated[bool, Field(strict=True)]


def _many(value: object) -> object:
    """Let a single text stand for a list of one."""
    return [value] if isinstance(value, str) else value


class RuleTable(BaseModel):
    """A `[[rule]]` as it is written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)]
    who: Annotated[Who, PlainValidator(_who)]
    engines: Annotated[frozenset[EngineName], Field(min_length=1), BeforeValidator(_many)] | None = None
    containers: _Globs | None = None
    labels: Annotated[tuple[Label, ...], PlainValidator(_labels)] = ()
    images: _Globs | None = None
    users: _Ids | None = None
    gids: _Ids | None = None
    privileged: _Flag = False
    host_equivalent: _Flag = False
    tty: Annotated[bool | None, PlainValidator(_tty)] = None
    argv: Annotated[tuple[Argv, ...], PlainValidator(_argv)] | None = None
    env: _Globs | None = None
    workdirs: Annotated[Globs, PlainValidator(_workdirs)] | None = None
    max_time: _Seconds | None = None
    idle_time: _Seconds | None = None
    on_disconnect: Annotated[tuple[OnDisconnect, ...], PlainValidator(_disconnects)] = ()
    verbs: Annotated[frozenset[Verb], BeforeValidator(_many)] = ALL_VERBS
    others: Annotated[frozenset[Verb], BeforeValidator(_many), AfterValidator(_others)] = frozenset()
    max_sessions: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] | None = None
    record: Literal["output", "all"] | None = None
    record_failure: Literal["open", "closed"] | None = None

    @field_validator("record_failure")
    @classmethod
    def _check_record_failure(cls, value: str | None, info: ValidationInfo) -> str | None:
        if info.data.get("record", "") is None:
            raise ValueError("nothing is recorded without record")
        return value

    def rule(self) -> Rule:
        """Return what it means."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        failure, record = values.pop("record_failure"), values.pop("record")
        return Rule(**values, record=Record(record or ""), record_or_end=failure == "closed")


def in_words(problem: Any) -> str:
    """Return what is wrong with a key, as pydantic found it."""
    kind, message = problem["type"], str(problem["msg"]).removeprefix("Value error, ")
    if kind == "missing":
        return "every rule needs it"
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(str(problem["loc"][0]), RuleTable.model_fields, 1)
        return "a rule has no such key" + (f"; is {close[0]} meant?" if close else "")
    if kind == "string_pattern_mismatch":
        return "small letters, digits, and . _ - behind the first"
    return shown(message[:1].lower() + message[1:], 400)
