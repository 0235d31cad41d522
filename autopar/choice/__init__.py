"""The pairwise choice problem with usage limits, by itself: nothing of autopar is in it but nouns of ``core``.

In: nodes with a choice each, costs of choices and of pairs, limits on usages. Out: the best choice, or bounds on it.
``problem`` states it, ``evaluate`` re-scores any solution and shares no code with the solvers: ``elimination`` and
``mini_buckets`` (many prices at once), ``lagrangian``, ``presolve``, ``local_search``, ``ilp``."""
