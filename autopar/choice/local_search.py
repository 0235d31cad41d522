"""Greedy repair and local improvement of choices, one node at a time: a cheap feasible point, never a proof.

With all other nodes held, node v moving to choice k changes the cost by delta_cost[v, k] and the rows by
delta_usage[r, v, k]. While a row is broken, take the move with the least cost per unit of relief (_repair_move); then,
while one exists, the move that saves most and breaks nothing (_saving_move).
"""

import math
from collections.abc import Sequence

import numpy as np

from autopar.choice.evaluate import evaluate
from autopar.choice.problem import Floats, Problem

MAX_MOVES = 400


def improve(problem: Problem, choices: Sequence[int]) -> tuple[int, ...] | None:
    """Feasible choices near ``choices``, or ``None`` when single moves do not lead to any."""
    state = _State(problem, choices)
    for _ in range(MAX_MOVES):
        move = state.repair_move() if (state.excess() > 0).any() else state.saving_move()
        if move is None:
            break
        state.take(*move)
    found = tuple(state.choices)
    return found if evaluate(problem, found).feasible else None


class _State:
    """Costs and usages of every node's every choice, given the others' present choices, kept up to date by moves.

    Flat arrays over all (node, choice): ``cost`` (total,), ``usage`` (rows, total); ``at[v]`` is node v's first entry.
    """

    def __init__(self, problem: Problem, choices: Sequence[int]) -> None:
        self.problem = problem
        self.choices = list(choices)
        sizes = [len(costs) for costs in problem.costs]
        self.at = np.concatenate([[0], np.cumsum(sizes)])
        self.owner = np.repeat(np.arange(len(sizes)), sizes)
        self.cost = np.concatenate(problem.costs).astype(float)
        self.usage = np.zeros((len(problem.rows), len(self.cost)))
        self.limits = np.array([row.limit for row in problem.rows])
        self.unit = 1.0 / np.maximum(np.abs(self.limits), 1e-300)
        self.near: list[list[int]] = [[] for _ in sizes]
        self.pair_usage: dict[int, list[tuple[int, Floats]]] = {}
        self.used = np.zeros(len(problem.rows))
        for number, row in enumerate(problem.rows):
            for node, usage in row.usage.items():
                self.usage[number, self._slice(node)] += usage
                self.used[number] += usage[self.choices[node]]
            for position, pairs in row.edge_usage.items():
                self.pair_usage.setdefault(position, []).append((number, pairs))
                edge = problem.edges[position]
                self.used[number] += pairs[self.choices[edge.first], self.choices[edge.second]]
        for position, edge in enumerate(problem.edges):
            self.near[edge.first].append(position)
            self.near[edge.second].append(position)
            self._see(position, edge.first)
            self._see(position, edge.second)

    def _slice(self, node: int) -> slice:
        return slice(self.at[node], self.at[node + 1])

    def _see(self, position: int, node: int) -> None:
        """Add what an edge costs and uses, given its other end's choice, to ``node``'s entries."""
        edge = self.problem.edges[position]
        where = self._slice(node)

        def line(table: Floats) -> Floats:
            return table[:, self.choices[edge.second]] if node == edge.first else table[self.choices[edge.first]]

        self.cost[where] += line(edge.costs)
        for number, pairs in self.pair_usage.get(position, ()):
            self.usage[number, where] += line(pairs)

    def _rebuild(self, node: int) -> None:
        where = self._slice(node)
        self.cost[where] = self.problem.costs[node]
        for number, row in enumerate(self.problem.rows):
            self.usage[number, where] = row.usage.get(node, 0.0)
        for position in self.near[node]:
            self._see(position, node)

    def excess(self) -> Floats:
        """By how much each row is over its limit, as a share of the limit (rows,)."""
        return np.maximum((self.used - self.limits) * self.unit, 0.0)

    def _deltas(self) -> tuple[Floats, Floats]:
        """Change of the cost (total,) and of every row (rows, total) by each move; ``inf`` cost where forbidden."""
        now = self.at[:-1] + np.array(self.choices)
        with np.errstate(invalid="ignore"):
            delta = self.cost - self.cost[now][self.owner]
        return np.where(np.isfinite(delta), delta, np.inf), self.usage - self.usage[:, now][:, self.owner]

    def repair_move(self) -> tuple[int, int] | None:
        delta, change = self._deltas()
        after = np.maximum((self.used[:, None] + change - self.limits[:, None]) * self.unit[:, None], 0.0).sum(axis=0)
        relief = self.excess().sum() - after
        allowed = (relief > 1e-15) & np.isfinite(delta)
        if not allowed.any():
            return None
        rate = np.where(allowed, np.maximum(delta, 0.0) / np.maximum(relief, 1e-300), math.inf)
        best = rate.min()
        ties = np.flatnonzero(rate <= best)
        return self._move(int(ties[(delta[ties] - relief[ties]).argmin()]))

    def saving_move(self) -> tuple[int, int] | None:
        delta, change = self._deltas()
        holds = (self.used[:, None] + change <= self.limits[:, None]).all(axis=0)
        delta = np.where(holds, delta, np.inf)
        best = int(delta.argmin())
        return (
            self._move(best)
            if delta[best] < -1e-12 * float(np.abs(self.cost[self.at[:-1] + self.choices]).sum())
            else None
        )

    def _move(self, entry: int) -> tuple[int, int]:
        node = int(self.owner[entry])
        return node, entry - int(self.at[node])

    def take(self, node: int, choice: int) -> None:
        entry, now = self.at[node] + choice, self.at[node] + self.choices[node]
        self.used += self.usage[:, entry] - self.usage[:, now]
        self.choices[node] = choice
        for position in self.near[node]:
            edge = self.problem.edges[position]
            self._rebuild(edge.second if edge.first == node else edge.first)
