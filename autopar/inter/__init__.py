"""The outer level: a workload and a cluster come in, the best pipeline of stages on device meshes comes out as a plan.

planner, lanes, beside  the way in, over micro-batch sizes, two side by side, on a second core where that pays
size_search             the search at one of them
blocks, stages, stage_types, stage_tables
                        what all stages cost on all meshes, and what none is below
partition, pipelines, tails, completion, candidates, bounds
                        the best-first search over cuts and submeshes, its bounds and where it begins
interleaving, arrangement, finish, mix, transfers, stage_memory
                        interleaved pipelines, and one pipeline as it would run: points of frontiers, sends, memory
emit, uses, lying, summary, provenance, judged
                        the plan that is written, and judged before it is handed out
estimate, layouts, scatter_gather, grid, pins
                        manual layouts under the same model, and what users fix
serving, replica        inference of a layout
smallest, infeasible    what to say where nothing fits
"""
