"""Greedy repair and local improvement of choices, one node at a time: a cheap feasible point, never a proof.

With all other nodes fixed, moving node v to choice k changes

    the cost by         d_vk = cost of v's entry k - cost of its present entry                        (_move_effects)
    usage of row r by   u_rvk, likewise                                                               (_move_effects)

where an entry adds up what the choice, and its edges to the others' present choices, cost and use. While a limit is
exceeded, take the move with the least cost d_vk per unit by which the total excess falls (find_repair_move); then, while there is one,
the move that saves most and exceeds no limit (find_saving_move).
"""

import math
from collections.abc import Sequence

import numpy as np

from autopar.choice.evaluate import evaluate
from autopar.choice.presolve import row_scale
from autopar.choice.problem import Floats, Problem

MAX_MOVES = 400


def repair_and_improve(problem: Problem, choices: Sequence[int]) -> tuple[int, ...] | None:
    """Feasible choices near ``choices``, or None when single moves lead to none within ``MAX_MOVES``."""
    state = _LocalSearch(problem, choices)
    for _ in range(MAX_MOVES):
        move = state.find_repair_move() if (state.excess() > 0).any() else state.find_saving_move()
        if move is None:
            break
        state.apply_move(*move)
    repaired = tuple(state.choices)
    return repaired if evaluate(problem, repaired).is_feasible else None


class _LocalSearch:
    """Costs and usages of every choice of every node, given the others' present choices, updated by each move.

    An entry is a (node, choice): ``entry_costs`` is (entries,), ``entry_usages`` (rows, entries), and
    ``first_entry[v]`` the first entry of node v. ``row_usages`` (rows,) are those of the present choices.
    """

    def __init__(self, problem: Problem, choices: Sequence[int]) -> None:
        self.problem = problem
        self.choices = list(choices)
        sizes = [len(costs) for costs in problem.costs]
        self.first_entry = np.concatenate([[0], np.cumsum(sizes)])
        self.node_of_entry = np.repeat(np.arange(len(sizes)), sizes)
        self.entry_costs = np.concatenate(problem.costs).astype(float)
        self.entry_usages = np.zeros((len(problem.rows), len(self.entry_costs)))
        self.limits = np.array([row.limit for row in problem.rows])
        self.inverse_limits = 1.0 / np.array([row_scale(row) for row in problem.rows])
        self.edges_of_node: list[list[int]] = [[] for _ in sizes]
        self.edge_usages: dict[int, list[tuple[int, Floats]]] = {}
        self.row_usages = np.zeros(len(problem.rows))
        for number, row in enumerate(problem.rows):
            for node, usage in row.usage.items():
                self.entry_usages[number, self._slice(node)] += usage
                self.row_usages[number] += usage[self.choices[node]]
            for position, pairs in row.edge_usage.items():
                self.edge_usages.setdefault(position, []).append((number, pairs))
                edge = problem.edges[position]
                self.row_usages[number] += pairs[self.choices[edge.first], self.choices[edge.second]]
        for position, edge in enumerate(problem.edges):
            self.edges_of_node[edge.first].append(position)
            self.edges_of_node[edge.second].append(position)
            self._add_edge(position, edge.first)
            self._add_edge(position, edge.second)

    def _slice(self, node: int) -> slice:
        return slice(self.first_entry[node], self.first_entry[node + 1])

    def _add_edge(self, position: int, node: int) -> None:
        """Add what an edge costs and uses, given its other end's choice, to ``node``'s entries."""
        edge = self.problem.edges[position]
        where = self._slice(node)

        def line(table: Floats) -> Floats:
            return table[:, self.choices[edge.second]] if node == edge.first else table[self.choices[edge.first]]

        self.entry_costs[where] += line(edge.costs)
        for number, pairs in self.edge_usages.get(position, ()):
            self.entry_usages[number, where] += line(pairs)

    def _refresh_node(self, node: int) -> None:
        """Compute a node's entries anew."""
        where = self._slice(node)
        self.entry_costs[where] = self.problem.costs[node]
        for number, row in enumerate(self.problem.rows):
            self.entry_usages[number, where] = row.usage.get(node, 0.0)
        for position in self.edges_of_node[node]:
            self._add_edge(position, node)

    def excess(self) -> Floats:
        """(rows,) by how much each row exceeds its limit, as a share of the limit."""
        return np.maximum((self.row_usages - self.limits) * self.inverse_limits, 0.0)

    def _move_effects(self) -> tuple[Floats, Floats]:
        """Change of the cost (entries,) and of every row's usage (rows, entries) by each move; inf cost where
        forbidden."""
        now = self.first_entry[:-1] + np.array(self.choices)
        with np.errstate(invalid="ignore"):
            delta = self.entry_costs - self.entry_costs[now][self.node_of_entry]
        return np.where(np.isfinite(delta), delta, np.inf), self.entry_usages - self.entry_usages[:, now][
            :, self.node_of_entry
        ]

    def find_repair_move(self) -> tuple[int, int] | None:
        """The (node, choice) that lowers the total excess at the least cost per unit of excess, None where no move does."""
        delta, change = self._move_effects()
        after = np.maximum(
            (self.row_usages[:, None] + change - self.limits[:, None]) * self.inverse_limits[:, None], 0.0
        ).sum(axis=0)
        relief = self.excess().sum() - after
        allowed = (relief > 1e-15) & np.isfinite(delta)
        if not allowed.any():
            return None
        rate = np.where(allowed, np.maximum(delta, 0.0) / np.maximum(relief, 1e-300), math.inf)
        best = rate.min()
        ties = np.flatnonzero(rate <= best)
        return self._move_of_entry(int(ties[(delta[ties] - relief[ties]).argmin()]))

    def find_saving_move(self) -> tuple[int, int] | None:
        """The (node, choice) that saves most and exceeds no limit, None where no move saves."""
        delta, change = self._move_effects()
        holds = (self.row_usages[:, None] + change <= self.limits[:, None]).all(axis=0)
        delta = np.where(holds, delta, np.inf)
        best = int(delta.argmin())
        return (
            self._move_of_entry(best)
            if delta[best] < -1e-12 * float(np.abs(self.entry_costs[self.first_entry[:-1] + self.choices]).sum())
            else None
        )

    def _move_of_entry(self, entry: int) -> tuple[int, int]:
        node = int(self.node_of_entry[entry])
        return node, entry - int(self.first_entry[node])

    def apply_move(self, node: int, choice: int) -> None:
        """Let a node take a choice, and update the entries of its neighbours."""
        entry, now = self.first_entry[node] + choice, self.first_entry[node] + self.choices[node]
        self.row_usages += self.entry_usages[:, entry] - self.entry_usages[:, now]
        self.choices[node] = choice
        for position in self.edges_of_node[node]:
            edge = self.problem.edges[position]
            self._refresh_node(edge.second if edge.first == node else edge.first)
