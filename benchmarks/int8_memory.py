"""Bytes a language model takes in memory in 16 bit, and compressed by LLM.int8(): of its tensors and of the process.

    python benchmarks/int8_memory.py --model MODEL --output benchmarks/results/int8_memory.json

Each model is loaded in a process of its own by transformers, in bfloat16, and answers one sequence. `tensor_bytes` are
the bytes of all parameters and buffers; `resident_bytes` is what the process holds after the answer beyond what it held
before loading, when a tiny model of the same kind had already been loaded and run (so that libraries are not counted);
`peak_bytes` is its high-water mark, counted from the same point.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from reports import write_report

import whit
from whit.kernels import packed_linear
from whit.methods import LayerStatistics
from whit.models.packed import packed_modules
from whit.models.resolve import resolve_model
from whit.models.skeleton import load_dense
from whit.pipeline.memory import peak_host_bytes


def tensor_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {tensor.data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.numel()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def load_and_run(directory: str | Path, tokens: int) -> Any:
    """A saved model in bfloat16, after it answered one sequence."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    ids = torch.arange(tokens).unsqueeze(0) % model.config.get_text_config().vocab_size
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    gc.collect()
    return model


def warm_up(tokens: int) -> None:
    """Have everything imported and every library initialised that loading and running needs."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    tiny = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **shape))
    with tempfile.TemporaryDirectory() as folder:
        tiny.save_pretrained(folder)
        load_and_run(folder, tokens)
        packed = whit.make_method("llm-int8").compress(torch.randn(64, 64), LayerStatistics(64)).packed
        packed_linear(torch.randn(tokens, 64).bfloat16(), packed)


def measure(directory: str, tokens: int) -> dict[str, Any]:
    """Load a saved model in this process and run one sequence."""
    torch.set_num_threads(1)
    warm_up(tokens)
    before = psutil.Process().memory_info().rss
    model = load_and_run(directory, tokens)
    return {
        "tensor_bytes": tensor_bytes(model),
        "packed_bytes": sum(module.packed.stored_bytes() for module in packed_modules(model).values()),
        "resident_bytes": psutil.Process().memory_info().rss - before,
        "peak_bytes": peak_host_bytes() - before,
    }


def in_a_process(directory: Path, tokens: int) -> dict[str, Any]:
    """`measure` in a new process."""
    command = [sys.executable, __file__, "--measure", str(directory), "--tokens", str(tokens)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    report: dict[str, Any] = json.loads(answer.splitlines()[-1])
    return report


def save_in_16_bit(model: str | None, folder: Path) -> str:
    """The original as a transformers directory in bfloat16; returns its label."""
    reference = resolve_model(model)
    dense = load_dense(reference, torch.bfloat16, torch.device("cpu"))
    dense.save_pretrained(folder)
    return reference.label


def main() -> None:
    """Compress, measure both, write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=None, help="directory, hub id or catalogue name; default: whit's")
    parser.add_argument("--tokens", type=int, default=64, help="length of the sequence that is answered")
    parser.add_argument("--embedding-bits", type=int, default=8)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.tokens)))
        return
    rows = {}
    with tempfile.TemporaryDirectory() as work:
        original, compressed = Path(work) / "original", Path(work) / "compressed"
        label = save_in_16_bit(arguments.model, original)
        rows["bfloat16"] = in_a_process(original, arguments.tokens)
        options = whit.RunOptions(evaluate=False, embedding_bits=arguments.embedding_bits)
        result = whit.compress(arguments.model, "llm-int8", compressed, options=options)
        assert isinstance(result, whit.Result)
        rows["llm-int8"] = in_a_process(compressed, arguments.tokens)
    report = {
        "model": label,
        "tokens": arguments.tokens,
        "embedding_bits": arguments.embedding_bits,
        "stored_bits_layers": result.size.compressed_bits,
        "processor": platform.processor(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "whit": whit.__version__},
        "rows": rows,
        "ratios": {key: rows["bfloat16"][key] / rows["llm-int8"][key] for key in ("tensor_bytes", "resident_bytes")},
    }
    write_report(report, arguments.output)


if __name__ == "__main__":
    main()
