"""Lowers a plan's stages to local graphs. In: a plan and the traced graph; out: per stage a ``StageProgram`` and its
``LoweredStage``, forward and backward torch.fx graphs with functional collectives. Process groups are known by name only, and
nothing here has the state of a training.

shards, rank_mesh, redistribute_tensor
                   which elements a rank stores, and redistribution inside a mesh
op_sharding        what an op's planned placements mean by its rule
planned_blocks, value_placements, value_slots, stage_inputs, build_stage_program, build_programs
                   a plan's blocks, and from them the program of a stage and those of all stages
stage_program      the nouns of a program
local_op, local_kernels, batch_norm, cross_entropy, randomness
                   an op on local tensors
stage_function     a program as a function of local tensors
joint_graph, schedule_nodes, prefetch_gathers, in_place, fx_nodes
                   that function traced with its backward, partitioned and ordered
lowered_collectives
                   the collectives of the two graphs
"""
