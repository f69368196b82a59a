"""`execgate doctor`: what was looked for, where, and why something cannot be used."""

import argparse
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from execgate.cli.tables import shown
from execgate.config import Config
from execgate.engine import catalog_of
from execgate.model.container import ContainerStatus, EngineName
from execgate.model.errors import ExecgateError
from execgate.runtime.tree import SessionCgroups
from execgate.runtime.versions import BACKPORTS, runtime_version

_OK, _NOTE, _WARN, _FAIL = "ok", "-", "warning", "FAIL"
_MAX_TEXT = 400


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: `verdict` is `ok`, `-` (not there, which is no fault), `warning` or `FAIL`."""

    section: str
    verdict: str
    subject: str
    text: str


def run(config: Config, arguments: argparse.Namespace) -> int:
    """Examine the host and print what was found; 1 when no exec could work at all."""
    findings = [*_programs(config), *_host(), *_engines(config)]
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print(findings)
    return 1 if any(finding.verdict == _FAIL for finding in findings) else 0


def _programs(config: Config) -> list[Finding]:
    found = []
    runtimes = config.runtime_paths()
    for name, path in sorted(runtimes.items()):
        found += _version("Programs", name, name, path, unusable=_FAIL)
    if not runtimes:
        found.append(Finding("Programs", _FAIL, "runc, crun", "neither is on the PATH: install one, or set --runtime"))
    conmon = config.conmon_path()
    if conmon is None:
        found.append(Finding("Programs", _FAIL, "conmon", "not on the PATH: install it, or set --conmon"))
    else:
        found += _version("Programs", "conmon", "conmon", conmon, unusable=_FAIL)
    return found


def _version(section: str, kind: str, name: str, program: Path, *, unusable: str) -> list[Finding]:
    """Return what a program says of itself, and what is known against it; `unusable`: how bad it is without it."""
    version = runtime_version(program)
    warnings = [Finding(section, _WARN, name, f"{warning} ({BACKPORTS})") for warning in version.warnings]
    return [Finding(section, _OK if version.usable else unusable, f"{kind} {program}", version.text), *warnings]


def _host() -> list[Finding]:
    found = [Finding("Host", _OK, "user", "root")] if os.geteuid() == 0 else [_user()]
    cgroups = SessionCgroups.open()
    usable = cgroups.usable
    cgroups.close()
    tree = "a kill reaches all processes of a session" if usable else "a kill can miss children that daemonized"
    return [*found, Finding("Host", _OK if usable else _WARN, "session cgroups", tree)]


def _user() -> Finding:
    return Finding("Host", _WARN, "user", f"uid {os.geteuid()}: only containers of this user can be entered")


def _engines(config: Config) -> list[Finding]:
    catalog = catalog_of(config)
    try:
        containers = catalog.list()
        looks = catalog.looks()
    except ExecgateError as error:
        return [Finding("Engines", _FAIL, "containers", f"{error} ({error.hint})")]
    found = []
    by_engine = dict(looks)
    for engine in EngineName:
        if engine not in by_engine:
            found.append(Finding("Engines", _NOTE, engine, "switched off (engines)"))
            continue
        states = Counter(container.status for container in containers if container.engine == engine)
        text = ", ".join(f"{states[state]} {state}" for state in ContainerStatus if states[state])
        found.append(Finding("Engines", _OK if states else _NOTE, engine, text or "no containers"))
        found += [
            Finding("Engines", _OK if look.usable else _NOTE, f"  {look.place}", look.found)
            for look in by_engine[engine]
        ]
    if config.container_labels:
        wanted = ", ".join(config.container_labels)
        found.append(Finding("Engines", _NOTE, "labels", f"only containers with {wanted} are shown"))
    others = {container.runtime.path for container in containers if container.init is not None}
    for path in sorted(others - set(config.runtime_paths().values())):
        found += _version("Engines", "runtime", str(path), path, unusable=_WARN)
    return found + [Finding("Left out", _WARN, place, reason) for place, reason in catalog.problems()]


def _print(findings: Sequence[Finding]) -> None:
    section = ""
    for finding in findings:
        if finding.section != section:
            print(f"{os.linesep if section else ''}{finding.section}")
            section = finding.section
        print(f"  {finding.verdict:<8} {shown(finding.subject, _MAX_TEXT)}: {shown(finding.text, _MAX_TEXT)}")


def add_command(command: Any) -> None:
    """Add `doctor`; `command` adds one with the options of the service."""
    parser = command("doctor", run, "show what is looked for where, and why something cannot be used")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
