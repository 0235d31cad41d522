"""The mesh that a block is priced on, and the samples that each of its ranks computes."""

from dataclasses import dataclass

from autopar.cluster.device import Device
from autopar.cost.redistribution_time import MeshLinks


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockMesh:
    """A mesh of (data axis, inner axes ...) with ``local_batch`` samples per data rank.

    ``inner_links`` are the links of the inner axes, ``mesh_links`` those of all axes, the data axis first.
    ``data_ranks`` is the size of the data axis, or 1 for a block that is priced as on one data rank: a batch-parallel
    one (``DataAxis.is_batch_parallel``), whose prices follow from ``local_batch`` alone.
    """

    inner_links: MeshLinks
    mesh_links: MeshLinks
    data_ranks: int
    local_batch: int

    def __post_init__(self) -> None:
        assert self.data_ranks in (1, self.mesh_links.sizes[0]), "one data rank, or those of the mesh"

    @property
    def inner_sizes(self) -> tuple[int, ...]:
        """Ranks of each inner axis."""
        return self.inner_links.sizes

    @property
    def sizes(self) -> tuple[int, ...]:
        """Ranks of each axis, the data axis first."""
        return (self.data_ranks, *self.inner_links.sizes)

    @property
    def micro_batch(self) -> int:
        """Samples of all data ranks together."""
        return self.local_batch * self.data_ranks

    @property
    def device(self) -> Device:
        """The accelerator of every rank."""
        return self.inner_links.cluster.device
