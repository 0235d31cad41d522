"""The forward graph of a model's loss. In: a ``Workload``. Out: a ``TracedGraph`` (our ``Graph`` and the torch.fx graph
behind it), its blocks and the profiles of its ops.

``trace`` = ``fake_tensors`` (tensors without memory) -> ``torch_export`` -> ``normalise`` (no no-ops, no in-place ops)
-> ``from_fx`` (torch.fx to ``ir.Graph``); then ``split_into_blocks`` and ``op_profiles``."""
