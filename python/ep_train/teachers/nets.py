"""VGG with batch normalisation and ResNet-18 for small images, as plain torch modules.

Simonyan & Zisserman 2015 (configurations A, B and D) and He et al. 2016, in the forms used on CIFAR: one linear layer
on the averaged map instead of VGG's three, a 3x3 stem without pooling in the ResNet. The names of the VGG's
``features`` are torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

VGG: dict[str, tuple[int | str, ...]] = {
    "vgg11_bn": (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "vgg13_bn": (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "vgg16_bn": (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"),
}
TEACHERS = (*VGG, "resnet18")
STEM = {**dict.fromkeys(VGG, "features.0.weight"), "resnet18": "conv1.weight"}  # the first weight, 64 width x C
HEAD = {**dict.fromkeys(VGG, "classifier.weight"), "resnet18": "fc.weight"}  # the last one, classes x features
BASE = 64


class Normalise(nn.Module):
    """``(x - mean) / std`` per channel: buffers, so that a state dict carries the statistics of the training data.

    With mean 0 and std 1, as it is made, the module reads its batches as they come.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    @property
    def reads_pixels(self) -> bool:
        """It holds statistics: its input are pixels in [0, 1]."""
        return bool((self.mean != 0).any() or (self.std != 1).any())

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        return (images - self.mean) / self.std


class VggBn(nn.Module):
    """3x3 convolutions with batch normalisation; ``forward``: images [B, C, H, W] to logits [B, classes]."""

    def __init__(self, layers: Sequence[int | str], image_shape: tuple[int, int, int], classes: int, base: int) -> None:
        super().__init__()
        channels, side = image_shape[0], min(image_shape[1:])
        self.normalise = Normalise([0.0] * channels, [1.0] * channels)
        features: list[nn.Module] = []
        for layer in layers:
            if isinstance(layer, str):  # a pool that would leave nothing of a small image is left out
                features.append(nn.MaxPool2d(2) if side >= 2 else nn.Identity())
                side = max(side // 2, 1)
                continue
            width = layer // BASE * base
            features += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        self.features = nn.Sequential(*features)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.features(self.normalise(images))
        logits: Tensor = self.classifier(maps.mean((2, 3)))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            # its pixels are taken out first: ep_kernels.reference.convolve says why
            self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] to [B, width, H / stride, W / stride]."""
        inner = self.relu(self.bn1(self.conv1(x)))
        shortcut = self.downsample(x[..., :: self.stride, :: self.stride])
        out: Tensor = self.relu(self.bn2(self.conv2(inner)) + shortcut)
        return out


class ResNet18(nn.Module):
    """Four stages of two blocks; ``forward``: images [B, C, H, W] to logits [B, classes]."""

    def __init__(self, image_shape: tuple[int, int, int], classes: int, base: int) -> None:
        super().__init__()
        channels = image_shape[0]
        self.normalise = Normalise([0.0] * channels, [1.0] * channels)
        self.conv1 = nn.Conv2d(channels, base, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(base)
        self.relu = nn.ReLU(inplace=True)
        widths = [base, base, 2 * base, 4 * base, 8 * base]
        for i in range(1, 5):
            stage = [BasicBlock(widths[i - 1], widths[i], 1 if i == 1 else 2), BasicBlock(widths[i], widths[i], 1)]
            self.add_module(f"layer{i}", nn.Sequential(*stage))
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.relu(self.bn1(self.conv1(self.normalise(images))))
        for i in range(1, 5):
            maps = self.get_submodule(f"layer{i}")(maps)
        logits: Tensor = self.fc(maps.mean((2, 3)))
        return logits


def build_teacher(
    name: str,
    image_shape: tuple[int, int, int],
    classes: int,
    width: float = 1.0,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """A teacher with fresh weights (He et al. 2015), to be trained by ordinary backprop.

    Args:
        name: one of ``TEACHERS``.
        image_shape: (C, H, W).
        classes: outputs.
        width: factor of every width: the first layer has ``round(64 width)`` channels, the others its multiples.
        mean, std: per channel, of pixels in [0, 1]: the module then reads pixels and normalises them itself. By default
            it reads batches as they come from the data pipeline, and must be given the same ones as a teacher.

    Returns:
        A module that makes logits [B, classes] of images [B, C, H, W].

    Raises:
        ValueError: an unknown name, or numbers that do not fit.
    """
    where = "build_teacher: argument"
    if name not in TEACHERS:
        raise ValueError(f"{where} 'name': expected one of {', '.join(TEACHERS)}, got {name!r}")
    if not width > 0:
        raise ValueError(f"{where} 'width': expected a number > 0, got {width!r}")
    base = max(1, round(BASE * width))
    module: VggBn | ResNet18
    if name in VGG:
        module = VggBn(VGG[name], image_shape, classes, base)
    else:
        module = ResNet18(image_shape, classes, base)
    if mean is not None or std is not None:
        channels = image_shape[0]
        mean, std = mean or [0.0] * channels, std or [1.0] * channels
        if len(mean) != channels or len(std) != channels or not all(value > 0 for value in std):
            raise ValueError(f"{where} 'mean, std': expected {channels} numbers each, std > 0, got {mean!r}, {std!r}")
        module.normalise = Normalise(mean, std)
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    return module
