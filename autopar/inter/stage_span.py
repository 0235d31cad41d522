"""A stage as the searches pass it on: consecutive blocks, on a class of submeshes or on a number of devices."""

from typing import NamedTuple


class SubmeshStage(NamedTuple):
    """Blocks ``first_block <= i < end_block`` on a submesh of class ``submesh``, an index of
    ``PipelineProblem.submesh_sizes``."""

    first_block: int
    end_block: int
    submesh: int


class DeviceStage(NamedTuple):
    """Blocks ``first_block <= i < end_block`` on ``num_devices`` devices, wherever these are."""

    first_block: int
    end_block: int
    num_devices: int
