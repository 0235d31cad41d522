"""What a comparison against a grid of manual layouts found."""

from autopar.core.plan import Plan, PlanStruct


class Comparison(PlanStruct, frozen=True, kw_only=True):
    """``plan`` beside the ``best`` of ``num_layouts`` manual layouts, ``num_fit`` of which fit in memory.

    ``best`` is None when none fits, unless one layout was asked for, which is then shown as it is; ``layout`` is the
    text of ``best`` (or of what was asked for)."""

    plan: Plan
    best: Plan | None
    num_layouts: int
    num_fit: int
    layout: str
