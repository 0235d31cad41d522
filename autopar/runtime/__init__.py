"""Runs a plan on torch.distributed. In: a plan, a model, an optimizer's maker; out: a trainer, one per rank.

layout, move      where a tensor's elements lie on a mesh, and the collectives that change that
usage, kernels    what an op's placements mean by its sharding rule, and how it runs on local tensors
program, stage    a stage's ops with placements for every edge, and the function of local tensors they make
joint             that function traced with its backward and split in two graphs, as the plan recomputes
transfer          tensors between unequal meshes
parameters        ZeRO, gradients, optimizer, tied weights
trainer, apply    the loop over the schedule's actions, and the way in
"""
