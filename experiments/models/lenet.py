"""A small convolutional network after LeNet-5. It does not import EvolveNet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class LeNet(nn.Module):
    """Two convolutions of 5 × 5 without padding, each with ReLU and max pooling, and three dense layers (LeCun et al. 1998).

    Args:
        in_channels: channels of the images.
        classes: number of outputs.
        channels: of the two convolutions.
        hidden: units of the first two dense layers.
        size: height and width of the images.

    >>> LeNet()(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 10,
        channels: Sequence[int] = (16, 32),
        hidden: Sequence[int] = (120, 84),
        size: int = 32,
    ) -> None:
        super().__init__()
        places = ((size - 4) // 2 - 4) // 2
        self.conv1 = nn.Conv2d(in_channels, channels[0], 5)
        self.conv2 = nn.Conv2d(channels[0], channels[1], 5)
        self.fc1 = nn.Linear(channels[1] * places**2, hidden[0])
        self.fc2 = nn.Linear(hidden[0], hidden[1])
        self.fc3 = nn.Linear(hidden[1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[N, in_channels, size, size]` → logits `[N, classes]`."""
        x = functional.max_pool2d(torch.relu(self.conv1(images)), 2)
        x = functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        x = torch.relu(self.fc1(x.flatten(1)))
        return self.fc3(torch.relu(self.fc2(x)))
