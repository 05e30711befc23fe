"""Layer errors of the pruning methods at honest bits, on synthetic layers.

    python benchmarks/pruning_layers.py

Writes benchmarks/results/pruning_layers.json and docs/generated/pruning-layers.md. The error is
||(W - Q) X||^2 / ||W X||^2 of the unpacked stored weight on inputs that the methods have not seen, mean of three seeds.
The layers are those of billm_layers.py; gradients, which a single layer does not have, are those of random output
gradients with rows of different size.
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from billm_layers import synthetic
from torch import Tensor

from whit.methods import LayerStatistics, Method, method_from_json, relative_output_error

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)
SEQUENCES = 16
PATTERNS: dict[str, dict[str, Any]] = {"50 %": {"sparsity": 0.5}, "4:8": {"pattern": "4:8"}, "2:4": {"pattern": "2:4"}}
PRUNERS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "magnitude, by row": {"method": "magnitude", "comparison": "row"},
    "Wanda": {"method": "wanda"},
    "RIA": {"method": "ria"},
    "RIA, whole matrix": {"method": "ria", "comparison": "matrix"},
    "Pruner-Zero": {"method": "pruner-zero"},
    "SparseGPT": {"method": "sparsegpt"},
    "SparseGPT, by row": {"method": "sparsegpt", "comparison": "row"},
    "magnitude + update": {"method": "magnitude", "update": True},
    "Wanda + update": {"method": "wanda", "update": True},
    "RIA + update": {"method": "ria", "update": True},
    "Pruner-Zero + update": {"method": "pruner-zero", "update": True},
}


def _then(pruner: dict[str, Any], quantiser: dict[str, Any]) -> dict[str, Any]:
    return {"method": "prune-then-quantise", "pruner": pruner, "quantiser": quantiser}


SPARSEGPT = {"method": "sparsegpt", "pattern": "2:4"}
FOUR_BITS = {"bits": 4, "group_size": 128}
COMPOSED: dict[str, dict[str, Any]] = {
    "SparseGPT 2:4, RTN 4": _then(SPARSEGPT, {"method": "rtn", **FOUR_BITS}),
    "SparseGPT 2:4, GPTQ 4": _then(SPARSEGPT, {"method": "gptq", **FOUR_BITS}),
    "Wanda 2:4 + update, GPTQ 4": _then(
        {"method": "wanda", "pattern": "2:4", "update": True}, {"method": "gptq", **FOUR_BITS}
    ),
    "Wanda 2:4, GPTQ 4": _then({"method": "wanda", "pattern": "2:4"}, {"method": "gptq", **FOUR_BITS}),
    "RTN 8, group 128": {"method": "rtn", "bits": 8, "group_size": 128},
    "GPTQ 3, group 128": {"method": "gptq", "bits": 3, "group_size": 128},
    "k-means, 4 levels per 128, order": {"method": "kmeans", "act_order": True},
    "GPTQ 2, group 64, order, clip": {
        "method": "gptq", "bits": 2, "group_size": 64, "act_order": True, "clip_steps": 20,
    },
}  # fmt: skip


def configurations() -> dict[str, dict[str, Method]]:
    """Label -> {column: method}."""
    out: dict[str, dict[str, Method]] = {}
    for label, fields in PRUNERS.items():
        out[label] = {}
        for column, pattern in PATTERNS.items():
            if "comparison" not in fields or "pattern" not in pattern:
                out[label][column] = method_from_json({**fields, **pattern})
    return out | {label: {"": method_from_json(fields)} for label, fields in COMPOSED.items()}


def layer(seed: int) -> tuple[Tensor, LayerStatistics, Tensor]:
    """Weight, statistics of half of the inputs, and H of the other half."""
    weight, inputs = synthetic(seed)
    seen, unseen = inputs[::2], inputs[1::2]
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(len(weight), generator=generator).exp()
    back = torch.randn(len(seen), len(weight), generator=generator) * sizes
    parts = zip(back.chunk(SEQUENCES), seen.chunk(SEQUENCES), strict=True)
    gradient = torch.stack([(g.T @ x).square() for g, x in parts]).sum(0).sqrt()
    moment = 2 / SEQUENCES * seen.T @ seen
    return weight, LayerStatistics(512, len(seen), moment, gradient=gradient), unseen.T @ unseen


def measure() -> list[dict[str, Any]]:
    """One row per method and pattern: stored bits, errors by seed, seconds of one layer."""
    layers = [layer(seed) for seed in SEEDS]
    rows = []
    for label, methods in configurations().items():
        for column, method in methods.items():
            errors, seen, started = [], [], time.perf_counter()
            for weight, statistics, unseen in layers:
                packed = method.compress(weight, statistics).packed
                quantised = packed.unpack()
                errors.append(relative_output_error(weight, quantised, unseen))
                seen.append(relative_output_error(weight, quantised, statistics.second_moment))
            rows.append(
                {
                    "label": label,
                    "pattern": column,
                    "method": method.to_json(),
                    "stored_bits": packed.stored_bits(),
                    "error": errors,
                    "calibration_error": seen,
                    "seconds": (time.perf_counter() - started) / len(layers),
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: pruning alone by pattern, then the compositions with rivals of about as many bytes."""
    means = {(row["label"], row["pattern"]): sum(row["error"]) / len(row["error"]) for row in rows}
    bits = {(row["label"], row["pattern"]): row["stored_bits"] for row in rows}
    heads = [f"{pattern} ({bits['Wanda', pattern]:.3f} bits)" for pattern in PATTERNS]
    lines = [f"| method | {' | '.join(heads)} |", "|---" * (len(PATTERNS) + 1) + "|"]
    for label in PRUNERS:
        cells = [f"{means[label, p]:.4f}" if (label, p) in means else "" for p in PATTERNS]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", "| method | stored bits | error |", "|---|---|---|"]
    lines += [f"| {label} | {bits[label, '']:.3f} | {means[label, '']:.3g} |" for label in COMPOSED]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    rows = measure()
    record = {"torch": torch.__version__, "machine": platform.machine(), "seeds": list(SEEDS), "rows": rows}
    target = ROOT / "benchmarks" / "results" / "pruning_layers.json"
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = table(rows)
    (ROOT / "docs" / "generated" / "pruning-layers.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
