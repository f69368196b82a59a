"""A host full of containers: state trees of several engines, and some real containers among them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from execgate.model.process import ProcessIdentity
from support.runtimes import RuntimeHost
from support.trees import Life, Plan, docker_tree, kubernetes_tree, oci_tree, plans, podman_tree, real
from support.trees.plan import Placed

# Of one that has ended and been noticed, containerd keeps nothing that anybody could show.
_LIVES = (Life.RUNNING, Life.RUNNING, Life.RUNNING, Life.CREATED, Life.LOST)


@dataclass(frozen=True, slots=True)
class Population:
    """What was made: how a service is told of it, the real containers, and a name of each engine that runs.

    `environment` is for `execgate serve`. The names are of containers that only exist on disk, which a lookup finds
    like any other.
    """

    environment: Mapping[str, str]
    count: int
    real: Sequence[Placed]
    names: Sequence[str]
    program: Path

    def delete(self) -> None:
        """End and delete the real containers."""
        for placed in self.real:
            real.delete(placed, self.program)


def populate(root: Path, host: RuntimeHost, count: int, alive: ProcessIdentity, *, real_ones: int = 0) -> Population:
    """Write `count` containers of Docker, Podman, Kubernetes and bare runtimes below `root`.

    `alive` is the init of each that counts as running. `real_ones` of them are Docker's and really run, under `host`.
    """
    share = (count - real_ones) // 4
    real_plans = [
        Plan(id=f"{number:02d}".ljust(64, "e"), name=f"real-{number}", runnable=True) for number in range(real_ones)
    ]
    written = [plans(share, inits=[alive], lives=_LIVES, prefix=prefix) for prefix in ("docker", "podman", "pod")]
    rest = plans(count - real_ones - 3 * share, inits=[alive], lives=_LIVES, prefix="oci")
    docker = docker_tree(root, [*real_plans, *written[0]], binary=str(host.program))
    trees = [docker, podman_tree(root, written[1]), kubernetes_tree(root, written[2]), oci_tree(root, rest)]
    begun: list[Placed] = []
    population = Population(
        environment={
            "EXECGATE_ENGINES": "docker,podman,containerd,oci",
            "EXECGATE_DOCKER_DATA_ROOT": f"{root}/var/lib/docker",
            "EXECGATE_DOCKER_EXEC_ROOT": f"{root}/run/docker",
            "EXECGATE_CONTAINERD_ROOT": f"{root}/var/lib/containerd",
            "EXECGATE_CONTAINERD_STATE": f"{root}/run/containerd",
            "EXECGATE_CONTAINERD_RUNC_ROOT": f"{root}/run/containerd/runc",
            "EXECGATE_STORAGE_GRAPH_ROOT": f"{root}/var/lib/containers/storage",
            "EXECGATE_STORAGE_RUN_ROOT": f"{root}/run/containers/storage",
            "EXECGATE_RUNTIME_ROOTS": f"runc={root}/run/runc",
        },
        count=count,
        real=begun,
        names=[
            next(one.name for one in tree if one.plan.life is Life.RUNNING and not one.plan.is_infra) for tree in trees
        ],
        program=host.program,
    )
    for plan in real_plans:
        placed = docker[plan.id]
        real.start(placed, host.program, root / f"log-{plan.name}")
        begun.append(placed)
    return population
