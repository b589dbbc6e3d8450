"""The student of the experiments, named before the first run: a residual network for 64 px, 1.2 M parameters + head.

Stem (3x3, stride 2, 32 channels; 2x2 max pooling), then four stages of one basic block: 32, 64, 128 and 256 channels
at strides 1, 2, 2, 2. 15.8 million multiply-adds for a picture of 64 px.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTHS = (32, 64, 128, 256)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., 2016)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        same = stride == 1 and channels_in == channels
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        )

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.body(images) + self.shortcut(images))


def small_resnet(num_classes: int, seed: int) -> nn.Module:
    """A fresh student: float (B, 3, S, S) to logits (B, num_classes). The same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stages = [
            Block(channels_in, channels, 1 if channels == WIDTHS[0] else 2)
            for channels_in, channels in zip((WIDTHS[0], *WIDTHS[:-1]), WIDTHS, strict=True)
        ]
        network = nn.Sequential(
            nn.Conv2d(3, WIDTHS[0], 3, 2, 1, bias=False),
            nn.BatchNorm2d(WIDTHS[0]),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            *stages,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(WIDTHS[-1], num_classes),
        )
    return network.to(memory_format=torch.channels_last)


class Renormalized(nn.Module):
    """A network that expects another mean and standard deviation than ImageNet's, given ImageNet-normalised images."""

    def __init__(self, network: nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.network = network
        own_mean, own_std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.scale = (own_std / std).view(1, 3, 1, 1)
        self.shift = ((own_mean - mean) / std).view(1, 3, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images * self.scale.to(images) + self.shift.to(images))
        return logits


def pretrained(seed: int) -> nn.Module:
    """Load EfficientNet-Lite 0 with its 1,000 ImageNet classes, for fine-tuning. The seed decides its dropout."""
    from ferkd_data.demo import efficientnet_lite

    torch.manual_seed(seed)
    return Renormalized(efficientnet_lite(0).train(), 127 / 255, 128 / 255).to(memory_format=torch.channels_last)
