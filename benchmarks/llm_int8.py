"""What outlier inputs cost INT8, and what each treatment of them gives back: a synthetic layer, and planted outliers.

    python benchmarks/llm_int8.py --output benchmarks/results/llm_int8.json

The layer: Gaussian weights and inputs, six input columns uniform in (-60, -35). The model: a small trained Llama in
which one channel behind every norm is made `factor` times as loud and the weights that read it as much smaller, so that
it computes what it did before; embeddings stay in 16 bit.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import whit
from whit.methods import LayerStatistics, make_method

ROOT = Path(__file__).resolve().parent.parent
LAYER_ROWS: dict[str, dict[str, Any]] = {
    "absmax, one constant each": {"outliers": "none", "granularity": "tensor"},
    "absmax, per token": {"outliers": "none", "granularity": "row"},
    "absmax, vector-wise": {"outliers": "none"},
    "16-bit outliers, one constant each": {"granularity": "tensor"},
    "16-bit outliers, per token": {"granularity": "row"},
    "outliers times INT8 weights, as bitsandbytes": {"outlier_weights": "int8", "compat": True},
    "outliers times INT8 weights": {"outlier_weights": "int8"},
    "16-bit outliers (default)": {},
    "16-bit outliers, static": {"outliers": "static"},
}
MODEL_ROWS = (
    "absmax, vector-wise",
    "outliers times INT8 weights",
    "16-bit outliers (default)",
    "16-bit outliers, static",
)
FACTORS = (1, 30, 100)
SEEDS = range(5)


def synthetic(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight (1024, 1024), inputs (256, 1024) and the loud columns (6,)."""
    generator = torch.Generator().manual_seed(seed)
    weight, inputs = 0.02 * torch.randn(1024, 1024, generator=generator), torch.randn(256, 1024, generator=generator)
    loud = torch.randperm(1024, generator=generator)[:6]
    inputs[:, loud] = torch.empty(256, 6).uniform_(-60, -35, generator=generator)
    return weight, inputs, loud


def layer_errors() -> dict[str, dict[str, Any]]:
    """||Y - Y'|| / ||Y|| of every row and seed; also relative to the output of the other columns alone."""
    out: dict[str, dict[str, Any]] = {
        label: {"knobs": knobs, "errors": [], "quiet_errors": []} for label, knobs in LAYER_ROWS.items()
    }
    for seed in SEEDS:
        weight, inputs, loud = synthetic(seed)
        exact = inputs.double() @ weight.double().T
        quiet = inputs.index_fill(1, loud, 0).double() @ weight.double().T
        statistics = LayerStatistics(1024, 256, absolute_maximum=inputs.abs().amax(0))
        for label, knobs in LAYER_ROWS.items():
            packed = make_method("llm-int8", knobs).compress(weight, statistics).packed
            error = (packed.linear(inputs).double() - exact).norm()
            out[label]["errors"].append(float(error / exact.norm()))
            out[label]["quiet_errors"].append(float(error / quiet.norm()))
            out[label]["stored_bits"] = packed.stored_bits()
    return out


def plant(source: Path, folder: Path, factor: float) -> None:
    """A copy of a Llama whose median channel behind each norm is `factor` times as loud, its readers as much softer."""
    shutil.copytree(source, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for block in model.model.layers:
            attention, feed_forward = block.self_attn, block.mlp
            for norm, readers in (
                (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (block.post_attention_layernorm, (feed_forward.gate_proj, feed_forward.up_proj)),
            ):
                channel = int(norm.weight.abs().argsort(stable=True)[len(norm.weight) // 2])
                norm.weight[channel] *= factor
                for reader in readers:
                    reader.weight[:, channel] /= factor
    model.save_pretrained(folder)


def planted_models(source: Path) -> list[dict[str, Any]]:
    """Perplexity and KL divergence of every factor and row."""
    options = whit.RunOptions(
        samples=32, sequence_length=128, evaluation_windows=16, window=256, embedding_bits=16, device="cpu"
    )
    out = []
    for factor in FACTORS:
        with tempfile.TemporaryDirectory() as work:
            plant(source, Path(work) / "model", factor)
            for position, label in enumerate(MODEL_ROWS):
                folder = Path(work) / str(position)
                method = make_method("llm-int8", LAYER_ROWS[label])
                result = whit.compress(Path(work) / "model", method, folder, options=options)
                assert isinstance(result, whit.Result) and result.original is not None and result.compressed is not None
                metrics = {item.name: [item.value, item.low, item.high] for item in result.compressed.metrics}
                original = result.original.metric("perplexity")
                assert original is not None
                out.append({"factor": factor, "row": label, "original": original.value, "metrics": metrics})
    return out


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "tests" / "assets" / "stories260k")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = {
        "seeds": list(SEEDS),
        "layer": layer_errors(),
        "model": arguments.model.name,
        "planted": planted_models(arguments.model),
        "processor": platform.processor(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "whit": whit.__version__},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
