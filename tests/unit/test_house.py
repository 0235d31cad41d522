"""The walls of the house: what is public is documented, argument lists are short, classes and files are small.

Everything is read from the syntax trees of ``autopar/``; nothing is imported.
"""

import ast
from collections.abc import Iterator

from tests.conftest import ROOT

MAX_POSITIONAL_PARAMETERS = 6
MAX_CLASS_LINES = 200
MAX_FILE_LINES = 400

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted((ROOT / "autopar").rglob("*.py")):
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def public_definitions(body: list[ast.stmt], scope: str = "") -> Iterator[tuple[str, Definition]]:
    """Public classes and functions of a module, and the public members of those classes; what is inside a function, an
    ``if`` or a ``try`` is found where it is at module or class level."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from public_definitions(node.body + node.orelse, scope)
        elif isinstance(node, Definition) and not node.name.startswith("_"):
            yield f"{scope}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{scope}{node.name}.")


def decorators(node: Definition) -> set[str]:
    """The last names of a definition's decorators: ``typing.overload`` and ``overload`` are both "overload"."""
    found = set()
    for decorator in node.decorator_list:
        target = decorator.func if isinstance(decorator, ast.Call) else decorator
        found.add(target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", ""))
    return found


def functions(tree: ast.AST, owner: ast.ClassDef | None = None) -> Iterator[tuple[Function, ast.ClassDef | None]]:
    """Every function of a tree, nested ones too, with the class whose method it is."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield node, owner
        yield from functions(node, node if isinstance(node, ast.ClassDef) else None)


def is_autograd_function(owner: ast.ClassDef | None) -> bool:
    """Whether a class derives from ``torch.autograd.Function``, whose ``apply`` passes arguments by position only."""
    bases = owner.bases if owner is not None else []
    return any(ast.unparse(base).endswith("autograd.Function") for base in bases)


def num_positional_parameters(function: Function, owner: ast.ClassDef | None) -> int:
    """Parameters that may be given by position, ``self`` and ``cls`` apart."""
    arguments = function.args.posonlyargs + function.args.args
    bound = owner is not None and "staticmethod" not in decorators(function)
    return len(arguments) - bool(bound and arguments)


def test_everything_public_has_a_docstring() -> None:
    missing = []
    for path, tree in trees():
        if not ast.get_docstring(tree):
            missing.append(f"{path}: the module")
        for name, node in public_definitions(tree.body):
            # an overload has its implementation's docstring, a setter its property's
            if not ast.get_docstring(node) and not decorators(node) & {"overload", "setter"}:
                missing.append(f"{path}:{node.lineno}: {name}")
    assert not missing, "\n".join(missing)


def test_no_function_takes_more_than_six_positional_parameters() -> None:
    found = []
    for path, tree in trees():
        for function, owner in functions(tree):
            if function.name == "forward" and is_autograd_function(owner):
                continue
            count = num_positional_parameters(function, owner)
            if count > MAX_POSITIONAL_PARAMETERS:
                found.append(f"{path}:{function.lineno}: {function.name} takes {count}")
    assert not found, "\n".join(found)


def test_no_class_is_longer_than_200_lines() -> None:
    found = []
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_CLASS_LINES:
                    found.append(f"{path}:{node.lineno}: {node.name} has {lines} lines")
    assert not found, "\n".join(found)


def test_no_file_is_longer_than_400_lines() -> None:
    counts = {path: len((ROOT / path).read_text().splitlines()) for path, _ in trees()}
    found = [f"{path} has {lines} lines" for path, lines in counts.items() if lines > MAX_FILE_LINES]
    assert not found, "\n".join(found)


SAMPLE = '''
class Scale(torch.autograd.Function):
    """Documented."""
    @staticmethod
    def forward(ctx, a, b, c, d, e, f, g): ...
class Nouns:
    def method(self, a, b, c, d, e, f): ...
    @property
    def size(self): ...
def many(a, b, c, /, d, e, f, g, *, h): ...
def _private(): ...
'''


def test_the_walls_see_what_they_are_for() -> None:
    tree = ast.parse(SAMPLE)
    counts = {function.name: num_positional_parameters(function, owner) for function, owner in functions(tree)}
    assert counts == {"forward": 8, "method": 6, "size": 0, "many": 7, "_private": 0}
    owners = {function.name: owner for function, owner in functions(tree)}
    assert [name for name, owner in owners.items() if is_autograd_function(owner)] == ["forward"]
    undocumented = [name for name, node in public_definitions(tree.body) if not ast.get_docstring(node)]
    assert undocumented == ["Scale.forward", "Nouns", "Nouns.method", "Nouns.size", "many"]


def test_no_test_module_imports_another() -> None:
    modules = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "tests").rglob("*.py"))}
    found = []
    for path, tree in modules.items():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            found += [
                f"{path.relative_to(ROOT)}:{node.lineno}: {name}"
                for name in names
                if name.startswith("tests.") and name.split(".")[-1].startswith("test_")
            ]
    assert not found, "\n".join(found)
