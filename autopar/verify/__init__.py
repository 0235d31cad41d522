"""Checks that a plan computes what the model computes. In: a plan and its model file. Out: errors of loss, gradients
and parameters, and collectives that the plan does not list, from a run of the plan, shrunk to the ranks there are, on
CPU processes.

shrink           a plan on fewer ranks
single_process   the model in one process, the reference
verify_plan      the comparison
"""
