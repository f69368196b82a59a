"""`execgate doctor` and `execgate containers` on hosts of several engines."""

import json
import os
from pathlib import Path

import pytest

from execgate import cli
from execgate.config import Config
from execgate.containers.engines.places import Places
from support.found import places_below, this_process
from support.trees import CONTAINER_BREAKERS, Life, docker_tree, nerdctl_tree, oci_tree, plans, podman_tree

LIVES = [Life.RUNNING, Life.EXITED]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A host with some containers of four engines; the options that lead there."""
    for name in [name for name in os.environ if name.startswith("EXECGATE_")]:
        monkeypatch.delenv(name)
    me = this_process()
    docker_tree(tmp_path, plans(4, inits=[me], prefix="d", lives=LIVES))
    podman_tree(tmp_path, plans(2, inits=[me], prefix="p", lives=LIVES))
    nerdctl_tree(tmp_path, plans(2, inits=[me], prefix="n", lives=LIVES))
    oci_tree(tmp_path, plans(2, inits=[me], prefix="o", lives=LIVES))

    def places(_: Config) -> Places:
        return places_below(tmp_path)

    monkeypatch.setattr(Config, "places", places)
    programs = []
    for name, version in (("runc", "runc version 1.1.5+ds1"), ("crun", "crun version 1.8.1"), ("conmon", "conmon 2")):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho {version}\n")
        program.chmod(0o755)
        programs.append(program)
    return [
        *(f"--runtime={program.name}={program}" for program in programs[:2]),
        *(f"--runtime-root={tmp_path / 'run' / name}" for name in ("runc", "crun")),
        f"--config={_config(tmp_path, programs[2])}",
    ]


def _config(directory: Path, conmon: Path) -> Path:
    path = directory / "execgate.toml"
    path.write_text(f'conmon = "{conmon}"\n')
    return path


Findings = dict[tuple[str, str], tuple[str, str]]


def examine(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, Findings]:
    """Return the exit code of `doctor --json`, and each finding's verdict and text by section and subject."""
    code = cli.main(["doctor", "--json", *argv])
    findings = json.loads(capsys.readouterr().out)
    assert all(finding.keys() == {"section", "verdict", "subject", "text"} for finding in findings)
    return code, {(one["section"], one["subject"]): (one["verdict"], one["text"]) for one in findings}


def test_what_is_looked_for_where(host: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = examine(capsys, *host)
    assert code == 0
    assert found["Engines", "docker"] == ("ok", "2 running, 2 exited")
    assert found["Engines", "podman"] == ("ok", "1 running, 1 exited")
    assert found["Engines", "containerd"] == ("ok", "1 running, 1 exited")
    assert found["Engines", "oci"] == ("ok", "1 running, 1 exited")
    assert found["Engines", "crio"] == ("-", "no containers")
    assert found["Engines", f"  {tmp_path}/var/lib/docker/containers"] == ("ok", "4 containers")
    assert found["Engines", f"  {tmp_path}/run/crun"] == ("-", "not there")
    assert not [section for section, _ in found if section == "Left out"]


def test_the_programs(host: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = examine(capsys, *host)
    assert code == 0
    assert found["Programs", f"runc {tmp_path}/runc"] == ("ok", "runc 1.1.5+ds1")
    verdict, text = found["Programs", "runc"]
    assert verdict == "warning"
    assert "CVE-2025-52881" in text
    assert "distribution" in text
    assert found["Programs", f"crun {tmp_path}/crun"] == ("ok", "crun 1.8.1")
    assert ("Programs", "crun") not in found
    assert found["Programs", f"conmon {tmp_path}/conmon"] == ("ok", "conmon 2")


@pytest.mark.parametrize("name", ["runc", "conmon"])
def test_a_program_that_cannot_be_run(
    host: list[str], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).chmod(0o644)
    code, found = examine(capsys, *host)
    assert code == 1
    assert found["Programs", f"{name} {tmp_path / name}"] == ("FAIL", "cannot be run: Permission denied")


def test_engines_that_are_switched_off(host: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, found = examine(capsys, *host, "--engine=docker,oci")
    assert code == 0
    assert found["Engines", "podman"] == ("-", "switched off (engines)")
    assert found["Engines", "docker"][0] == "ok"


def test_label_filters_are_told(host: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, found = examine(capsys, *host, "--container-label=com.example.number=0", "--container-label=a")
    assert code == 0
    assert found["Engines", "labels"] == ("-", "only containers with com.example.number=0, a are shown")
    assert found["Engines", "docker"] == ("-", "no containers")


@pytest.mark.parametrize("breaker", ["half_written_state", "fifo_state", "missing_bundle", "looping_state"])
def test_what_is_left_out_and_why(
    host: list[str], tmp_path: Path, breaker: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = docker_tree(tmp_path / "more", plans(2, inits=[this_process()], prefix="m", lives=[Life.RUNNING]))
    first, _ = more
    CONTAINER_BREAKERS[breaker](first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, "places", lambda _: places_below(tmp_path / "more"))
        host = [option for option in host if not option.startswith("--runtime-root")]
        host.append(f"--runtime-root={tmp_path / 'more/run/runc'}")
        code, found = examine(capsys, *host)
        left_out = {subject: text for (section, subject), (_, text) in found.items() if section == "Left out"}
        assert code == 0
        (place,) = left_out
        assert first.plan.id in place
        assert left_out[place]
        assert cli.main(["containers", *host]) == 0
        shown = capsys.readouterr()
        assert f"execgate: left out: {place}" in shown.err
        assert "m-1" in shown.out


def test_the_text(host: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", *host]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line and not line.startswith(" ")] == ["Programs", "Host", "Engines"]
    assert "  ok       docker: 2 running, 2 exited" in lines
    assert "  -        crio: no containers" in lines


def test_names_that_mean_no_good(host: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run/runc" / "\x1b[31mred\nline").mkdir()
    assert cli.main(["doctor", *host]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "red" in out
    assert cli.main(["containers", *host]) == 0
    assert "\x1b" not in capsys.readouterr().err


def test_the_containers(host: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["containers", *host]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split() == ["NAME", "ENGINE", "RUNTIME", "STATUS", "CREATED", "IMAGE", "ID"]
    assert sorted(row.split()[1] for row in rows) == ["containerd"] * 2 + ["docker"] * 4 + ["oci"] * 2 + ["podman"] * 2
    assert cli.main(["containers", "--json", "--engine", "docker", *host]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["Name"] for one in found} == {"d-0", "d-1", "d-2", "d-3"}
    running = next(one for one in found if one["Name"] == "d-0")
    assert (running["Status"], running["Pid"], running["Engine"]) == ("running", os.getpid(), "docker")
    assert (running["StopTimeout"], running["Tty"], running["User"]) == (0.0, True, "")
    assert running["Labels"] == {"com.example.team": "team-0", "com.example.number": "0"}
