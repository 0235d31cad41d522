"""The outer search over pipeline stages: the blocks of a model and a cluster come in, pipelines with their stages on
submeshes, the choice of every block and the simulated step go out.

Costs of stages, each file importing only those above it
  block_pins, stage_kinds     what users fix; which stages cost the same
  block_pricer                frontiers of blocks per mesh and micro-batch size
  micro_batch_setting, in_flight_grid, frontier_cache
                              the frontiers of all blocks at one micro-batch size
  stage_pricing, stage_choice, mesh_totals
                              seconds and bytes of a stage under a choice, and of all stages with uniform choices
  fastest_choice, stage_ilp   the fastest choice for a stage that fits
  block_choice, stage_memory, stage_transfers, tied_gradients
                              placements, peak memory, and what stages exchange
  stage_costs                 all of that for one micro-batch size
  memory_fit, mesh_bounds, uniform_times, even_pipelines, stage_cost_tables
                              lower bounds and reachable times of all stages, as the search reads them

The search
  pipeline_problem, alpa_dp, pipeline_bounds, bound_tables, partial_pipelines, branch_and_bound
                              branch and bound over partitions and submeshes
  even_partition, pipeline_candidate, interleaved_search
                              one pipeline as it would run, and the interleaved ones
  micro_batch_search, parallel_search, worker_process
                              one micro-batch size, and all of them in two workers
"""
