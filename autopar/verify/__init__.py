"""A plan against one process. In: a plan and its model file. Out: errors of loss, gradients and parameters, and collectives
that are not on the plan's list, from a run of the plan, or of its shrunk twin, on CPU ranks."""
