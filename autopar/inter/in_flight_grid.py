"""The in-flight micro-batch counts for which frontiers are solved, and interpolation between them."""

from collections.abc import Sequence

IN_FLIGHT_GRID = (1, 2, 4, 8, 16, 32)
"""Numbers of in-flight micro-batches (weights of saved bytes) for which memory-priced objectives are made."""
LEAN_IN_FLIGHT_GRID = (1, 4, 32)
"""The same for the least-memory objectives, whose solutions differ less."""


def interpolation_weights(grid: Sequence[int], in_flight: float) -> tuple[tuple[int, float], ...]:
    """The grid points next to ``in_flight`` and the weight of each; their weighted mean is ``in_flight``, or the last
    grid point where ``in_flight`` is beyond it.

    >>> interpolation_weights((1, 4, 32), 2.5), interpolation_weights((1, 4, 32), 50)
    (((1, 0.5), (4, 0.5)), ((32, 1.0),))
    """
    above = next((point for point in grid if point >= in_flight), grid[-1])
    below = max(point for point in grid if point <= in_flight)
    if above <= below:
        return ((below, 1.0),)
    share = (in_flight - below) / (above - below)
    return ((below, 1.0 - share), (above, share))
