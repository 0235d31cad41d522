"""Runs a plan on torch.distributed. In: a plan, a model, an optimizer's maker; out: a trainer, one per rank.

layout, move      where a tensor's elements lie on a mesh, and the collectives that change that
usage             what an op's placements mean by its sharding rule
local_op, kernels an op on local tensors, and how those run that are not their own local function
planned, build, build_stage
                  what a plan says of a model's blocks, and the programs of all stages and of one
program, stage    a stage's ops with placements for every edge, and the function of local tensors they make
joint             that function traced with its backward and split in two graphs, as the plan recomputes
transfer          tensors between unequal meshes
parameters        ZeRO, gradients, optimizer, tied weights
agreement         what ranks must agree on before they start
trainer, apply    the loop over the schedule's actions, and the way in
"""
