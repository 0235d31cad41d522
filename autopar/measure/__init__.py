"""Measures this machine. In: the device and the process group. Out: a cost table that ``--cluster`` takes."""
