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
    "GPTQ 4 (g64, order, clip)": _one("GPTQ", "gptq", bits=4, group_size=64, act_order=True, clip_steps=20),
    "GPTQ 3 (row, order, clip)": _one("GPTQ", "gptq", bits=3, group_size=0, act_order=True, clip_steps=20),
    "GPTQ 2 (row, order, clip)": _one("GPTQ", "gptq", bits=2, group_size=0, act_order=True, clip_steps=20),
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
    "STBLLM 4:8, released": _one("STBLLM", "stbllm", variant="released", pattern="4:8"),
    "STBLLM 6:8": _one("STBLLM", "stbllm", pattern="6:8"),
    "STBLLM 5:8": _one("STBLLM", "stbllm", pattern="5:8"),
    "STBLLM 4:8": _one("STBLLM", "stbllm", pattern="4:8"),
    "STBLLM 4:8, budget shared": _one("STBLLM", "stbllm", pattern="4:8", allocation="repaired"),
    "STBLLM 2:8, one magnitude": _one("STBLLM", "stbllm", pattern="2:8", regions=1),
    "codebook 256 of 4": _one("codebook", "codebook", codes=256, width=4),
    "codebook 256 of 6": _one("codebook", "codebook", codes=256, width=6),
    "codebook 256 of 8": _one("codebook", "codebook", codes=256, width=8),
    "codebook 256 of 12": _one("codebook", "codebook", codes=256, width=12),
    "codebook 256 of 8, ternary": _one("codebook", "codebook", codes=256, width=8, patterns="ternary"),
    "codebook 64 of 8, ternary": _one("codebook", "codebook", codes=64, width=8, patterns="ternary"),
    # 8 bits and less, with inputs rounded as well where "A8" is said.
    "LLM.int8() (W8A8)": _one("LLM.int8()", "llm-int8"),
    "LLM.int8() as bitsandbytes": _one("LLM.int8()", "llm-int8", outlier_weights="int8", compat=True),
    "LLM.int8() static": _one("LLM.int8()", "llm-int8", outliers="static"),
    "INT8 without outliers (W8A8)": _one("LLM.int8()", "llm-int8", outliers="none"),
    "flexible 8, published (W8A8, tensor)": _one(
        "flexible", "flexible", group_size=-1, input_scale="tensor", reserve_top=True
    ),
    "flexible 8 (W8A8, row and token)": _one("flexible", "flexible"),
    "FP8 E4M3 (W8A8)": _one("flexible", "flexible", formats="e4m3fn"),
    "INT8 (W8A8)": _one("flexible", "flexible", formats="int8"),
    "flexible 8 (W8A16)": _one("flexible", "flexible", input_bits=16),
    "flexible 6 (W6A8)": _one("flexible", "flexible", bits=6),
    "flexible 4 (W4A8, g64)": _one("flexible", "flexible", bits=4, group_size=64),
    "flexible 4 (W4A16, g64)": _one("flexible", "flexible", bits=4, group_size=64, input_bits=16),
    # Pruning: 16-bit values and an index. The order of the literature: 50 %, 4:8, 2:4.
    **{
        f"{label} {shown}": _one("pruning", method, **knobs, **extra)
        for shown, knobs in (("50 %", {"sparsity": 0.5}), ("4:8", {"pattern": "4:8"}), ("2:4", {"pattern": "2:4"}))
        for label, method, extra in (
            ("magnitude", "magnitude", {}),
            ("Wanda", "wanda", {}),
            ("RIA", "ria", {}),
            ("SparseGPT", "sparsegpt", {}),
            ("Pruner-Zero", "pruner-zero", {}),
            ("Wanda + update", "wanda", {"update": True}),
            ("Pruner-Zero + update", "pruner-zero", {"update": True}),
        )
    },
    "Wanda 50 %, OWL": _one("pruning", "wanda", sparsity=0.5, allocation="owl"),
    # Recipes.
    "SparseGPT 2:4, GPTQ 4 (g64)": Configuration(
        "recipe", [{"method": "sparsegpt", "pattern": "2:4"}, {"method": "gptq", "bits": 4, "group_size": 64}]
    ),
    "SparseGPT 4:8, GPTQ 3 (g64)": Configuration(
        "recipe", [{"method": "sparsegpt", "pattern": "4:8"}, {"method": "gptq", "bits": 3, "group_size": 64}]
    ),
    "FP8 first and last, GPTQ 3 between": Configuration(
        "recipe",
        [
            {"method": "gptq", "bits": 3, "group_size": 64, "exclude": ["@first", "@last"]},
            {"method": "flexible", "formats": "e4m3fn", "layers": ["@first", "@last"]},
        ],
    ),
}
