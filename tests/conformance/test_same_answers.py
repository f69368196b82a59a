"""An exec through execgate is the exec that the container's own engine would have made.

Engine by engine and container by container, each probe is asked twice, and the answers must be equal. What differs,
and may, is in one table, with the reason; an entry that is no longer true fails as a difference does.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from conformance.conftest import ENGINES, VARIANTS, Side
from conformance.probes import PROBES, Answer, Probe, ask_api, ask_engine
from execgate.oci.capabilities import CAPABILITIES

Likening = Callable[[Answer], Answer]


@dataclass(frozen=True, slots=True)
class Difference:
    """What execgate does otherwise. `liken`, done to both answers, takes out this difference and nothing else."""

    engines: Collection[str]
    probes: Collection[str]
    why: str
    liken: Likening
    variants: Collection[str] = tuple(VARIANTS)
    here: bool | None = True
    """Whether this machine shows it; None: that depends on who started the tests."""

    def concerns(self, engine: str, variant: str, probe: str) -> bool:
        return self.here is not False and engine in self.engines and variant in self.variants and probe in self.probes


def without(pattern: str) -> Likening:
    """Forget what matches in the output; a whole line when the pattern takes its newline."""
    found = re.compile(pattern, re.MULTILINE)
    return lambda answer: replace(answer, output=found.sub("", answer.output))


def without_internal_signals(answer: Answer) -> Answer:
    """Forget whether the signals that glibc keeps for itself, 32 and 33, are ignored."""

    def cleared(found: re.Match[str]) -> str:
        return f"SigIgn:\t{int(found[1], 16) & ~(3 << 31):016x}"

    return replace(answer, output=re.sub(r"SigIgn:\t(\w+)", cleared, answer.output))


def without_code(answer: Answer) -> Answer:
    """Forget the exit code."""
    return replace(answer, code=None)


def only_refused(answer: Answer) -> Answer:
    """Forget everything about a refusal but that it is one."""
    return Answer(None, refusal="refused") if answer.refusal else answer


def without_primary_group(answer: Answer) -> Answer:
    """Forget whether the primary group is among the others, in what `id` prints and in a /proc/PID/status."""
    found = re.search(r"\bgid=(\d+)|^Gid:\t(\d+)", answer.output, re.MULTILINE)
    return answer if found is None else _without_groups(answer, {found[1] or found[2]})


def without_added_groups(answer: Answer) -> Answer:
    """Forget the groups that `--group-add` gives to the containers here: `extra`, which is 2000, and 4000."""
    return _without_groups(answer, {"2000", "4000"})


def _without_groups(answer: Answer, gids: Collection[str]) -> Answer:
    def others(groups: re.Match[str]) -> str:
        # `1000(app),2000(extra)` or `1000 2000 `
        return ",".join(one for one in re.split("[ ,]", groups[0]) if one.partition("(")[0] not in ("", *gids))

    output = re.sub(r"(?<=^Groups:\t).*$", others, answer.output, flags=re.MULTILINE)
    output = re.sub(r"(?<= groups=)\S+", others, output)
    return replace(answer, output=output.replace(" groups=\n", "\n"))  # as `id` does without any


def nothing(_answer: Answer) -> Answer:
    """Forget everything."""
    return Answer(None)


PODMAN = ("podman", "podman-crun")
USERS = ("id-unknown-user", "id-unknown-group")
NOT_FOUND = ("pwd-missing", "no-such-command", "no-such-path")
PRIVILEGED = ("privileges-privileged", "privileges-privileged-root", "privileges-privileged-app")
IN_GROUPS_OF_ANOTHER = (
    *("id-name", "id-number", "id-unlisted-number", "id-name-and-group", "id-numbers", "id-root"),
    *("privileges-of-root", "privileges-of-app", "privileges-of-unlisted-number"),
    *("privileges-privileged-root", "privileges-privileged-app"),
)

_PRIMARY_GROUP = (
    "Podman's exec, unlike its run, leaves the primary group out, so that setgid(2) loses it (CVE-2022-2989)."
)
_EVERY_CAPABILITY = (1 << len(CAPABILITIES)) - 1


def _mask(pid: int | str, name: str) -> int:
    """Return a field of /proc/PID/status that is a set."""
    found = re.search(rf"^{name}:\t(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1], 16)


DIFFERENCES: tuple[Difference, ...] = (
    Difference(
        tuple(ENGINES),
        ["cgroup"],
        "On cgroup v1 a session's processes are found by their place in a hierarchy of the service's own.",
        without(r"(?<=:name=execgate:/)\w+$"),
        here=Path("/sys/fs/cgroup/cpu").exists(),
    ),
    Difference(
        tuple(ENGINES),
        ["signals"],
        "glibc's posix_spawn starts a process with glibc's own signals ignored; no program can mean them.",
        without_internal_signals,
        here=None,  # make and timeout(1) start the tests in the same way: then an engine has some of it from there
    ),
    Difference(
        ["docker", *PODMAN],
        USERS,
        "The user is looked up when the exec is created, so a wrong name is refused there, and no session is left.",
        without_code,
    ),
    Difference(
        ["containerd"],
        USERS,
        "As with the other engines; and the words are Docker's, whose API it is.",
        only_refused,
    ),
    Difference(
        ["docker"],
        NOT_FOUND,
        "dockerd up to 20.10 overwrites the 127 that it means (daemon/exec.go) with 126; newer ones do not.",
        without_code,
    ),
    Difference(
        ["containerd"],
        [*NOT_FOUND, "no-program", "directory-as-program"],
        "ctr ends with 1 whatever was wrong.",
        without_code,
    ),
    Difference(
        ["docker"],
        PRIVILEGED,
        "dockerd up to 20.10 asks for every capability that there is, also for those that it has not itself.",
        nothing,
        here=_mask("self", "CapBnd") & _EVERY_CAPABILITY != _EVERY_CAPABILITY,
    ),
    Difference(
        PODMAN,
        IN_GROUPS_OF_ANOTHER,
        _PRIMARY_GROUP,
        without_primary_group,
        variants=[name for name in VARIANTS if name not in ("number", "capabilities")],
    ),
    Difference(
        PODMAN,
        ["id", "privileges", "privileges-privileged"],
        _PRIMARY_GROUP,
        without_primary_group,
        variants=["user", "number", "locked"],
    ),
    Difference(
        ["podman"],
        IN_GROUPS_OF_ANOTHER,
        f"{_PRIMARY_GROUP} And up to 4.3 it keeps the groups of --group-add from every user but the container's own.",
        lambda answer: without_added_groups(without_primary_group(answer)),
        variants=["number", "capabilities"],
    ),
    Difference(
        ["podman-crun"],
        ["env-of-unlisted-number"],
        "Podman gives a number without a passwd line an empty HOME. runc makes `/` of it, as we do; crun leaves it.",
        without(r"(?<=^HOME=)/$"),
        variants=[name for name in VARIANTS if name not in ("user", "number")],  # the container has a HOME
    ),
    Difference(
        ["containerd"],
        ["id-name", "id-number", "privileges-of-app"],
        "ctr's exec gives a user no groups but the primary one; nerdctl's does, and so do the other engines'.",
        without(r"(,2000\(extra\)|(?<=^Groups:\t1000 )2000 )"),
    ),
    Difference(
        ["containerd"],
        ["env-terminal"],
        "ctr's exec tells a terminal's program nothing of its kind; in Docker's API it is an xterm.",
        without(r"^TERM=xterm\n"),
        variants=[name for name in VARIANTS if name not in ("capabilities", "terminal")],  # they have one
    ),
    Difference(
        ["containerd"],
        ["oom-score"],
        "The bundle names none. containerd's shim hands down its own; a runtime takes an exec's from the bundle only.",
        lambda answer: replace(answer, output=""),
        here=Path("/proc/self/oom_score_adj").read_text() != "1\n",
    ),
    Difference(
        ["containerd"],
        ["descriptors"],
        "ctr's exec has a pipe for stdin, also when nobody writes into it.",
        without(r"^(pipe:\[\]|/dev/null)$"),
    ),
)

# What podman does is the same under both runtimes; what a runtime makes of it shows in these.
_UNDER_CRUN = ("plain", "user", "locked", "terminal")

CASES: list[tuple[str, str, Probe]] = [
    (engine, variant, probe)
    for engine, kind in ENGINES.items()
    for variant in VARIANTS
    for probe in PROBES
    if probe.fits(kind) and (variant == "plain" or not probe.once)
    if engine != "podman-crun" or variant in _UNDER_CRUN
]


@pytest.mark.parametrize(
    ("engine", "variant", "probe"),
    CASES,
    ids=[f"{engine}-{variant}-{probe.name}" for engine, variant, probe in CASES],
)
def test_the_answer_is_the_engine_s_own(sides: Callable[[str], Side], engine: str, variant: str, probe: Probe) -> None:
    side = sides(engine)
    container = side.container(variant)
    theirs, ours = ask_engine(side.engine, container, probe), ask_api(side.api, container, probe)
    known = [one for one in DIFFERENCES if one.concerns(engine, variant, probe.name)]
    for one in (one for one in known if one.here):
        others = [other for other in known if other is not one]
        assert _likened(theirs, others) != _likened(ours, others), f"no longer different: {one.why}"
    assert _likened(ours, known) == _likened(theirs, known)


def test_no_difference_is_about_nothing() -> None:
    for one in DIFFERENCES:
        for engine in one.engines:
            for name in one.probes:
                assert any((engine, name) == (case[0], case[2].name) for case in CASES), (engine, name, one.why)


def _likened(answer: Answer, differences: Collection[Difference]) -> Answer:
    for one in differences:
        answer = one.liken(answer)
    return answer
