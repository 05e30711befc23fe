"""Records with the shape and the magnitudes of a real run, made from a seed: what the report tests look at."""

from __future__ import annotations

import dataclasses
import math
import random

from whit.pipeline.events import Plan, PlannedLayer
from whit.pipeline.options import RunOptions
from whit.report.record import EvaluationRecord, LayerRecord, MetricRecord, Result, SizeRecord

KINDS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
METHOD = {"method": "billm", "block_size": 128, "variant": "whit"}
FORMAT = {"format": "binary-residual", "block_size": 128}
PROTOCOL = "perplexity-v1/4f2a11c0/wikitext2-test-173c8/w2048/s2048/nobos/t16376/float32"


# What a provenance holds for machines only.
SKETCH = {"kind": "words", "hashes": "JasxFAAA" * 500}


def example_layers(blocks: int = 30, seed: int = 0) -> list[LayerRecord]:
    """Layers of a LLaMA-like model whose error grows with depth, plus the embedding."""
    chance = random.Random(seed)
    layers = []
    for block in range(blocks):
        for kind, (rows, columns) in KINDS.items():
            base = 0.05 if "k_proj" in kind or "q_proj" in kind else 0.14
            error = base * (0.6 + 0.8 * math.sqrt(block / max(blocks, 1))) * math.exp(chance.gauss(0, 0.18))
            layers.append(
                LayerRecord(
                    name=f"model.layers.{block}.{kind}",
                    block=f"model.layers.{block}",
                    rows=rows,
                    columns=columns,
                    method=METHOD,
                    format=FORMAT,
                    stored_bytes=int(rows * columns * (2.62 if columns == 1536 else 2.71) / 8),
                    error=error,
                    weight_error=error * 1.7,
                    seconds=chance.uniform(0.1, 0.6),
                    notes=["damping raised from 0.01 to 0.1"] if block == 3 and kind == "mlp.down_proj" else [],
                )
            )
    rows, columns = 49152, 576
    embedding = {"format": "grouped-integer", "bits": 8, "group_size": 64, "symmetric": False}
    layers.append(
        LayerRecord(
            name="model.embed_tokens",
            block="",
            rows=rows,
            columns=columns,
            method={"method": "rtn", "bits": 8},
            format=embedding,
            stored_bytes=int(rows * columns * 8.375 / 8),
            error=2.1e-5,
            weight_error=2.1e-5,
            seconds=1.4,
        )
    )
    return layers


def example_evaluations(leak: bool = False) -> tuple[EvaluationRecord, EvaluationRecord]:
    """Original and compressed."""
    data = {"name": "wikitext2-test", "sha256": "173c87a53759e0201f33e0ccf978e510", "licence": "CC BY-SA 3.0"}
    data |= {"windows": 8, "tokens": 16376}
    prompt = "The capital of France is"
    original = EvaluationRecord(
        [MetricRecord("perplexity", 22.55, 20.1, 25.32, PROTOCOL)],
        {"prompt": prompt, "text": " Paris, which is located in the north of the country."},
        data,
        18.2,
        leak,
    )
    compressed = EvaluationRecord(
        [
            MetricRecord("perplexity", 131.4, 113.9, 152.6, PROTOCOL),
            MetricRecord("kl_divergence", 1.842, 1.77, 1.913, PROTOCOL),
            MetricRecord("top1_agreement", 0.412, 0.399, 0.425, PROTOCOL, "higher"),
        ],
        {"prompt": prompt, "text": " the capital of the country.\nThe <b>capital</b> & the city of the"},
        data,
        19.7,
        leak,
    )
    return original, compressed


def example_result(blocks: int = 30, evaluated: bool = True, leak: bool = False) -> Result:
    """A finished run."""
    layers = example_layers(blocks)
    inside = [layer for layer in layers if layer.block]
    stored = sum(layer.stored_bytes for layer in inside)
    parameters = sum(layer.parameters for layer in layers) + 35_136
    original, compressed = example_evaluations(leak)
    untouched = {f"model.layers.{block}.input_layernorm.weight": "a vector, not a matrix" for block in range(blocks)}
    untouched["lm_head.weight"] = "tied to model.embed_tokens.weight"
    return Result(
        model={
            "label": "smollm2-135m",
            "architecture": "LlamaForCausalLM",
            "identity": "b179c9523d0e6a0f",
            "license": "apache-2.0",
            "notes": ["The source file is quantised (Q4_1): the baseline is the dequantised model."],
        },
        run={
            "method": METHOD,
            "seed": 0,
            "calibration": {
                "name": "mix",
                "sha256": "9f8e7d6c5b4a",
                "licence": "CC0-1.0",
                "sequences": 64,
                "path": None,
                "sketch": SKETCH,
            },
            "device": "cpu",
            "dtype": "float32",
            "versions": {"whit": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7"},
            "options": {**dataclasses.asdict(RunOptions(samples=32)), "skip": ["lm_head"]},
        },
        layers=layers,
        untouched=untouched,
        size=SizeRecord(
            parameters=parameters,
            compressed_parameters=sum(layer.parameters for layer in inside),
            compressed_bytes=stored,
            file_bytes=sum(layer.stored_bytes for layer in layers) + 2_180_000,
            original_file_bytes=91_700_000,
            original_dense_bytes=parameters * 2,
        ),
        original=original if evaluated else None,
        compressed=compressed if evaluated else None,
        timings={"calibration": 41.0, "compression": 142.3, "evaluation": 37.9, "total": 226.5},
        peak_host_bytes=2_140_000_000,
    )


def example_plan(blocks: int = 30) -> Plan:
    """The plan that precedes `example_result`."""
    result = example_result(blocks)
    layers = [
        PlannedLayer(
            layer.name,
            layer.block,
            layer.rows,
            layer.columns,
            str(layer.method["method"]),
            str(layer.format["format"]),
            layer.stored_bytes,
        )
        for layer in result.layers
    ]
    return Plan(
        model="smollm2-135m",
        architecture="LlamaForCausalLM",
        layers=layers,
        untouched=result.untouched,
        parameters=result.size.parameters,
        compressed_bits=result.size.compressed_bits,
        file_bytes=result.size.file_bytes,
        original_file_bytes=result.size.original_file_bytes,
        original_dense_bytes=result.size.original_dense_bytes,
        host_bytes=2_300_000_000,
        device_bytes=0,
        minutes=4.2,
        blocks=blocks,
        blocks_done=0,
        calibration={"name": "mix", "sequences": 64, "sequence_length": 512, "sketch": SKETCH},
        notes=["the source lies on a Q4_1 grid"],
    )
