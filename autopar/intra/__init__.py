"""The inner level: the blocks of a graph and a mesh come in, frontiers of the best shardings come out.

space, data_axis, strategies
                        what may be chosen, op by op and axis by axis
tables, op_metrics, moves, copies, hiding, again, regather, workspace
                        seconds and bytes of every choice, and of every pair of neighbours
price_rows, frontier, totals
                        ways of weighing time against memory, the optimum of each, and what it costs
problem, elimination, lagrangian, repair, reductions, ilp, judge
                        the pairwise problem with memory rows, its solvers, and who scores their solutions again
"""
