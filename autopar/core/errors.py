"""The errors that autopar raises for its users: one class per documented exit code.

Every message names the thing, the numbers and the way out. A bug of ours fails an ``assert``, never raises one of these.
"""


class AutoparError(Exception):
    """Base of all errors that a user can cause or resolve; ``exit_code`` is what the command line ends with."""

    exit_code = 1


class UsageError(AutoparError):
    """A wrong flag, setting or combination (exit 2)."""

    exit_code = 2


class LayoutError(UsageError):
    """A manual layout that no runtime can run (exit 2); ``faults`` lists all of its faults.

    >>> LayoutError(["tp=3 does not divide 16 heads", "tp*pp*cp*dp = 12, not 8 GPUs"]).faults[0]
    'tp=3 does not divide 16 heads'
    """

    def __init__(self, faults: list[str]) -> None:
        super().__init__("impossible layout:\n" + "\n".join(f"  - {fault}" for fault in faults))
        self.faults = tuple(faults)


class ModelError(AutoparError):
    """A model file that cannot be loaded or traced (exit 3)."""

    exit_code = 3


class InfeasibleError(AutoparError):
    """No plan fits the memory budget (exit 4); the message names the smallest budget that would do."""

    exit_code = 4


class TimeLimitError(AutoparError):
    """The time limit ended the search before any plan was found (exit 5)."""

    exit_code = 5


class PlanFileError(AutoparError):
    """A plan or table file that is truncated, of an unknown format or out of date (exit 6)."""

    exit_code = 6


class CheckpointError(AutoparError):
    """A checkpoint that is damaged, refused or of another model (exit 6); where there is none, PlanFileError is raised.

    Deliberately not a PlanFileError: code that starts from scratch where there is no checkpoint must not do so, and then
    overwrite it, where there is one that cannot be read."""

    exit_code = 6


class CheckError(AutoparError):
    """A verification that failed (exit 7)."""

    exit_code = 7
