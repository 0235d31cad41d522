"""Manual layouts. In: a traced model and the text of a layout. Out: the plan that it means, priced from the cost tables
of the search; the best of a grid of Megatron layouts, next to a plan."""
