"""What may be sharded. In: an op of the graph. Out: its rule, a label per dim and what cutting a label means, and the rule as
options of one mesh axis. An op without a rule is replicated."""
