"""Runs a plan on torch.distributed. In: a plan, a model, an optimizer factory. Out: a trainer on every rank.

apply              the entry point
agreement          what ranks must agree on before they start
trainer, pipeline_step, micro_batches
                   a training step: the whole of it, its passes by the schedule, its inputs
stage_runner       the forward and backward of one stage
transfer           tensors sent between unequal meshes
training_state, stored_parameters, gradient_reduction, tied_parameters, loss_scale
                   what lives over steps: weights and masters under ZeRO, their gradients, the optimizer
checkpoint, checkpoint_shards, checkpoint_integrity, checkpoint_metadata, pickled_data
                   saving, and loading without running anything
deferred_initialisation
                   weights of a model on the meta device
count_collectives  the collectives that ran, compared with the plan's list

The stages' local graphs come from ``runtime.lower``.
"""
