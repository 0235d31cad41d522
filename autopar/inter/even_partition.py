"""An even split of a model's blocks into stages, as Megatron makes it."""

from autopar.core.errors import LayoutError
from autopar.graph.ir import Block


def layers(blocks: tuple[Block, ...]) -> range:
    """The blocks between embedding and head."""
    return range(int(blocks[0].name == "embedding"), len(blocks) - int(blocks[-1].name == "head"))


def even_ends(blocks: tuple[Block, ...], num_stages: int) -> list[int]:
    """Where the stages end: the embedding with the first stage, the head with the last, layers as even as possible.
    Where embedding and head, counted as a layer each, make the division even, they are; else the earlier stages take
    more.

    Example: 70 layers on 12 stages are 5, then ten times 6, then 5 (BLOOM)."""
    between = layers(blocks)
    first, last, count = between.start, between.stop, len(between)
    if count < num_stages:
        raise LayoutError([f"{num_stages} stages are more than the {count} layers of the model"])
    share, rest = divmod(count, num_stages)
    sizes = [share + (at < rest) for at in range(num_stages)]
    if rest and num_stages > 2 and first and last < len(blocks) and (count + 2) % num_stages == 0:
        sizes = [(count + 2) // num_stages] * num_stages
        sizes[0] -= 1
        sizes[-1] -= 1
    ends = [first + sum(sizes[: at + 1]) for at in range(num_stages)]
    ends[-1] = len(blocks)
    return ends
