"""The words of `docs/glossary.md`: what must not be read in any text, and what no identifier may be called.

Texts are docstrings, comments, messages, help and documents, read as a file's whole text; identifiers are the names in the
syntax tree, split at underscores and capitals. Serialized keys are strings and so remain as files have them.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("banned_words.txt")
FOLDERS = ("autopar", "tests", "examples", "docs", ".ci")
SUFFIXES = (".py", ".md", ".txt", ".toml")


def banned(section: str) -> list[str]:
    """The entries of one section of the list: a line each below ``[section]``, comments apart."""
    parts = re.split(r"(?m)^\[(\w+)\]$", LIST.read_text())
    lines = dict(zip(parts[1::2], parts[2::2], strict=True))[section].splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def texts() -> Iterator[Path]:
    yield from (ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "pyproject.toml"))
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES and path != LIST:
                yield path


def words(name: str) -> list[str]:
    """``StageCosts`` and ``stage_costs`` are both stage, costs."""
    return [word.lower() for part in name.split("_") for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", part)]


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that the file gives to something, with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, node.lineno
            case ast.arg(arg=name):
                yield name, node.lineno
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name, node.lineno
            case ast.alias(asname=str(name)):
                yield name, node.lineno


@pytest.mark.parametrize("phrase", banned("texts"))
def test_no_text_says(phrase: str) -> None:
    pattern = re.compile(rf"\b{phrase}\b", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


def test_no_identifier_is_called() -> None:
    refused = {tuple(entry.split()) for entry in banned("identifiers")}
    found = []
    for folder in ("autopar", "tests", "examples", ".ci"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for name, line in identifiers(ast.parse(path.read_text())):
                parts = words(name)
                runs = {tuple(parts[at : at + size]) for size in (1, 2, 3) for at in range(len(parts) - size + 1)}
                if runs & refused:
                    found.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert not found, "\n".join(found)


def test_file_names_are_of_the_glossary() -> None:
    refused = {tuple(entry.split()) for entry in banned("identifiers")}
    assert not [path for path in (ROOT / "autopar").rglob("*.py") if {(word,) for word in words(path.stem)} & refused]
