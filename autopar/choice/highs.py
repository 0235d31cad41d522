"""Runs HiGHS under PuLP: silent, from a start solution, and ended by Ctrl-C within a second."""

from typing import Any

import highspy
import pulp

from autopar.core.stdout_descriptor import muted_stdout


def solve_highs(program: pulp.LpProblem, start: dict[str, float] | None = None, **options: Any) -> None:
    """Solve ``program`` in place; ``options`` are those of ``pulp.HiGHS``.

    ``start`` is a feasible value for every variable, by name. HiGHS 1.16.0 prints a banner to descriptor 1 whatever its
    options, so the descriptor is muted during the solve. Read ``sol_status`` and not only ``status`` before any value:
    at a time limit PuLP calls the best solution "Optimal" in ``status``.

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
    """PuLP's HiGHS with a start solution, which Ctrl-C ends within a second (HiGHS's ``run`` ignores it)."""

    def __init__(self, start: dict[str, float] | None, **options: Any) -> None:
        super().__init__(**options)
        self.start = start

    def callSolver(self, lp: pulp.LpProblem) -> None:  # noqa: N802 - the name is PuLP's
        """Run HiGHS in its own thread and poll it, so that Python handles Ctrl-C."""
        highs = lp.solverModel
        assert highs.getNumRow() == len(lp.constraints()), "HiGHS rejected a row and PuLP did not report it"
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
        """PuLP reads the solution without checking that there is one; HiGHS leaves it empty on some early exits."""
        if lp.solverModel.getSolution().value_valid:
            return super().findSolutionValues(lp)
        if lp.solverModel.getModelStatus() in (
            highspy.HighsModelStatus.kInfeasible,
            highspy.HighsModelStatus.kUnboundedOrInfeasible,  # all variables are bounded, so it is infeasible
        ):
            return pulp.LpStatusInfeasible, pulp.LpSolutionInfeasible
        return pulp.LpStatusNotSolved, pulp.LpSolutionNoSolutionFound
