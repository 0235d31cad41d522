"""Seconds and bytes on one rank. In: an op's profile, its local shapes, a cluster. Out: time of kernels, of moves between
placements, of ZeRO's collectives; memory of parameters; the tag that says what a price stands on; inference."""
