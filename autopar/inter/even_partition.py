"""An even partition of a model's blocks into stages, as Megatron's."""

from autopar.core.errors import LayoutError
from autopar.graph.ir import Block


def layers(blocks: tuple[Block, ...]) -> range:
    """The indices of the blocks between embedding and head."""
    return range(int(blocks[0].name == "embedding"), len(blocks) - int(blocks[-1].name == "head"))


def even_ends(blocks: tuple[Block, ...], num_stages: int) -> list[int]:
    """The last block + 1 of every stage: the embedding belongs to the first stage, the head to the last, and layers are
    divided as evenly as possible. Embedding and head count as a layer each where that makes the division even; else the
    earlier stages take one layer more. LayoutError where there are more stages than layers.

    Example: 70 layers on 12 stages are 5, then ten times 6, then 5 (BLOOM)."""
    layer_range = layers(blocks)
    first, last, count = layer_range.start, layer_range.stop, len(layer_range)
    if count < num_stages:
        raise LayoutError([f"{num_stages} stages are more than the {count} layers of the model"])
    share, remainder = divmod(count, num_stages)
    sizes = [share + (stage < remainder) for stage in range(num_stages)]
    if remainder and num_stages > 2 and first and last < len(blocks) and (count + 2) % num_stages == 0:
        sizes = [(count + 2) // num_stages] * num_stages
        sizes[0] -= 1
        sizes[-1] -= 1
    ends = [first + sum(sizes[: stage + 1]) for stage in range(num_stages)]
    ends[-1] = len(blocks)
    return ends
