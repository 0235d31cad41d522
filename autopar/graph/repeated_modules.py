"""Finds a model's repeated modules, its units (transformer layers, residual blocks), from the module paths of its ops.

A path component that is a number names a child of a container (``layers.3``, ``h.0``, ``encoder.block.5``,
``layer2.1``). An op may be inside several, as in ``stages.2.4.shortcut.0``: its unit is the outermost child, unless no
two children of that container are equal while those of a container inside are (the stages of a ResNet differ, their
residual units repeat).
"""

from collections import defaultdict
from collections.abc import Iterable

from autopar.graph.ir import Graph, Op

_MIN_COVERED_SHARE = (
    0.9  # of the matrix ops that must be inside the units of inner containers for these to replace an outer one
)


def repeated_modules(graph: Graph) -> dict[int, str]:
    """Op id -> path of its unit, for the ops inside a unit; empty where fewer than half of the matrix ops are in one.

    Linear in the number of ops."""
    children: dict[str, dict[str, list[Op]]] = defaultdict(lambda: defaultdict(list))  # container -> child -> ops
    for op in graph.ops:
        for container, child in _numbered_children(op.module_path):
            children[container][child].append(op)
    tops = [container for container in children if not any(True for _ in _numbered_children(container))]
    units: dict[int, str] = {}
    for top in tops:
        for container in _chosen_containers(graph, top, children):
            for child, ops in children[container].items():
                units.update((op.id, child) for op in ops)
    heavy = [op.id for op in graph.ops if op.is_matrix_op]
    covered = sum(op in units for op in heavy)
    return units if 2 * covered >= len(heavy) else {}


def _numbered_children(path: str) -> Iterable[tuple[str, str]]:
    """(container, child) for every number in the path, outermost first.

    >>> list(_numbered_children("stages.2.4.conv"))
    [('stages', 'stages.2'), ('stages.2', 'stages.2.4')]
    """
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            yield ".".join(parts[:index]), ".".join(parts[: index + 1])


def _chosen_containers(graph: Graph, top: str, children: dict[str, dict[str, list[Op]]]) -> list[str]:
    """The containers whose children are the units: ``top``, or containers inside it, or none."""
    groups = children[top]
    if not _has_equal_children(graph, groups):
        inner = [name for name in children if any(name == child or name.startswith(child + ".") for child in groups)]
        # Outermost among the inner ones only: nothing between them and ``top`` but a child of ``top``.
        inner = [name for name in inner if len(list(_numbered_children(name))) == 1]
        if any(_has_equal_children(graph, children[name]) and _are_layers(name, children[name]) for name in inner):
            inner = [name for name in inner if _are_layers(name, children[name])]
            heavy = {op.id for ops in groups.values() for op in ops if op.is_matrix_op}
            inside = {op.id for name in inner for ops in children[name].values() for op in ops} & heavy
            if len(inside) >= _MIN_COVERED_SHARE * len(heavy):
                return inner
    return [top] if _are_layers(top, groups) else []


def _has_equal_children(graph: Graph, groups: dict[str, list[Op]]) -> bool:
    """Whether any two children run the same ops on the same shapes."""
    keys = [
        tuple((op.target, tuple(graph.values[value].shape for value in op.outputs)) for op in ops)
        for ops in groups.values()
    ]
    return len(set(keys)) < len(keys)


def _are_layers(container: str, groups: dict[str, list[Op]]) -> bool:
    """Whether the children are layers rather than leaf modules: some have matrix ops, and most have modules inside or
    all have matrix ops."""
    heavy = [any(op.is_matrix_op for op in ops) for ops in groups.values()]
    deeper = [any(op.module_path != child for op in ops) for child, ops in groups.items()]
    return any(heavy) and (2 * sum(deeper) > len(groups) or all(heavy))
