"""The outcome of comparing a plan with a grid of manual layouts."""

from autopar.core.plan import Plan, PlanStruct


class Comparison(PlanStruct, frozen=True, kw_only=True):
    """``plan`` and the ``best`` of ``num_layouts`` manual layouts, ``num_fit`` of which fit in memory.

    ``best`` is the fastest that fits, None where none does; where a single layout was asked for, it is that one, whether
    it fits or not. ``layout`` is the text of ``best``, "" for None."""

    plan: Plan
    best: Plan | None
    num_layouts: int
    num_fit: int
    layout: str
