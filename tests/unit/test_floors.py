"""Imports go down the floors of the README's map only."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def floors() -> list[str]:
    """Folders of the package, top first, as the README lists them."""
    rows = (ROOT / "README.md").read_text().split("## The map of the folders")[1].splitlines()
    return [row.split("`")[1].removeprefix("autopar/") for row in rows if row.startswith("| `autopar/")]


def imported(path: Path) -> set[str]:
    """Folders of the package that a file imports from, at its top or inside a function."""
    nodes = ast.walk(ast.parse(path.read_text()))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.split(".")[1] for name in modules if name.startswith("autopar.")}


def test_the_map_names_every_folder():
    assert sorted(floors()) == sorted(path.parent.name for path in ROOT.glob("autopar/*/__init__.py"))


def test_no_import_goes_up():
    height = {name: at for at, name in enumerate(reversed(floors()))}
    upward = [
        f"{path.relative_to(ROOT)} imports {name}"
        for folder in height
        for path in (ROOT / "autopar" / folder).glob("*.py")
        for name in imported(path)
        if height[name] > height[folder]
    ]
    assert not upward


def test_the_judge_shares_no_code_with_the_search():
    used = set().union(*(imported(path) for path in (ROOT / "autopar/judge").glob("*.py")))
    assert not used & {"inter", "intra"}


def test_every_folder_says_what_comes_in_and_out():
    for path in ROOT.glob("autopar/*/__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path
