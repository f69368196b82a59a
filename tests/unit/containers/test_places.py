"""Where engines keep their files, by their own configuration."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from execgate.config import Config
from execgate.containers.engines import places
from execgate.containers.engines.oci import default_roots
from execgate.containers.engines.places import find_places
from execgate.model.container import EngineName
from support.found import catalog_below, places_below, this_process
from support.trees import docker_tree, plans, podman_tree


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Writes a file below a directory that stands for `/`; the real one is not looked at."""
    monkeypatch.setattr(places, "_SYSTEM", (tmp_path / "usr/share/containers", tmp_path / "etc/containers"))
    json_, toml = places._json, places._toml

    def below(path: Path) -> Path:
        return path if path.is_relative_to(tmp_path) else tmp_path / path.relative_to("/")

    monkeypatch.setattr(places, "_json", lambda path: json_(below(path)))
    monkeypatch.setattr(places, "_toml", lambda path: toml(below(path)))

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


Etc = Callable[[str, str], Path]


def test_defaults_of_root(etc: Etc) -> None:
    found = find_places({}, user=False)
    assert [str(place) for place in (found.docker_data_root, found.docker_exec_root)] == [
        "/var/lib/docker",
        "/run/docker",
    ]
    assert [str(place) for place in (found.containerd_root, found.containerd_state, found.containerd_runc_root)] == [
        "/var/lib/containerd",
        "/run/containerd",
        "/run/containerd/runc",
    ]
    assert str(found.nerdctl_root) == "/var/lib/nerdctl"
    assert str(found.storage_graph_root) == "/var/lib/containers/storage"
    assert str(found.storage_run_root) == "/run/containers/storage"
    assert found.runtimes == {}


def test_defaults_of_a_user(etc: Etc, tmp_path: Path) -> None:
    found = find_places({"HOME": str(tmp_path), "XDG_RUNTIME_DIR": "/run/user/1000"}, user=True)
    assert found.storage_graph_root == tmp_path / ".local/share/containers/storage"
    assert found.storage_run_root == Path("/run/user/1000/containers")
    assert find_places({"HOME": "/h", "XDG_DATA_HOME": "/data"}, user=True).storage_graph_root == Path(
        "/data/containers/storage"
    )


def test_docker_and_containerd(etc: Etc) -> None:
    etc("etc/docker/daemon.json", json.dumps({"data-root": "/srv/docker", "exec-root": "/srv/run"}))
    etc("etc/containerd/config.toml", 'version = 2\nroot = "/srv/lib"\nstate = "/run/k3s/containerd"\n')
    found = find_places({}, user=False)
    assert (found.docker_data_root, found.docker_exec_root) == (Path("/srv/docker"), Path("/srv/run"))
    assert (found.containerd_root, found.containerd_state) == (Path("/srv/lib"), Path("/run/k3s/containerd"))
    assert found.containerd_runc_root == Path("/run/containerd/runc")  # the shim's own


def test_docker_with_remapped_users(etc: Etc, tmp_path: Path) -> None:
    data = tmp_path / "docker"
    etc("etc/docker/daemon.json", json.dumps({"data-root": str(data), "userns-remap": "default"}))
    assert find_places({}, user=False).docker_data_root == data
    (data / "165536.165536").mkdir(parents=True)
    assert find_places({}, user=False).docker_data_root == data / "165536.165536"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "5", '{"data-root": 5, "exec-root": []}', "\xff", "[" * 100_000, "a = " + "[" * 100_000]
)
def test_a_configuration_that_says_nothing_counts_as_none(etc: Etc, text: str) -> None:
    for name in ("etc/docker/daemon.json", "etc/containerd/config.toml", "etc/containers/storage.conf"):
        etc(name, text)
    found = find_places({}, user=False)
    assert (found.docker_data_root, found.containerd_state) == (Path("/var/lib/docker"), Path("/run/containerd"))
    assert found.storage_graph_root == Path("/var/lib/containers/storage")


def test_the_first_storage_conf_counts(etc: Etc, tmp_path: Path) -> None:
    def graph_root(**environ: str) -> str:
        return str(find_places({"HOME": str(tmp_path / "home"), **environ}, user=False).storage_graph_root)

    etc("usr/share/containers/storage.conf", '[storage]\ngraphroot = "/usr"\n')
    assert graph_root() == "/usr"
    etc("etc/containers/storage.conf", '[storage]\ngraphroot = "/etc"\nrunroot = "/run/etc"\n')
    assert graph_root() == "/etc"
    assert str(find_places({}, user=False).storage_run_root) == "/run/etc"
    etc("home/.config/containers/storage.conf", '[storage]\ngraphroot = "/home"\n')
    assert graph_root() == "/etc"  # root's own only where XDG_CONFIG_HOME is set
    assert graph_root(XDG_CONFIG_HOME=str(tmp_path / "home/.config")) == "/home"
    named = etc("named.conf", '[storage]\ndriver = "vfs"\n')
    assert graph_root(CONTAINERS_STORAGE_CONF=str(named)) == "/var/lib/containers/storage"
    assert graph_root(CONTAINERS_STORAGE_CONF="/nonexistent") == "/etc"


def test_a_users_storage_conf(etc: Etc, tmp_path: Path) -> None:
    etc("etc/containers/storage.conf", '[storage]\ngraphroot = "/etc"\n')
    environ = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": "/run/user/5", "USER": "ann"}
    assert find_places(environ, user=True).storage_graph_root == tmp_path / ".local/share/containers/storage"
    etc(
        ".config/containers/storage.conf",
        '[storage]\ngraphroot = "$HOME/disk/${USER}"\nrunroot = "/run/user/$UID/containers"\n',
    )
    found = find_places(environ, user=True)
    assert found.storage_graph_root == tmp_path / "disk/ann"
    assert found.storage_run_root == Path(f"/run/user/{os.getuid()}/containers")


def test_a_configuration_in_a_directory_that_is_closed(etc: Etc, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, **_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", refuse)
    found = find_places({"CONTAINERS_STORAGE_CONF": "/closed/storage.conf"}, user=False)
    assert found.storage_graph_root == Path("/var/lib/containers/storage")


def test_podmans_runtimes(etc: Etc, tmp_path: Path) -> None:
    """Of the programs the first that is there; of the files a later one counts."""
    program = etc("bin/crun", "")
    program.chmod(0o755)
    etc("usr/share/containers/containers.conf", f'[engine.runtimes]\ncrun = ["/nonexistent", "{program}"]\n')
    assert find_places({}, user=False).runtimes == {"crun": program}
    other = etc("bin/other", "")
    other.chmod(0o755)
    etc("etc/containers/containers.conf.d/10-runtimes.conf", f'[engine.runtimes]\ncrun = ["{other}"]\nkata = []\n')
    assert find_places({}, user=False).runtimes == {"crun": other}
    named = etc("named.conf", "[engine]\nruntimes = 5\n")
    assert find_places({"CONTAINERS_CONF": str(named)}, user=False).runtimes == {}
    override = {
        "CONTAINERS_CONF": str(named),
        "CONTAINERS_CONF_OVERRIDE": str(tmp_path / "usr/share/containers/containers.conf"),
    }
    assert find_places(override, user=False).runtimes == {"crun": program}


def test_what_execgate_is_told_comes_first(tmp_path: Path) -> None:
    config = Config(docker_data_root=tmp_path / "d", storage_run_root=tmp_path / "r")
    assert config.places().docker_data_root == tmp_path / "d"
    assert config.places().storage_run_root == tmp_path / "r"


def test_a_tree_is_found_by_its_configuration(etc: Etc, tmp_path: Path) -> None:
    """The trees write storage.conf where a user of Podman would."""
    tree = podman_tree(tmp_path, plans(2, inits=[this_process()]))
    found = find_places({}, user=False)
    assert (found.storage_graph_root, found.storage_run_root) == (tree.store.graph_root, tree.store.run_root)


def test_a_runtime_root_without_dockers_data(tmp_path: Path) -> None:
    """The doctor says which option helps."""
    docker_tree(tmp_path, plans(1, inits=[this_process()]))
    moved = replace(places_below(tmp_path), docker_data_root=tmp_path / "nowhere")
    (look,) = dict(catalog_below(tmp_path, places=moved).looks())[EngineName.DOCKER]
    assert not look.usable
    assert "set docker_data_root" in look.found


def test_default_roots_follow_the_user() -> None:
    assert [str(root.dir) for root in default_roots({}, user=False)] == ["/run/runc", "/run/crun"]
