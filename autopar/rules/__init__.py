"""Sharding rules: which dims of an op may be sharded. In: an op of the graph. Out: its rule, which labels the dims of its
tensors and says what sharding a label means, and the options that the rule gives on one mesh axis. An op without a rule
is replicated."""
