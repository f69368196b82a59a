"""Which runtime a program is, and what is known against that version as far as an exec is concerned."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT = 10.0
_VERSION = re.compile(r"\b(runc|crun) version v?(\d+)\.(\d+)(?:\.(\d+))?(\S*)")
_CANDIDATE = re.compile(r"[-~]rc\.?(\d+)")  # Debian writes 1.0.0~rc93+ds1
_RELEASE = 10**6

Number = tuple[int, int, int, int]
"""A version. The last part is the number of a release candidate; `_RELEASE`, which is more, without one."""


@dataclass(frozen=True, slots=True)
class _Hole:
    """A known one. It is closed in the first release of each line of `fixed`, and in all lines after the last one."""

    runtime: str
    name: str
    what: str
    fixed: tuple[Number, ...]

    def is_in(self, number: Number) -> bool:
        same_line = [first for first in self.fixed if first[:2] == number[:2]]
        return number < (same_line[0] if same_line else self.fixed[-1])


def _released(*number: int) -> Number:
    major, minor, patch = number
    return major, minor, patch, _RELEASE


_CAPABILITIES = "exec --cap, which execgate does not use, gives inheritable capabilities"

_HOLES = (
    _Hole("runc", "CVE-2022-29162", _CAPABILITIES, (_released(1, 1, 2),)),
    _Hole("runc", "CVE-2024-21626", "an exec can reach the host through a leaked descriptor", (_released(1, 1, 12),)),
    # opencontainers/runc pull request 3999: until then the numbers of groups were names again in the container.
    _Hole("runc", "runc#3999", "a group named like a gid of an exec takes that one's place", ((1, 3, 0, 1),)),
    _Hole(
        "runc",
        "CVE-2025-52881",
        "a container can redirect what an exec writes below /proc",
        (_released(1, 2, 8), _released(1, 3, 3), (1, 4, 0, 3)),
    ),
    _Hole("crun", "CVE-2022-27650", _CAPABILITIES, (_released(1, 4, 4),)),
)


@dataclass(frozen=True, slots=True)
class RuntimeVersion:
    """What a runtime's program says of itself. `text` is for people; `warnings` are the holes that it may have."""

    text: str
    usable: bool = True
    warnings: tuple[str, ...] = ()


def runtime_version(program: Path) -> RuntimeVersion:
    """Run `program --version`. Blocks, for seconds at most; a program that cannot be run is an answer, too."""
    try:
        done = subprocess.run(
            [str(program), "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT,
            check=False,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = error.strerror if isinstance(error, OSError) else "it does not end"
        return RuntimeVersion(f"cannot be run: {reason}", usable=False)
    if done.returncode:
        return RuntimeVersion(f"--version ends with exit code {done.returncode}", usable=False)
    return parse_version(done.stdout.decode(errors="replace"))


def parse_version(output: str) -> RuntimeVersion:
    """Read what runc or crun prints; anything else is shown as it is, and nothing is known against it."""
    found = _VERSION.search(output)
    if found is None:
        first = next(iter(output.splitlines()), "").strip()
        return RuntimeVersion(first[:80] or "tells no version")
    name, rest = found[1], found[5]
    # 1.4.0-rc.2 comes before 1.4.0; what a distribution adds (1.1.5+ds1) does not.
    candidate = _CANDIDATE.match(rest)
    number = (int(found[2]), int(found[3]), int(found[4] or 0), int(candidate[1]) if candidate else _RELEASE)
    holes = [hole for hole in _HOLES if hole.runtime == name and hole.is_in(number)]
    return RuntimeVersion(
        f"{name} {'.'.join(found.group(2, 3))}.{found[4] or 0}{rest}",
        warnings=tuple(f"{hole.name}: {hole.what}; fixed in {', '.join(map(_text, hole.fixed))}" for hole in holes),
    )


def _text(number: Number) -> str:
    *parts, candidate = number
    return ".".join(map(str, parts)) + (f"-rc.{candidate}" if candidate != _RELEASE else "")


BACKPORTS = "a distribution may have fixed this without a new version number: see its security tracker"
