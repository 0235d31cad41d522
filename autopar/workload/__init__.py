"""The user's model file. In: a path, or callables in Python. Out: a ``Workload`` that builds the model and its inputs."""

from autopar.workload.model_file import load_workload
from autopar.workload.user_code import describe_user_error, guard_user_code
from autopar.workload.workload import Workload

__all__ = ["Workload", "describe_user_error", "guard_user_code", "load_workload"]
