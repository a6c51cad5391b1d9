"""A small convolutional classifier of 28 x 28 grey images, and the features of its last layer."""

from __future__ import annotations

from torch import Tensor, nn


def _block(i: int, o: int, stride: int) -> list[nn.Module]:
    # SiLU: smooth, so that the score of an image is a usable gradient for guidance
    return [nn.Conv2d(i, o, 3, stride, padding=1, bias=False), nn.BatchNorm2d(o), nn.SiLU()]


class Classifier(nn.Module):
    """Five convolutions, one hidden layer of `features` units, one linear head.

    Args:
        classes: number of classes.
        channels: channels at 28, 14 and 7 pixels.
        features: width of the hidden layer.
    """

    def __init__(
        self,
        classes: int = 10,
        channels: tuple[int, int, int] = (16, 32, 64),
        features: int = 64,
    ) -> None:
        super().__init__()
        a, b, c = channels
        self.config = {"classes": classes, "channels": [a, b, c], "features": features}
        self.trunk = nn.Sequential(
            *_block(1, a, 1),
            *_block(a, b, 2),
            *_block(b, b, 1),
            *_block(b, c, 2),
            *_block(c, c, 1),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(9 * c, features, bias=False),
            nn.BatchNorm1d(features),
            nn.SiLU(),
        )
        self.head = nn.Linear(features, classes)

    def features(self, x: Tensor) -> Tensor:
        """x [N,1,28,28] in [0,1] -> the hidden layer [N,features]."""
        return self.trunk(2 * x - 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [N,1,28,28] in [0,1] -> logits [N,classes]."""
        return self.head(self.features(x))
