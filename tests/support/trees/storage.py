"""containers/storage, the store under Podman and CRI-O: which containers there are, under which names.

Written after containers/storage 1.59 (`containers.go`, `types/options.go`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.trees.plan import Places, Plan, compact, hex_id, rfc3339, write_json, write_text


@dataclass(frozen=True, slots=True)
class Store:
    """A store: what survives a reboot, and what does not."""

    graph_root: Path
    run_root: Path
    driver: str = "overlay"

    @property
    def containers(self) -> Path:
        """Where the lists of the containers are, and a directory for each."""
        return self.graph_root / f"{self.driver}-containers"

    def lasting(self, container_id: str) -> Path:
        """A container's directory that survives a reboot."""
        return self.containers / container_id / "userdata"

    def fleeting(self, container_id: str) -> Path:
        """A container's directory that does not."""
        return self.run_root / f"{self.driver}-containers" / container_id / "userdata"

    def rootfs(self, plan: Plan) -> Path:
        """Where a container's root file system is mounted."""
        return self.graph_root / self.driver / layer_of(plan) / "merged"


def store_at(places: Places, *, driver: str = "overlay") -> Store:
    """Return the store at its default place."""
    run = places.run / ("containers/storage" if places.user is None else "containers")
    return Store(places.data / "containers/storage", run, driver)


def layer_of(plan: Plan) -> str:
    """Return the id of a container's own layer."""
    return hex_id(f"layer {plan.id}")


def entry(plan: Plan, names: Sequence[str], metadata: dict[str, Any], *, volatile: bool) -> dict[str, Any]:
    """Return a container's entry in the lists. `metadata` is JSON text within the JSON."""
    flags = {"MountLabel": "", "ProcessLabel": ""} | ({"Volatile": True} if volatile else {})
    return {
        "id": plan.id,
        "names": list(names),
        "image": plan.image_id,
        "layer": layer_of(plan),
        "metadata": compact(metadata),
        "created": rfc3339(plan.created),
        "flags": flags,
    }


def write_lists(store: Store, lasting: Sequence[dict[str, Any]], volatile: Sequence[dict[str, Any]] = ()) -> None:
    """Write the two lists and their lock. Versions before 1.45 know only the first list."""
    write_json(store.containers / "containers.json", list(lasting))
    if volatile:
        write_json(store.containers / "volatile-containers.json", list(volatile))
    write_text(store.containers / "containers.lock", "0" * 64, mode=0o644)


def write_storage_conf(path: Path, store: Store) -> Path:
    """Write a storage.conf that leads to a store."""
    return write_text(
        path,
        "[storage]\n"
        f'driver = "{store.driver}"\n'
        f'graphroot = "{store.graph_root}"\n'
        f'runroot = "{store.run_root}"\n'
        "[storage.options]\n"
        'pull_options = {enable_partial_images = "false"}\n',
        mode=0o644,
    )
