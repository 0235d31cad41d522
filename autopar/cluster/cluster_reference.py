"""How a plan names its cluster, so that commands that take only the plan find the same tables."""

from pathlib import Path

from autopar.cluster.cluster import Cluster
from autopar.cluster.cost_tables import NOT_OVERRIDABLE, cluster_names, load_cluster
from autopar.core.plan import ClusterRef, Scalar


def cluster_reference(cluster: Cluster) -> ClusterRef:
    """The shipped cluster and the overrides that ``load_cluster`` makes ``cluster`` of, found from its numbers that the
    user gave. Without such (a cluster from a file or made in Python) its own name, by which it cannot be loaded.

    >>> cluster_reference(load_cluster("dgx-a100", inter_node_gbits_per_s=800)).overrides
    {'inter_node_gbits_per_s': 800.0}
    """
    found = ClusterRef(name=cluster.name, fingerprint=cluster.fingerprint, overrides={})
    if cluster.name not in cluster_names():
        return found
    shipped = load_cluster(cluster.name)
    if shipped.fingerprint == cluster.fingerprint:
        return found
    overrides: dict[str, Scalar] = {}
    if cluster.device.name != shipped.device.name:
        overrides["device"] = cluster.device.name
    for table in (cluster.device, cluster):
        given = [key for key, source in table.provenance.items() if source.status == "given"]
        overrides |= {key: getattr(table, key) for key in given if key not in NOT_OVERRIDABLE}
    return ClusterRef(name=cluster.name, fingerprint=cluster.fingerprint, overrides=overrides)


def named_as_given(reference: ClusterRef, cluster: "Cluster | str | Path") -> ClusterRef:
    """The reference with the file that a request names instead of a ``Cluster``."""
    if isinstance(cluster, Cluster):
        return reference
    return ClusterRef(name=str(cluster), fingerprint=reference.fingerprint, overrides=reference.overrides)
