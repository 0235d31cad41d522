"""Imports go down the floors of the architecture's map only, in no circle, however they are written."""

import ast
import re
from collections import Counter
from functools import cache

import networkx

from tests.conftest import ROOT

PACKAGE = ROOT / "autopar"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
FACE = {"autopar", "autopar.__main__"}  # above all, and names everything
CALLERS_OF_THE_FACE = {"autopar.core.plan"}  # Plan.apply is one call of it
# What is still to be taken apart.
CIRCLES = 0
TWICE = 0, 0  # class names, file names


@cache
def floors() -> list[str]:
    """Folders of the package, top first, as the architecture's page lists them."""
    rows = (ROOT / "docs" / "architecture.md").read_text().split("## The floors")[1].splitlines()
    return [row.split("`")[1].removeprefix("autopar/") for row in rows if row.startswith("| `autopar/")]


def floor_of(module: str) -> str:
    """The row of the map that a module belongs to: its folder, or the nearest one around it that has a row."""
    folder = MODULES[module].parent.relative_to(PACKAGE)
    return next(row for row in map(str, (folder, *folder.parents)) if row in floors())


def imports(module: str) -> set[str]:
    """Modules of the package that one names: at its top, inside a function, for a type checker, or as text."""
    tree = ast.parse(MODULES[module].read_text())
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found |= {origin, *(f"{origin}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            found |= set(re.findall(r"autopar(?:\.\w+)+", node.value))
    return {name for name in found if name in MODULES} - {module}


def graph() -> networkx.DiGraph:
    edges = [(module, other) for module in MODULES for other in imports(module)]
    return networkx.DiGraph(edge for edge in edges if not FACE.intersection(edge))


def test_the_map_names_every_folder() -> None:
    folders = {str(path.parent.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")} - {"."}
    assert {folder for folder in folders if "/" not in folder} <= set(floors()) <= folders


def test_no_import_goes_up() -> None:
    height = {name: at for at, name in enumerate(reversed(floors()))}
    upward = {(module, other) for module, other in graph().edges if height[floor_of(other)] > height[floor_of(module)]}
    assert not upward


def test_only_the_plan_calls_the_face() -> None:
    assert {module for module in MODULES if "autopar" in imports(module)} == CALLERS_OF_THE_FACE


def test_there_is_no_circle() -> None:
    circles = [sorted(part) for part in networkx.strongly_connected_components(graph()) if len(part) > 1]
    assert len(circles) == CIRCLES, circles


def test_class_names_are_unique() -> None:
    names = Counter(
        node.name
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    twice = [name for name, count in names.items() if count > 1]
    assert len(twice) == TWICE[0], sorted(twice)


def test_file_names_are_unique() -> None:
    names = Counter(path.name for path in MODULES.values() if path.name != "__init__.py")
    twice = [name for name, count in names.items() if count > 1]
    assert len(twice) == TWICE[1], sorted(twice)


def test_the_judge_shares_no_code_with_the_search() -> None:
    used = {
        floor_of(other) for module in set(MODULES) - FACE if floor_of(module) == "judge" for other in imports(module)
    }
    assert not used & {"inter", "intra"}


def test_every_folder_says_what_comes_in_and_out() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path
