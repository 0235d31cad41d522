"""Multilinear interpolation of a table between its nodes, vectorised over the points.

position of x on nodes c_0 < ... < c_K:   i + w,  c_i <= x <= c_{i+1},  w = (x - c_i) / (c_{i+1} - c_i)
value = sum over the corners of the cell of (product of weights) * corner
"""

import itertools

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def multilinear(nodes: tuple[Floats, ...], values: Floats, points: tuple[Floats, ...]) -> Floats:
    """Values at ``points``, one array per dimension that broadcast together, clamped to the grid. ``nodes``: one growing
    line per dimension; ``values``: at the nodes, one dimension per line.

    >>> float(multilinear((np.array([0.0, 2.0]),), np.array([10.0, 30.0]), (np.array(0.5),)))
    15.0
    """
    shape = np.broadcast_shapes(*(point.shape for point in points))
    lower: list[NDArray[np.intp]] = []
    weight: list[Floats] = []
    for line, point in zip(nodes, points, strict=True):
        if len(line) == 1:
            lower.append(np.zeros(point.shape, np.intp))
            weight.append(np.zeros(point.shape))
            continue
        index = np.minimum(np.maximum(line.searchsorted(point, side="right") - 1, 0), len(line) - 2)
        fraction = (point - line[index]) / (line[index + 1] - line[index])
        lower.append(index)
        weight.append(np.minimum(np.maximum(fraction, 0.0), 1.0))
    total = np.zeros(shape)
    for corner in itertools.product((0, 1), repeat=len(nodes)):
        if any(up and len(line) == 1 for up, line in zip(corner, nodes, strict=True)):
            continue  # its weight is 0
        share: Floats | float = 1.0
        for up, fraction in zip(corner, weight, strict=True):
            share = share * (fraction if up else 1.0 - fraction)
        total += share * values[tuple(index + up for up, index in zip(corner, lower, strict=True))]
    return total
