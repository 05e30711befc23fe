"""What the frontier measures: every method of the shelf at several sizes, each as the steps of a recipe.

Labels name what is stored; the exact knobs stand in `steps` and in every result. The dull baselines come first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Configuration:
    """One row: the family it is listed and coloured under, and its recipe."""

    family: str
    steps: list[dict[str, Any]] = field(default_factory=list)


def _one(family: str, method: str, **knobs: Any) -> Configuration:
    return Configuration(family, [{"method": method, **knobs}])


CONFIGURATIONS: dict[str, Configuration] = {
    "RTN 8 (g64)": _one("RTN", "rtn", bits=8, group_size=64),
    "RTN 4 (g64)": _one("RTN", "rtn", bits=4, group_size=64),
    "RTN 3 (g64)": _one("RTN", "rtn", bits=3, group_size=64),
    "RTN 2 (g64)": _one("RTN", "rtn", bits=2, group_size=64),
    "RTN 1 (g64, signs)": _one("RTN", "rtn", bits=1, group_size=64, symmetric=True),
    "GPTQ 8 (g64)": _one("GPTQ", "gptq", bits=8, group_size=64),
    "GPTQ 4 (g64)": _one("GPTQ", "gptq", bits=4, group_size=64),
    "GPTQ 3 (g64)": _one("GPTQ", "gptq", bits=3, group_size=64),
    "GPTQ 2 (g64)": _one("GPTQ", "gptq", bits=2, group_size=64),
    "GPTQ 2 (g64, order, clip)": _one("GPTQ", "gptq", bits=2, group_size=64, act_order=True, clip_steps=20),
    "GPTQ 3 (g64, order, clip)": _one("GPTQ", "gptq", bits=3, group_size=64, act_order=True, clip_steps=20),
    "GPTQ 1 (g64, signs)": _one("GPTQ", "gptq", bits=1, group_size=64, symmetric=True),
    "k-means 2 (128)": _one("k-means", "kmeans", bits=2, block_size=128),
    "k-means 2 (128, order)": _one("k-means", "kmeans", bits=2, block_size=128, act_order=True),
    # As many bytes as "BiLLM whit" but its column marks: four free levels per row, the same order of rounding.
    "k-means 2 (row, order)": _one("k-means", "kmeans", bits=2, block_size=0, act_order=True),
    "k-means 1 (128)": _one("k-means", "kmeans", bits=1, block_size=128),
    "BiLLM official": _one("BiLLM", "billm", variant="official"),
    "BiLLM paper": _one("BiLLM", "billm", variant="paper"),
    "BiLLM whit": _one("BiLLM", "billm"),
    "BiLLM whit (128)": _one("BiLLM", "billm", block_size=128),
    "BiLLM whit, damping 0.01": _one("BiLLM", "billm", damping=0.01),
}
