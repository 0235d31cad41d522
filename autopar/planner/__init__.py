"""The verb ``plan``. In: a workload and a cluster. Out: the best plan found, judged, with its gap; or the error that says
what would fit.

It drives the search of ``inter`` and writes what that found as a plan.
"""
