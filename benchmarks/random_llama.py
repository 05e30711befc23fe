"""Time and memory of compressing a randomly initialised LLaMA of a given shape on one device.

    python benchmarks/random_llama.py --shape 7b --method billm --output results.json

The weights are random (Gaussian, standard deviation 0.02) and the calibration tokens are uniform: only time, memory and
bytes mean anything, never the error. The model is written to disk shard by shard first, so that the run reads it as it
would read a downloaded one (from the cache of the operating system, if it fits).

`--blocks N` makes a model of only so many blocks of the shape. The report then says so, and holds what the whole model
would take: what the run spends outside the blocks, and for every block the median of the blocks after the first.

Started by torchrun with several processes (one GPU each), the model is compressed by all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import whit
from whit.formats.base import TensorSpec
from whit.models.skeleton import skeleton_of
from whit.models.source import SafetensorsSource, hash_file
from whit.models.write import LazyTensor, write_safetensors
from whit.pipeline.events import Listener, Plan

SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "7b-block": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 1, "num_attention_heads": 32},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 32},
    "tiny": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2, "num_attention_heads": 4},
}

WRITERS = 4


class _Clock(Listener):
    """Prints one line per block, and keeps when each was finished and when each phase began."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.plan: Plan | None = None
        self.blocks: list[float] = []
        self.phases: dict[str, float] = {}

    def planned(self, plan: Plan) -> None:
        self.plan = plan
        self.phases["planned"] = time.perf_counter() - self.start
        print(
            f"plan: {plan.minutes:.1f} min, host {plan.host_bytes / 1e9:.2f} GB, "
            f"device {plan.device_bytes / 1e9:.2f} GB",
            flush=True,
        )

    def phase(self, name: str, total: int) -> None:
        self.phases[name] = time.perf_counter() - self.start

    def block(self, index: int, total: int, name: str) -> None:
        self.blocks.append(time.perf_counter() - self.start)
        print(f"{self.blocks[-1]:8.1f} s  block {index + 1}/{total}", flush=True)

    def block_seconds(self) -> list[float]:
        """Seconds from each block's end to the next one's."""
        return [after - before for before, after in zip(self.blocks, self.blocks[1:], strict=False)]


def write_random_model(directory: Path, shape: str, seed: int, blocks: int = 0) -> None:
    """A LLaMA with random float16 weights, one file per block, written without holding the model.

    Args:
        blocks: how many to write, 0 for all that the shape has.
    """
    sizes = dict(SHAPES[shape])
    sizes["num_hidden_layers"] = blocks or sizes["num_hidden_layers"]
    config = LlamaConfig(**sizes, vocab_size=32000, max_position_embeddings=4096, tie_word_embeddings=False)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "float16"
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    skeleton = skeleton_of(LlamaForCausalLM, config, torch.float16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    files: dict[str, dict[str, torch.Tensor]] = {}
    writers = ThreadPoolExecutor(max_workers=WRITERS)
    written = []
    for name, parameter in skeleton.named_parameters():
        unit = name.split(".")[2] if name.startswith("model.layers.") else "outside"
        shape_ = tuple(parameter.shape)
        value = (
            torch.randn(shape_, generator=generator, device=device) * 0.02 if len(shape_) > 1 else torch.ones(shape_)
        )
        files.setdefault(unit, {})[name] = value.half().cpu()
        last = unit != "outside" and name.endswith("post_attention_layernorm.weight")
        if last:
            written.append(writers.submit(_write, directory / f"model-{unit}.safetensors", files.pop(unit)))
            if len(written) > WRITERS:
                written.pop(0).result()
    written.append(writers.submit(_write, directory / "model-outside.safetensors", files["outside"]))
    for job in written:
        job.result()
    weight_map = {}
    for name in skeleton.state_dict():
        unit = name.split(".")[2] if name.startswith("model.layers.") else "outside"
        weight_map[name] = f"model-{unit}.safetensors"
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file; several can be written at a time."""
    lazy = {name: LazyTensor(TensorSpec(tuple(t.shape), t.dtype), lambda t=t: t) for name, t in tensors.items()}
    write_safetensors(path, lazy)


def write_calibration(path: Path, samples: int, length: int, seed: int) -> None:
    """Uniform tokens; the file appears complete."""
    ids = torch.randint(0, 32000, (samples, length), generator=torch.Generator().manual_seed(seed))
    save_file({"input_ids": ids}, path.with_suffix(".partial"))
    path.with_suffix(".partial").rename(path)


def _sha256(path: Path) -> str | None:
    """Of the weight file, to compare runs; None if there are several."""
    return hash_file(path) if path.is_file() else None


def whole_model(shape: str, seconds: float, saving: float, hashing: float, clock: _Clock) -> dict[str, float]:
    """Seconds that all blocks of a shape would take, if only some were made.

    Blocks count by the median of those between the first and the last; checking the identity of the weight files and
    saving grow with their number.
    """
    made, every = len(clock.blocks), int(SHAPES[shape]["num_hidden_layers"])
    if made in (every, 0, 1):
        return {}
    one = statistics.median(clock.block_seconds()[:-1] or clock.block_seconds())  # the last one's outputs go nowhere
    more = (every - made) * one + (every / made - 1) * (saving + hashing)
    return {"extrapolated_seconds": seconds + more, "median_block_seconds": one}


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--methods", nargs="+", default=["billm"], help="NAME or NAME:knob=value,knob=value")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=0, help="sequences per forward pass; 0: whit chooses")
    parser.add_argument("--blocks", type=int, default=0, help="blocks of the shape to make; 0: all")
    parser.add_argument("--work", type=Path, default=Path("random-llama"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = arguments.work / "model"
    first = os.environ.get("RANK", "0") == "0"
    if first and not model.exists():
        started = time.perf_counter()
        write_random_model(model, arguments.shape, arguments.seed, arguments.blocks)
        print(f"random model written in {time.perf_counter() - started:.0f} s", flush=True)
    while not (model / "model.safetensors.index.json").exists():  # the first process writes it last
        time.sleep(0.1)
    data = arguments.work / f"calibration-{arguments.samples}-{arguments.sequence_length}-{arguments.seed}.safetensors"
    if first and not data.exists():
        write_calibration(data, arguments.samples, arguments.sequence_length, arguments.seed)
    while not data.exists():
        time.sleep(0.1)
    started = time.perf_counter()
    SafetensorsSource(model.glob("*.safetensors")).fingerprint()
    hashing = time.perf_counter() - started
    rows = []
    for text in arguments.methods:
        name, _, knobs = text.partition(":")
        options = whit.RunOptions(
            calibration=str(data),
            samples=arguments.samples,
            sequence_length=arguments.sequence_length,
            batch_size=arguments.batch_size,
            evaluate=False,
        )
        out = arguments.work / f"out-{os.environ.get('WORLD_SIZE', '1')}"
        if first:
            shutil.rmtree(out, ignore_errors=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        clock = _Clock()
        started = time.perf_counter()
        method = whit.make_method(name, dict(part.split("=") for part in knobs.split(",")) if knobs else None)
        result = whit.compress(model, method, out, options=options, listener=clock)
        seconds = time.perf_counter() - started
        if not first:
            continue
        assert isinstance(result, whit.Result) and clock.plan is not None
        rows.append(
            {
                "method": method.to_json(),
                "seconds": seconds,
                "timings": result.timings,
                "phases_began": clock.phases,
                "seconds_per_block": clock.block_seconds(),
                **whole_model(arguments.shape, seconds, result.timings["saving"], hashing, clock),
                "method_seconds": sum(layer.seconds for layer in result.layers),
                "peak_device_bytes": result.peak_device_bytes,
                "peak_host_bytes": result.peak_host_bytes,
                "planned": {
                    "minutes": clock.plan.minutes,
                    "device_bytes": clock.plan.device_bytes,
                    "host_bytes": clock.plan.host_bytes,
                },
                "file_bytes": result.size.file_bytes,
                "sha256": _sha256(out / "model.safetensors"),
                "stored_bits_compressed": result.size.compressed_bits,
                "stored_bits_file": result.size.file_bits,
                "original_file_bytes": result.size.original_file_bytes,
            }
        )
        print(json.dumps(rows[-1]["timings"]), f"{seconds:.1f} s", flush=True)
        report = {
            "shape": arguments.shape,
            "samples": arguments.samples,
            "sequence_length": arguments.sequence_length,
            "batch_size": result.run["identity"]["batch_size"],
            "blocks_made": len(clock.blocks),
            "blocks_of_shape": SHAPES[arguments.shape]["num_hidden_layers"],
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
            "hashing_seconds": hashing,
            "model_in_memory": str(arguments.work.resolve()).startswith("/dev/shm"),
            "seed": arguments.seed,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "whit": whit.__version__,
            },
            "rows": rows,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
