"""Runs HiGHS under PuLP: silent, from a start solution, and ended by Ctrl-C within a second."""

from typing import Any

import highspy
import pulp

from autopar.core.stdout_descriptor import muted_stdout


def solve_highs(program: pulp.LpProblem, start: dict[str, float] | None = None, **options: Any) -> None:
    """Solve ``program`` in place; ``options`` are those of ``pulp.HiGHS``.

    ``start`` is a feasible value for every variable, by name. HiGHS 1.16.0 prints a banner to descriptor 1 whatever its
    options say, so the descriptor is muted for the length of the solve. Read ``status`` and ``sol_status`` before any
    value: PuLP calls the best solution at a time limit "Optimal" in the first of the two.

    >>> program = pulp.LpProblem("example", pulp.LpMinimize)
    >>> x = program.add_variable("x", 0, 5, pulp.LpInteger)
    >>> program += x >= 1.5
    >>> program.setObjective(x * 1.0)
    >>> solve_highs(program)
    >>> program.sol_status == pulp.LpSolutionOptimal, x.value()
    (True, 2.0)
    """
    with muted_stdout():
        program.solve(_Highs(start, msg=False, **options))


class _Highs(pulp.HiGHS):  # type: ignore[misc]
    """PuLP's HiGHS with a start solution and an answer to Ctrl-C within a second (plain ``run`` ignores it)."""

    def __init__(self, start: dict[str, float] | None, **options: Any) -> None:
        super().__init__(**options)
        self.start = start

    def callSolver(self, lp: pulp.LpProblem) -> None:  # noqa: N802 - the name is PuLP's
        highs = lp.solverModel
        assert highs.getNumRow() == len(lp.constraints()), "HiGHS refused a row, which PuLP does not notice"
        if self.start is not None:
            solution = highspy.HighsSolution()
            solution.col_value = [self.start[variable.name] for variable in lp.variables()]
            highs.setSolution(solution)
        highs.HandleKeyboardInterrupt = True
        highs.startSolve()
        try:
            while not highs.wait(0.2)[0]:
                pass
        except KeyboardInterrupt:
            highs.cancelSolve()
            highs.wait(10.0)
            raise

    def findSolutionValues(self, lp: pulp.LpProblem) -> tuple[int, int]:  # noqa: N802 - the name is PuLP's
        """PuLP indexes the solution without asking whether there is one; HiGHS leaves it empty on some early exits."""
        if lp.solverModel.getSolution().value_valid:
            return super().findSolutionValues(lp)
        if lp.solverModel.getModelStatus() in (
            highspy.HighsModelStatus.kInfeasible,
            highspy.HighsModelStatus.kUnboundedOrInfeasible,  # every variable is bounded by its marginal, so infeasible
        ):
            return pulp.LpStatusInfeasible, pulp.LpSolutionInfeasible
        return pulp.LpStatusNotSolved, pulp.LpSolutionNoSolutionFound
