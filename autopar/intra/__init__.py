"""The inner level of the search: what a block costs on one mesh, and its best shardings.

In: the blocks of a traced model, a mesh and a micro-batch size. Out: for every block its cost tables, and the frontier of
its best shardings over time and memory.

block_space, data_axis, strategies
                        what may be chosen, op by op and axis by axis
block_mesh, priced_model, local_bytes
                        what prices depend on: the mesh, how the model's ops run, bytes on a rank
op_metrics, op_workspace, recompute, parameter_uses, saved_memory
                        what ops cost under each strategy, in seconds and bytes
edge_tables, redistribution_tables, backward_overlap, regather
                        what each pair of neighbouring choices costs
block_tables, table_builder
                        all of these for one block
priced_objectives, storage_choice, frontier, block_totals
                        ways of weighing time against memory, the optimum of each, and what it costs
placement_text          placements as a plan has them
"""
