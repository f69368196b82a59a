"""What a runtime says of its version, and what is known against that.

The versions are those of the advisories: runc GHSA-xr7r-f8xq-vfvv (CVE-2024-21626), GHSA-cgrx-mc8f-2prm
(CVE-2025-52881), GHSA-f3fp-gc8g-vw66 (CVE-2022-29162), and crun's NEWS (CVE-2022-27650). crun's maintainers found
that it is not affected by CVE-2025-52881 (containers/crun issue 1906). runc#3999 has no advisory: the change came in
1.3.0-rc.1, and `adversity/test_hostile_container.py` shows what it is about.
"""

from pathlib import Path

import pytest

from execgate.runtime.versions import parse_version, runtime_version

CAPABILITIES, LEAK, PROCFS, GROUPS = "CVE-2022-29162", "CVE-2024-21626", "CVE-2025-52881", "runc#3999"


@pytest.mark.parametrize(
    ("version", "holes"),
    [
        ("1.0.0-rc93", [CAPABILITIES, LEAK, GROUPS, PROCFS]),
        ("1.0.0~rc93+ds1", [CAPABILITIES, LEAK, GROUPS, PROCFS]),
        ("1.1.1", [CAPABILITIES, LEAK, GROUPS, PROCFS]),
        ("1.1.5+ds1", [LEAK, GROUPS, PROCFS]),
        ("1.1.11", [LEAK, GROUPS, PROCFS]),
        ("1.1.12", [GROUPS, PROCFS]),
        ("1.1.15", [GROUPS, PROCFS]),  # the line ended without a fix
        ("1.2.0-rc.1", [GROUPS, PROCFS]),
        ("1.2.7", [GROUPS, PROCFS]),
        ("1.2.8", [GROUPS]),
        ("1.2.9", [GROUPS]),
        ("1.3.2", [PROCFS]),
        ("1.3.3", []),
        ("1.3.3-rc.1", [PROCFS]),
        ("1.4.0-rc.1", [PROCFS]),
        ("1.4.0-rc.2", [PROCFS]),
        ("1.4.0-rc.3", []),
        ("1.4.0-rc.10", []),
        ("1.4.0-rc.2+dev", [PROCFS]),
        ("1.4.0", []),
        ("1.5.0-rc.1", []),
        ("v1.4.0", []),
        ("2.0.0", []),
    ],
)
def test_runc(version: str, holes: list[str]) -> None:
    found = parse_version(f"runc version {version}\ncommit: v1\nspec: 1.0.2-dev\ngo: go1.19.8\nlibseccomp: 2.5.4\n")
    assert [warning.partition(":")[0] for warning in found.warnings] == holes
    assert found.usable
    assert found.text == f"runc {version.removeprefix('v')}"


@pytest.mark.parametrize(
    ("version", "text", "holes"),
    [
        ("0.20.1", "0.20.1", ["CVE-2022-27650"]),
        ("1.4", "1.4.0", ["CVE-2022-27650"]),
        ("1.4.3", "1.4.3", ["CVE-2022-27650"]),
        ("1.4.4", "1.4.4", []),
        ("1.8.1", "1.8.1", []),
        ("1.21", "1.21.0", []),
        ("1.14.3.0.0.0.23-3af9", "1.14.3.0.0.0.23-3af9", []),
    ],
)
def test_crun(version: str, text: str, holes: list[str]) -> None:
    found = parse_version(f"crun version {version}\ncommit: f8a096be\nspec: 1.0.0\n+SYSTEMD +SELINUX\n")
    assert [warning.partition(":")[0] for warning in found.warnings] == holes
    assert found.text == f"crun {text}"


def test_a_warning_names_the_hole_and_every_fix() -> None:
    (warning,) = parse_version("runc version 1.4.0-rc.2").warnings
    assert warning.startswith("CVE-2025-52881: ")
    assert warning.endswith("; fixed in 1.2.8, 1.3.3, 1.4.0-rc.3")


@pytest.mark.parametrize(
    ("output", "text"),
    [
        ("", "tells no version"),
        ("\n", "tells no version"),
        ("kata-runtime  : 3.2.0\n   commit   : abc\n", "kata-runtime  : 3.2.0"),
        ("conmon version 2.1.6\ncommit: unknown\n", "conmon version 2.1.6"),
        ("runsc version release-20240101.0\n", "runsc version release-20240101.0"),
        ("runc version unknown", "runc version unknown"),
        ("x" * 1000, "x" * 80),
        ("crun version 1\n", "crun version 1"),
    ],
)
def test_anything_else_is_shown_as_it_is(output: str, text: str) -> None:
    found = parse_version(output)
    assert (found.text, found.usable, found.warnings) == (text, True, ())


def _program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_a_program_is_asked(tmp_path: Path) -> None:
    program = _program(tmp_path / "runc", 'test "$*" = --version && echo runc version 1.1.5+ds1')
    found = runtime_version(program)
    assert found.text == "runc 1.1.5+ds1"
    assert len(found.warnings) == 3


@pytest.mark.parametrize(
    ("script", "reason"),
    [("exit 3", "--version ends with exit code 3"), (None, "cannot be run: No such file or directory")],
)
def test_a_program_that_cannot_be_run(tmp_path: Path, script: str | None, reason: str) -> None:
    program = tmp_path / "runc" if script is None else _program(tmp_path / "runc", script)
    found = runtime_version(program)
    assert (found.text, found.usable) == (reason, False)


def test_a_program_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("execgate.runtime.versions._TIMEOUT", 0.2)
    found = runtime_version(_program(tmp_path / "runc", "exec sleep 60"))
    assert (found.text, found.usable) == ("cannot be run: it does not end", False)
