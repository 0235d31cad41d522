"""The user's model file: in comes a path (or three callables), out comes a ``Workload`` that builds model and
inputs."""

from autopar.workload.load import load_workload, parse_setting
from autopar.workload.workload import Workload, user_error

__all__ = ["Workload", "load_workload", "parse_setting", "user_error"]
