"""What needs a local form is planned and run only where the runtime has one."""

from autopar.rules.local_forms import OPS_WITH_LOCAL_FORM
from autopar.runtime.lower.local_kernels import LOCAL_KERNELS


def test_every_local_form_that_may_be_planned_is_a_kernel_of_the_runtime():
    assert set(LOCAL_KERNELS) >= OPS_WITH_LOCAL_FORM
