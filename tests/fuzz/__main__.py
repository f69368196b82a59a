"""`python -m fuzz`: run targets under atheris, each in its own process, and say what came of it.

What is found by the way, input that reaches new code, stays in `build/fuzz/NAME/corpus`, where the next run begins;
a finding is `build/fuzz/NAME/crash-…` (or `timeout-…`, `oom-…`). One that is fixed belongs into `tests/fuzz/corpus`.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fuzz.table import CORPUS, TARGETS

_WORK = Path("build/fuzz")
_TIMEOUT = 25
"""Seconds of one input. That is long, for a machine that does other things as well; none takes one by itself."""
_MEMORY = 768
"""MiB of a process. An instrumented one begins with some 150."""
_STATUS = re.compile(r"#(\d+)\s+(\w+)\s+cov: (\d+) ft: (\d+) corp: (\d+)/\S+.*? rss: (\d+)Mb")


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a target: executions, edges covered by the seeds and in the end, size of the corpus, MiB of memory
    when the seeds were read and at most; the files of findings."""

    name: str
    executions: int
    edges: tuple[int, int]
    corpus: int
    memory: tuple[int, int]
    findings: Sequence[Path]
    completed: bool

    def __str__(self) -> str:
        found = ", ".join(path.name for path in self.findings) or ("0" if self.completed else "ended early")
        return (
            f"| {self.name} | {self.executions:,} | {self.edges[0]} → {self.edges[1]} | {self.corpus} "
            f"| {self.memory[0]} → {self.memory[1]} | {found} |"
        )


HEAD = "| target | executions | edges | corpus | MiB | findings |\n| --- | ---: | ---: | ---: | ---: | --- |"


def run(name: str, seconds: int, directory: Path) -> Result:
    """Run one target for so many seconds, or until it finds something; its log is `directory`/log."""
    target = TARGETS[name]
    found = directory / "corpus"
    found.mkdir(parents=True, exist_ok=True)
    dictionary = directory / "dictionary"
    dictionary.write_text("".join(f'"{_escaped(token)}"\n' for token in target.tokens))
    arguments = [
        *(f"-max_total_time={seconds}", f"-max_len={target.max_length}", f"-timeout={_TIMEOUT}", "-reload=0"),
        *(f"-rss_limit_mb={_MEMORY}", f"-dict={dictionary}", f"-artifact_prefix={directory}/", "-print_final_stats=1"),
        *map(str, [found, CORPUS / name]),
    ]
    begun = time.time()
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_memory_directory()) as scratch:
        log = directory / "log"
        with log.open("wb") as file:
            code = subprocess.run(
                [sys.executable, "-m", "fuzz.one", name, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, "TMPDIR": scratch},
                check=False,
            ).returncode
    findings = [
        path
        for path in sorted(directory.glob("*-*"))
        if path.name.startswith(("crash-", "timeout-", "oom-", "leak-")) and path.stat().st_mtime >= begun - 1
    ]
    return _result(name, log.read_text(errors="replace"), findings, completed=code == 0)


def _result(name: str, log: str, findings: Sequence[Path], *, completed: bool) -> Result:
    """Read libFuzzer's status lines."""
    lines = [(kind, *map(int, numbers)) for count, kind, *rest in _STATUS.findall(log) for numbers in [(count, *rest)]]
    if not lines:
        return Result(name, 0, (0, 0), 0, (0, 0), findings, completed=False)
    first = next((line for line in lines if line[0] == "INITED"), lines[0])
    _, executions, edges, _, corpus, _ = lines[-1]
    memory = (first[5], max(line[5] for line in lines))
    return Result(name, executions, (first[2], edges), corpus, memory, findings, completed)


def _escaped(token: bytes) -> str:
    """Return a token in the syntax of a dictionary."""
    return "".join(f"\\x{byte:02x}" for byte in token)


def _memory_directory() -> str | None:
    """Return a tmpfs where there is one: a target that reads files writes one for each input."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def main() -> int:
    """Run what the command line asks for; 1 when anything was found, or a target could not be run."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Fuzz the parsers under atheris.")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default: 60)")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="only this one; may be repeated")
    options = parser.parse_args()
    print(HEAD, flush=True)
    results = []
    for name in options.target or TARGETS:
        results.append(run(name, options.seconds, _WORK / name))
        print(results[-1], flush=True)
    failed = [result.name for result in results if result.findings or not result.completed]
    for name in failed:
        print(f"fuzz: {name}: see {_WORK / name}/log", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
