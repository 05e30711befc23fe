"""Does it help to measure a layer with those before it compressed? Whole modules in memory, both orders, beside RTN.

    python benchmarks/module_order.py

Writes benchmarks/results/module_order.json in about two minutes on one thread. Small networks are trained to imitate
others of their kind, then compressed with `true_sequential` off and on. The error is ||f(x) - g(x)||^2 / ||f(x)||^2 of
the whole module's outputs on inputs that no method has seen; geometric means over five seeds. Each quantiser of one
row stores the same bytes in both orders; RTN has 2 bits per code and one scale per row throughout.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import whit

WIDTH, SEEDS, STEPS = 24, 5, 120
METHODS: list[tuple[str, str, dict[str, Any]]] = [
    ("GPTQ 2 bits", "gptq", {"bits": 2, "group_size": 0}),
    ("GPTQ 3 bits", "gptq", {"bits": 3, "group_size": 0}),
    ("GPTQ 4 bits", "gptq", {"bits": 4, "group_size": 0}),
    ("BiLLM", "billm", {}),
    ("SparseGPT 2:4", "sparsegpt", {"pattern": "2:4"}),
]


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return out


def residual() -> nn.Module:
    """Ten residual blocks and a head."""
    return nn.Sequential(*(Block() for _ in range(10)), nn.Linear(WIDTH, WIDTH))


def plain() -> nn.Module:
    """Nine linear layers with rectifiers between them."""
    hidden = [layer for _ in range(8) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, WIDTH))


def convolutional() -> nn.Module:
    """Seven convolutions of three by three with normalisation, and a head."""
    body = [layer for _ in range(6) for layer in (nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))]
    stem = nn.Conv2d(4, 16, 3, padding=1)
    return nn.Sequential(stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def vectors(items: int, seed: int) -> list[Tensor]:
    """Batches of 32 correlated vectors."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(7))
    return [torch.randn(32, WIDTH, generator=generator) @ mix for _ in range(items)]


def images(items: int, seed: int) -> list[Tensor]:
    """Batches of four smooth images."""
    generator = torch.Generator().manual_seed(seed)
    small = [torch.randn(4, 4, 5, 5, generator=generator) for _ in range(items)]
    return [nn.functional.interpolate(item, (15, 15), mode="bilinear") for item in small]


Make = Callable[[], nn.Module]
Inputs = Callable[[int, int], list[Tensor]]
MODULES: dict[str, tuple[Make, Inputs]] = {
    "residual": (residual, vectors),
    "plain": (plain, vectors),
    "convolutional": (convolutional, images),
}


def trained(make: Make, inputs: Inputs, seed: int) -> nn.Module:
    """A network that has learnt to imitate another, in evaluation mode."""
    torch.manual_seed(seed)
    teacher, module = make().eval(), make().train()
    batches = inputs(16, 50)
    optimizer = torch.optim.Adam(module.parameters(), 2e-3)
    for step in range(STEPS):
        with torch.no_grad():
            wanted = 3 * teacher(batches[step % 16])
        loss = (module(batches[step % 16]) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module.eval()


def error(module: nn.Module, compressed: nn.Module, held_out: list[Tensor]) -> float:
    """||f(x) - g(x)||^2 / ||f(x)||^2."""
    with torch.no_grad():
        exact = [module(item) for item in held_out]
        difference = [compressed(item) - value for item, value in zip(held_out, exact, strict=True)]
    return float(sum(item.square().sum() for item in difference) / sum(item.square().sum() for item in exact))


def mean(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    rows = []
    for kind, (make, inputs) in MODULES.items():
        modules = [trained(make, inputs, seed) for seed in range(SEEDS)]
        calibration, held_out = inputs(16, 3), inputs(8, 9)
        rounded = [error(m, whit.compress(m, "rtn", bits=2, group_size=0).module, held_out) for m in modules]
        for label, name, knobs in METHODS:
            found: dict[bool, list[float]] = {False: [], True: []}
            for module in modules:
                for order, errors in found.items():
                    result = whit.compress(module, name, calibration=calibration, true_sequential=order, **knobs)
                    errors.append(error(module, result.module, held_out))
            rows.append(
                {
                    "module": kind,
                    "method": label,
                    "rtn_2_bits": mean(rounded),
                    "at_once": mean(found[False]),
                    "true_sequential": mean(found[True]),
                    "seeds_in_which_true_sequential_is_better": sum(
                        after < before for before, after in zip(found[False], found[True], strict=True)
                    ),
                }
            )
            print(json.dumps(rows[-1]))
    ratio = mean([row["true_sequential"] / row["at_once"] for row in rows])
    better = sum(row["seeds_in_which_true_sequential_is_better"] for row in rows)
    record = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": 1,
        "seeds": SEEDS,
        "rows": rows,
        "true_sequential_over_at_once": ratio,
        "better_in": f"{better} of {len(rows) * SEEDS}",
    }
    path = Path(__file__).parent / "results" / "module_order.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(ratio, record["better_in"])


if __name__ == "__main__":
    main()
