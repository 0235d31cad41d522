"""The judge: prices a finished plan from its placements. In: a plan, its traced model, a cluster. Out: times, memory,
collectives, and where the plan's own figures differ.

context                                      the model under one Execution, the blocks of a stage, one block on its mesh
redistribution_path, judge_mesh              the cheapest redistribution of one tensor; local shapes and collectives
placed_op, op_price, block_kernels           an op under its placements, its kernels on one rank, and those of a block
block_redistributions                        all redistributions inside a block
saved_bytes, workspace_bytes, peak_memory    what is saved for the backward, what lives while an op runs, the peak
recomputed_ops, selective_recompute          what the backward recomputes
parameter_price, tied_parameter_price        ZeRO's collectives and stored bytes; parameters of several blocks or stages
block_price, stage_price, transfer_price     a block, a stage, what goes from stage to stage
step_items, collective_list                  where the step time goes, and which collectives are issued
judge                                        the whole plan, and its differences

It shares no code with the search (``intra``, ``inter``): only the graph, the rules, the cost tables and the nouns of a
plan.
"""
