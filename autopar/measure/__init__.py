"""Measures this machine into a cost table that ``--cluster`` takes. In: a device, and the ranks of torchrun where there
are several. Out: a ``Cluster`` whose provenance says which numbers were measured.

kernel_times      seconds of kernels on one device
link_times        seconds of collectives and messages between ranks
profile_machine   the table made of them
"""
