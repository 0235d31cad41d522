"""Memory at the fullest moment of a backward: the search respects it, and chunks of a device share the workspace."""

import pytest

import autopar
from autopar.core.plan import MemoryParts, memory_of_chunks
from tests.conftest import example_workload

RESNET = {"size": "250M", "base_channels": 16, "width_factor": 2, "classes": 64, "image_size": 64}


@pytest.mark.parametrize("share", [0.97, 0.9, 0.8])
def test_a_plan_of_one_micro_batch_keeps_to_the_budget(share: float) -> None:
    """A convolutional net saves most in its first blocks and has its parameters in the last: gradients come long before
    the saved tensors are gone."""
    workload = example_workload("wide_resnet", **RESNET)

    def plan(memory_gib: float | None) -> autopar.Plan:
        return autopar.plan(
            workload,
            cluster="cpu-gloo",
            gpus=1,
            global_batch=16,
            micro_batch=16,
            dtype="fp32",
            memory_gib=memory_gib,
        )

    free = plan(None).estimate.peak_memory_bytes
    found = plan(share * free / 2**30)
    assert found.microbatches == 1
    assert found.estimate.fits
    assert found.estimate.peak_memory_bytes <= share * free


def test_one_chunk_of_a_device_is_at_its_peak_while_the_others_rest() -> None:
    def chunk(saved: int, workspace: int, overlaid: int) -> MemoryParts:
        return MemoryParts(
            parameters_bytes=100,
            gradients_bytes=0,
            optimizer_bytes=0,
            saved_activations_bytes=saved,
            workspace_bytes=workspace,
            fixed_bytes=7,
            overlaid_bytes=overlaid,
        )

    # at the first's peak: 200 + 50 + 40 saved, of which 30 are gone, + 35; at the second's: 200 + 90 - 5 + 20
    assert memory_of_chunks([chunk(50, 35, 30), chunk(40, 20, 5)]).tensor_bytes == 200 + 90 - 5 + 20
