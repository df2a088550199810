"""What the architecture's page says of the modules, and how long functions may be, by reading the sources alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parent.parent
ROOTS = {
    "clex_local": "clex_local",
    "clex_convert": "convert/clex_convert",
    "clex_eval": "evaluation/clex_eval",
    "clex_train": "train/clex_train",
    "benchmarks": "benchmarks",
}
# Of each package those that it may import.
UPSTREAM = {
    "clex_local": set(),
    "clex_convert": {"clex_local"},
    "clex_train": {"clex_local", "clex_convert"},
    "clex_eval": {"clex_local", "clex_convert", "clex_train"},
}
LONGEST = 60  # lines of a function, without its docstring
MOST = 12  # parameters
BY_OTHERS = {"_create_completion"}  # llama-cpp-python decides what it is called with

Function = (ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of ours by its name."""
    found = {}
    for package, folder in ROOTS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts]).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(name: str) -> set[str]:
    """The modules of ours that a module imports, wherever it does and for types too."""
    found = set()
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    found &= set(modules())
    # A package is not what is imported where a module of it is.
    return {one for one in found - {name} if not any(other.startswith(f"{one}.") for other in found)}


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function and method, with its name in messages."""
    for name, tree in modules().items():
        yield from ((f"{name}:{node.name}", node) for node in ast.walk(tree) if isinstance(node, Function))


def test_packages_of_the_runtime_import_only_those_before_them() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (said,) = re.findall(r"^Each package of `clex_local` imports only those before it.*?\n\n", page, re.DOTALL | re.M)
    order = re.findall(r"`(\w+)`", said.partition("beside them:")[2])
    assert set(order) == {path.parent.name for path in (ROOT / "clex_local").glob("*/__init__.py")}
    for name in modules():
        package = name.split(".")[1:2]
        if not name.startswith("clex_local.") or package[0] not in order:
            continue
        for imported in imports(name):
            other = imported.split(".")[1:2]
            if other and other[0] in order:
                assert order.index(other[0]) <= order.index(package[0]), f"{name} imports {imported}"


def test_no_package_imports_from_downstream() -> None:
    for name in modules():
        package = name.partition(".")[0]
        if package in UPSTREAM:
            others = {imported.partition(".")[0] for imported in imports(name)} - {package}
            assert others <= UPSTREAM[package], name


def test_imports_have_no_circle() -> None:
    graph = {name: imports(name) for name in modules()}
    assert graph["clex_local.runtime.llama"] >= {"clex_local.runtime.turn"}  # found at all
    assert len([*TopologicalSorter(graph).static_order()]) == len(graph)


def test_functions_can_be_read_at_once() -> None:
    long = []
    for name, node in functions():
        first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
        header = node.body[0].lineno - node.lineno
        lines = node.end_lineno - first.lineno + 1 + header
        if lines > LONGEST:
            long.append(f"{name}: {lines} lines")
    assert not long


def test_functions_take_few_parameters() -> None:
    many = []
    for name, node in functions():
        taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if len(taken) > MOST + 1 and node.name not in BY_OTHERS:  # one is self
            many.append(f"{name}: {len(taken)} parameters")
    assert not many
