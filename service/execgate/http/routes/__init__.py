"""The HTTP routes, by subject, and the trees that they are mounted in."""

from collections.abc import Callable

from execgate.containers.top import Top
from execgate.http.dialects import DOCKER, LIBPOD
from execgate.http.routes.containers import ContainerRoutes, TopRoutes
from execgate.http.routes.events import EventRoutes
from execgate.http.routes.execs import ExecRoutes
from execgate.http.routes.libpod import LibpodRoutes
from execgate.http.routes.sessions import SessionRoutes
from execgate.http.routes.system import SystemRoutes
from execgate.http.tree import Tree
from execgate.model.container import Container


def all_trees(
    top: Callable[[Container, str], Top],
) -> list[Tree]:
    """Return everything that is served. A new group of routes is mounted here, in either tree or in both.

    The router tries one route after the other, so those that are asked most come first.
    """
    return [
        Tree(
            DOCKER,
            [
                SystemRoutes(DOCKER),
                EventRoutes(),
                ExecRoutes(DOCKER),
                ContainerRoutes(DOCKER),
                TopRoutes(top),
                SessionRoutes(DOCKER),
            ],
        ),
        Tree(
            LIBPOD,
            [
                SystemRoutes(LIBPOD),
                ExecRoutes(LIBPOD),
                ContainerRoutes(LIBPOD),
                SessionRoutes(LIBPOD),
                LibpodRoutes(),
            ],
        ),
    ]
