"""The smallest budget that would do, and what fills it: the answer to "no plan fits".

Every stage takes its leanest choice found (`intra.price_rows.lean_rows`); over the stages, from the last one backwards,

    need(s, i, d) = min over j, k of max(lean bytes of blocks i..j-1 on submesh k with s stages from it on, need(s - 1,
    j, d - n_k))

so need(S, 0, D) is the memory of the fullest device of the leanest pipeline.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.inter.finish import StageChoice
from autopar.inter.stages import FREE, StageBook

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Smallest:
    """The fullest stage of the leanest pipeline: its bytes with the fixed share, how it runs, and what it holds."""

    num_bytes: float
    book: StageBook
    stage: tuple[int, int, int]
    in_flight: int
    choice: StageChoice


def smallest_budget(book: StageBook, sizes: tuple[int, ...], in_flight_of: tuple[int, ...]) -> Smallest | None:
    """The least need of any pipeline of one micro-batch size; ``in_flight_of[s - 1]`` micro-batches are held by stage
    number s from the last. None where no pipeline runs at all."""
    count, gpus = len(book.blocks.blocks), book.gpus
    tables = {
        held: np.stack([_lean(book, size, held)[book.type_of] for size in sizes], -1) for held in set(in_flight_of)
    }
    for table in tables.values():
        table[book.type_of < 0] = np.inf
    need = np.full((count + 1, gpus + 1), np.inf)
    need[count, 0] = 0.0
    layers = [need]
    for held in in_flight_of:
        following = np.full_like(need, np.inf)
        for k, size in enumerate(sizes):
            if size <= gpus:
                step = np.maximum(tables[held][:, :, k, None], layers[-1][None, :, : gpus + 1 - size]).min(axis=1)
                following[:, size:] = np.minimum(following[:, size:], step)
        layers.append(following)
    best = min(range(1, len(layers)), key=lambda s: float(layers[s][0, gpus]), default=0)
    if not best or not np.isfinite(layers[best][0, gpus]):
        return None
    goal, i, devices, fullest = float(layers[best][0, gpus]), 0, gpus, None
    for s in range(best, 0, -1):
        held = in_flight_of[s - 1]
        for k, size in enumerate(sizes):
            if size > devices:
                continue
            cost = np.maximum(tables[held][i, :, k], layers[s - 1][:, devices - size])
            j = int(cost.argmin())
            if cost[j] <= goal:
                own = float(tables[held][i, j, k])
                if fullest is None or own > fullest[0]:
                    fullest = (own, (i, j, size), held)
                i, devices = j, devices - size
                break
    assert fullest is not None
    (first, end, size), held = fullest[1], fullest[2]
    return Smallest(
        num_bytes=goal + book.fixed_bytes(),
        book=book,
        stage=(first, end, size),
        in_flight=held,
        choice=_lean_choice(book, int(book.type_of[first, end]), size, held),
    )


def _lean(book: StageBook, size: int, held: int) -> Floats:
    """(types,) bytes without the fixed share."""
    needs = [book.sums(mesh, FREE).memory_bytes(held).min(axis=(1, 2)) for mesh in book.meshes(size)]
    return np.asarray(np.min(needs, axis=0)) if needs else np.full(len(book.counts), np.inf)


def _lean_choice(book: StageBook, kind: int, size: int, held: int) -> StageChoice:
    found = []
    for mesh in book.meshes(size):
        memory = book.sums(mesh, FREE).memory_bytes(held)[kind]
        row, boundary = divmod(int(memory.argmin()), memory.shape[1])
        found.append((float(memory[row, boundary]), mesh, row, boundary))
    _, mesh, at, boundary = min(found, key=lambda one: one[0])
    points = tuple(
        (int(column), (((FREE, at), int(book.counts[kind, column])),)) for column in np.flatnonzero(book.counts[kind])
    )
    return StageChoice(mesh=mesh, boundary=boundary, points=points)
