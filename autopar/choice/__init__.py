"""The pairwise choice problem with usage limits, by itself.

In: nodes that take one choice each, costs of choices and of pairs of choices, limits on what they use. Out: the best
choices, or bounds on their cost. Nothing here knows of tensors or meshes; of autopar it imports nouns of ``core`` alone.

problem                     the problem, and the typed outcome of a solve
evaluate                    re-scores any solution; shares no code with the solvers
elimination, mini_buckets   the optimum without limits, or a bound on it, for many prices at once
lagrangian                  limits as prices; ``solve_exactly`` combines all solvers
presolve, ilp, highs        the integer program of what is left
local_search                feasible choices near infeasible ones
"""
