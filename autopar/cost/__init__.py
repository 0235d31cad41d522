"""Seconds and bytes on one rank. In: an op's profile, its local shapes, a cluster. Out: seconds of kernels, of
redistributions and of ZeRO's collectives; bytes of parameters; the tag that says how well founded a price is."""
