"""The order of the literature on a trained language model, from the command's function to the measured divergence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import whit

MODEL = Path(__file__).parents[1] / "assets" / "stories260k"
OPTIONS = whit.RunOptions(
    samples=6,
    sequence_length=96,
    evaluation_windows=1,
    window=256,
    embedding_bits=16,
    device="cpu",
    skip=("*down_proj",),  # 172 columns are no multiple of 8
)


def divergence(folder: Path, method: str, **knobs: Any) -> float:
    result = whit.compress(MODEL, method, folder / f"{method}-{len(list(folder.iterdir()))}", options=OPTIONS, **knobs)
    assert isinstance(result, whit.Result)
    assert result.compressed is not None
    found = result.compressed.metric("kl_divergence")
    assert found is not None
    return found.value


def test_scores_with_inputs_or_gradients_beat_magnitude_and_freer_patterns_cost_less(tmp_path: Path) -> None:
    dull = divergence(tmp_path, "magnitude", sparsity=0.5)
    half = {name: divergence(tmp_path, name, sparsity=0.5) for name in ("wanda", "sparsegpt", "pruner-zero")}
    assert max(half.values()) < 0.9 * dull
    patterns = [divergence(tmp_path, "wanda", pattern=pattern) for pattern in ("4:8", "2:4")]
    assert half["wanda"] < patterns[0] < patterns[1]


def test_structured_binary_weights_cost_more_the_fewer_are_kept(tmp_path: Path) -> None:
    kept = [divergence(tmp_path, "stbllm", pattern=pattern, passes=1) for pattern in ("6:8", "5:8", "4:8")]
    assert kept == sorted(kept)
    assert kept[-1] < divergence(tmp_path, "gptq", bits=2, group_size=64)  # about as many bytes
    assert kept[-1] < 0.7 * divergence(tmp_path, "stbllm", pattern="2:8", regions=1, passes=1)
