"""The user's model file: in comes a path (or three callables), out comes a ``Workload`` that builds model and
inputs."""

from autopar.workload.model_file import load_workload, parse_setting
from autopar.workload.user_code import describe_user_error, guard_user_code
from autopar.workload.workload import Workload

__all__ = ["Workload", "describe_user_error", "guard_user_code", "load_workload", "parse_setting"]
