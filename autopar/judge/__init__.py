"""Plans priced a second time. In: a plan, its graph, a cluster. Out: times, memory, collectives, and where the plan says
otherwise.

ground                  what is priced: the model under one program, and a block with its place
ops, routes, flow       an op's kernels at local shapes, the cheapest way between placements, the moves of a block
kept, workspace, peak   memory: what stays for the backward, what passes in an op, the fullest moment
again, selected         what the backward computes a second time
parameters, tied        ZeRO's collectives and state, parameters of several blocks or stages
block, transfers        a block summed up, what crosses between stages
judge                   the whole plan, and its differences
collectives, items      the list of what runs, and what the step is made of

It shares no code with the search (`intra`, `inter`): only the graph, the rules, the tables and the nouns of a plan.
"""
