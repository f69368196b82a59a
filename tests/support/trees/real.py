"""Real containers in a tree: an engine's files around a container that a real runtime runs."""

import json
from pathlib import Path

from support.programs import run_launcher, run_program
from support.rootfs import build_rootfs
from support.trees.plan import Placed


def start(placed: Placed, program: Path, log: Path) -> None:
    """Create and start the container of a `runnable` plan, by the runtime `program`, in its place in the tree.

    Its configuration is what the tree wrote, its root file system is made here. `log` gets the output of its init.
    """
    config = json.loads(placed.spec_file.read_text())
    rootfs = placed.bundle / config["root"]["path"]
    if not any(rootfs.iterdir() if rootfs.is_dir() else ()):
        build_rootfs(rootfs)
    argv: list[str | Path] = [program, "--root", placed.state_dir.parent]
    run_launcher([*argv, "create", "--bundle", placed.bundle, placed.plan.id], log)
    run_program([*argv, "start", placed.plan.id])


def delete(placed: Placed, program: Path) -> None:
    """End and delete a container that `start` made."""
    run_program([program, "--root", placed.state_dir.parent, "delete", "--force", placed.plan.id])
