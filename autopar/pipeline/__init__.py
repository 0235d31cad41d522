"""Pipeline schedules and their simulation. In: a schedule, and seconds per stage. Out: the order of actions of each rank,
micro-batches in flight, the step time."""
