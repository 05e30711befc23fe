"""Small modules of the kinds that users have, and inputs for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 24


class Residual(nn.Module):
    """A multilayer perceptron with a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 64)
        self.gate = nn.Linear(WIDTH, 64, bias=False)
        self.down = nn.Linear(64, WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x + self.down(torch.relu(self.up(x)) * self.gate(x)))
        return out


class Convolutions(nn.Module):
    """A convolutional network with all that may go wrong: stride, padding, dilation, groups, normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 16, (3, 2), stride=2, padding=(1, 0), padding_mode="reflect"),
            nn.Conv2d(16, 16, 3, padding="same", dilation=2),
            nn.Conv2d(16, 16, 3, groups=4),
            nn.ReLU(),
        )
        self.shortcut = nn.Conv2d(16, 32, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.shortcut(self.body(images)).mean((-2, -1)))
        return out


class Odd(nn.Module):
    """One layer called twice, one never; one module in two places; two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.never = nn.Linear(WIDTH, WIDTH)
        self.here = nn.Linear(WIDTH, WIDTH)
        self.there = self.here
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        x = torch.tanh(self.there(torch.tanh(self.here(x))))
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


def seeded(make: type[nn.Module], seed: int = 0) -> nn.Module:
    """A module whose initial values depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def vectors(items: int = 4, size: int = 32, width: int = WIDTH, seed: int = 1) -> list[Tensor]:
    """Batches of correlated vectors: what makes GPTQ differ from rounding."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(7))
    return [torch.randn(size, width, generator=generator) @ mix for _ in range(items)]


def images(items: int = 3, size: int = 4, seed: int = 1) -> list[Tensor]:
    """Batches of smooth images."""
    generator = torch.Generator().manual_seed(seed)
    small = [torch.randn(size, 3, 5, 5, generator=generator) for _ in range(items)]
    return [nn.functional.interpolate(item, (15, 15), mode="bilinear") for item in small]
