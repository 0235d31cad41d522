"""The machine and what it costs to compute and communicate on it. In: names or files of cost tables. Out: seconds, bytes.

cluster = load_cluster("dgx-h100", inter_node_gbits_per_s=800)
cluster.device.matmul_s(4096, 4096, 4096, dtype="bfloat16")
cluster.collective_s("all_reduce", 2**28, cluster.axis_group(16, (2, 8), (0,)))
"""

from autopar.cluster.cluster import Cluster, RankGroup
from autopar.cluster.cost_tables import cluster_names, load_cluster, save_cluster
from autopar.cluster.device import Device

__all__ = ["Cluster", "Device", "RankGroup", "cluster_names", "load_cluster", "save_cluster"]
