"""The forward graph: in comes a ``Workload``, out comes a ``Traced`` (our ``Graph`` and the torch.fx graph behind it).

``trace`` = ``fake`` (tensors without memory) -> ``export`` (torch.export) -> ``normalise`` (no no-ops, no in-place ops)
-> ``convert`` (torch.fx to ``ir.Graph``)."""
