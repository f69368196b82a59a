"""Imports go down only, and the floors that promise to do no I/O import nothing that could."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import execgate

PACKAGE = Path(execgate.__file__).parent

# The top first. Modules of one floor may import each other; oci and wire are side by side.
FLOORS = [
    {
        "__main__", "cli", "app", "engine", "client", "config", "handover", "logs", "orphan", "rootless", "status",
        "worker", "",
    },
    {"http"},
    {"gate"},
    {"sessions"},
    {"runtime"},
    {"containers"},
    {"oci", "wire", "keeper"},
    {"model"},
]  # fmt: skip
PURE = {"model", "oci", "wire"}
IMPURE_MODULES = {
    "aiohttp", "asyncio", "concurrent", "ctypes", "fcntl", "io", "logging", "multiprocessing", "os", "pydantic",
    "random", "select",
    "selectors", "shutil", "signal", "socket", "sqlite3", "ssl", "subprocess", "tempfile", "threading", "time",
    "uvloop",
}  # fmt: skip
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
# Parsed before any test runs: CPython 3.11's parser fails in a thread that has met a RecursionError in C.
TREES = {module: ast.parse((PACKAGE / module).read_text()) for module in MODULES}


def floor_name(module: Path) -> str:
    """`http/routes/execs.py` → `http`; `cli.py` → `cli`; the package itself → ``."""
    name = module.parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


def level(name: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if name in floor)


def imports(module: Path) -> Iterator[str]:
    """Every imported module's full name, those within functions included."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_floors(module: Path) -> set[str]:
    found = set()
    for name in imports(module):
        top, _, rest = name.partition(".")
        if (top == "execgate" and rest and (PACKAGE / rest.partition(".")[0]).with_suffix(".py").exists()) or (
            top == "execgate" and (PACKAGE / rest.partition(".")[0]).is_dir() and rest
        ):
            found.add(rest.partition(".")[0])
    return found


def test_every_module_has_a_floor() -> None:
    assert {floor_name(module) for module in MODULES} <= set.union(*FLOORS)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_down(module: Path) -> None:
    here = floor_name(module)
    for there in own_floors(module):
        assert level(there) > level(here) or there == here or level(here) == 0, f"{module} imports {there}"
        assert {here, there} != {"oci", "wire"}, f"{module} imports {there}: they are side by side"


@pytest.mark.parametrize("module", [one for one in MODULES if floor_name(one) in PURE], ids=str)
def test_pure_floors(module: Path) -> None:
    """The standard library only, and nothing of it that reads, writes, waits or rolls dice."""
    for name in imports(module):
        top = name.partition(".")[0]
        assert top == "execgate" or top in sys.stdlib_module_names, f"{module} imports {name}"
        assert top not in IMPURE_MODULES, f"{module} imports {name}"


@pytest.mark.parametrize(
    ("package", "only"),
    [
        ("aiohttp", {"http", "client"}),
        ("pydantic", {"http", "gate", "config", "sessions"}),
        ("sqlite3", {"sessions", "containers"}),
        ("uvloop", {"cli"}),
    ],
)
def test_foreign_packages_stay_where_they_belong(package: str, only: set[str]) -> None:
    users = {
        floor_name(module) for module in MODULES if any(name.partition(".")[0] == package for name in imports(module))
    }
    assert users <= only


def test_the_keeper_is_small() -> None:
    """It stands on the standard library alone, without an event loop, and can be read in one sitting."""
    modules = [one for one in MODULES if floor_name(one) == "keeper"]
    for module in modules:
        for name in imports(module):
            top = name.partition(".")[0]
            assert name.startswith("execgate.keeper") or top in sys.stdlib_module_names - {"asyncio"}, (
                f"{module}: {name}"
            )
    assert sum(len((PACKAGE / module).read_text().splitlines()) for module in modules) < 750
