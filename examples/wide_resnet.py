"""Wide-ResNet (Zagoruyko and Komodakis 2016) on ImageNet, as sized by Alpa OSDI'22.

A bottleneck of f channels is 1x1 to f, 3x3 to f x width_factor, 1x1 to 4f: only the 3x3 is widened. Parameters of the
sizes: 0.254, 0.495, 1.005, 1.965, 4.000, 6.727 and 12.63 billion. Alpa trains 13B at a global batch of 1520.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GLOBAL_BATCH = 1536

SIZES = {  # layers, base channels, width factor
    "250M": (50, 160, 2),
    "500M": (50, 224, 2),
    "1B": (50, 320, 2),
    "2B": (50, 448, 2),
    "4B": (50, 640, 2),
    "6.8B": (50, 320, 16),
    "13B": (101, 320, 16),
}
BLOCKS = {26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class Bottleneck(nn.Module):
    """A residual block of three convolutions, of which the 3x3 has the ``stride``."""

    def __init__(self, channels_in: int, channels: int, width_factor: int, stride: int) -> None:
        super().__init__()
        wide, channels_out = channels * width_factor, 4 * channels
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, wide, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(wide)
        self.conv3 = nn.Conv2d(wide, channels_out, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels_out)
        self.shortcut = None
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels_in, h, w] -> [batch, 4 * channels, h / stride, w / stride]."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class WideResNet(nn.Module):
    """A stem, four stages of bottlenecks and a linear classifier."""

    def __init__(self, layers: int, base_channels: int, width_factor: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, base_channels, 7, stride=2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(base_channels)
        self.stages = nn.ModuleList()
        channels_in = base_channels
        for number, length in enumerate(BLOCKS[layers]):
            channels = base_channels * 2**number
            stage = nn.Sequential()
            for index in range(length):
                stride = 2 if number > 0 and index == 0 else 1
                stage.append(Bottleneck(channels_in, channels, width_factor, stride))
                channels_in = 4 * channels
            self.stages.append(stage)
        self.head = nn.Linear(channels_in, classes)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Logits [batch, classes] of ``images`` [batch, 3, h, w]; ``labels`` are for ``loss_fn``."""
        x = F.max_pool2d(F.relu(self.norm(self.stem(images))), 3, stride=2, padding=1)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


def _size(size: str) -> tuple[int, int, int]:
    if size not in SIZES:
        raise ValueError(f"no size {size!r}; choose one of {', '.join(SIZES)}")
    return SIZES[size]


def build_model(
    size: str = "1B",
    *,
    layers: int | None = None,
    base_channels: int | None = None,
    width_factor: int | None = None,
    classes: int = 1000,
) -> nn.Module:
    """The model of a row of ``SIZES``, in which any number may be replaced; ``layers`` is a key of ``BLOCKS``."""
    row = _size(size)
    layers = layers or row[0]
    if layers not in BLOCKS:
        raise ValueError(f"layers={layers}: a bottleneck network of 50 or 101 layers is defined")
    return WideResNet(layers, base_channels or row[1], width_factor or row[2], classes)


def example_inputs(batch_size: int, image_size: int = 224) -> dict[str, Tensor]:
    """Images [batch_size, 3, image_size, image_size] and labels [batch_size]."""
    return {
        "images": torch.empty(batch_size, 3, image_size, image_size, device="meta"),
        "labels": torch.empty(batch_size, dtype=torch.long, device="meta"),
    }


def loss_fn(output: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the logits."""
    return F.cross_entropy(output, inputs["labels"])


def random_inputs(batch_size: int, seed: int, image_size: int = 224, classes: int = 1000) -> dict[str, Tensor]:
    """Inputs of the same shapes with random elements, for runs without data."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "images": torch.randn(batch_size, 3, image_size, image_size, generator=generator),
        "labels": torch.randint(classes, (batch_size,), generator=generator),
    }


def init_weights(model: nn.Module) -> None:
    """He initialisation; the last norm of each block starts at zero, so that the block starts as the identity."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, (nn.Linear, nn.BatchNorm2d)):
            module.reset_parameters()
    for module in model.modules():
        if isinstance(module, Bottleneck):
            nn.init.zeros_(module.norm3.weight)
