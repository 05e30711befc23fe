"""GGUF files: read back through gguf, transformers and whit, every weight is bit for bit the packed one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor

import whit
from tests.exporters import models
from whit.errors import ExportError
from whit.formats.base import Packed
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.level_table import LevelTable
from whit.methods.magnitude import Magnitude
from whit.methods.statistics import LayerStatistics
from whit.models.resolve import resolve_model
from whit.models.skeleton import load_dense

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
pytest.importorskip("accelerate", reason="transformers reads GGUF only with accelerate installed")

from whit.exporters.gguf_blocks import exact_blocks  # noqa: E402


def by_transformers(file: Path) -> Any:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return tf.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
    ).eval()


@pytest.mark.parametrize(
    ("family", "dtype", "knobs", "kinds"),
    [
        ("llama", torch.float32, {"bits": 4, "group_size": 32, "symmetric": True}, {"Q4_0": 14, "Q8_0": 2}),
        ("llama-tied", torch.float16, {"bits": 4, "group_size": 128, "symmetric": False}, {"Q5_0": 14, "Q8_0": 1}),
        ("llama", torch.float32, {"bits": 1, "group_size": 0, "symmetric": True}, {"TQ1_0": 14, "Q8_0": 2}),
        ("qwen2", torch.bfloat16, {"bits": 8, "group_size": 64, "symmetric": True}, {"Q8_0": 16}),
        ("qwen3", torch.float32, {"bits": 3, "group_size": 64, "symmetric": False}, {"Q4_0": 14, "Q8_0": 2}),
        ("gemma3", torch.float32, {"bits": 5, "group_size": 64, "symmetric": True}, {"Q5_0": 14, "Q8_0": 1}),
    ],
)
def test_every_reader_gives_back_the_packed_model(
    family: str, dtype: torch.dtype, knobs: dict[str, Any], kinds: dict[str, int], tmp_path: Path
) -> None:
    models.model(family, dtype).save_pretrained(tmp_path / "model")
    directory = models.compress(tmp_path / "model", tmp_path / "packed", **knobs)
    file = tmp_path / "out" / "model.gguf"
    record = whit.export(directory, "gguf", file)
    assert record.stored == kinds
    assert record.bytes_after == file.stat().st_size
    stored = [item.tensor_type.name for item in gguf.GGUFReader(file).tensors]
    assert {kind: stored.count(kind) for kind in kinds} == kinds
    ours = whit.load(directory, dtype=torch.float32)
    expected = models.logits(ours)
    for theirs in (by_transformers(file), load_dense(resolve_model(file), torch.float32, "cpu")):
        assert type(theirs) is type(ours)
        for name, weight in theirs.named_parameters():
            own = ours.get_submodule(name.rpartition(".")[0]).weight if name.endswith("weight") else None
            wanted = ours.get_parameter(name) if own is None else own
            # Norms of gemma3 are stored as w + 1 in float32.
            tolerance = 1e-6 if family == "gemma3" and "norm" in name else 0
            torch.testing.assert_close(weight, wanted, rtol=0, atol=tolerance, check_dtype=False)
        torch.testing.assert_close(models.logits(theirs), expected, rtol=0, atol=1e-4 if family == "gemma3" else 0)


def values(packed: Packed) -> np.ndarray[Any, Any]:
    out: np.ndarray[Any, Any] = packed.unpack().numpy()
    return out


def integers(bits: int, group_size: int, symmetric: bool, low: int = 0, high: int | None = None) -> Packed:
    """Random codes in [low, high], random scales of either sign, and one of zero."""
    generator = torch.Generator().manual_seed(bits)
    rows, columns = 6, 512
    layout = GroupedInteger(bits, group_size, symmetric)
    codes = torch.randint(low, (2**bits if high is None else high + 1), (rows, columns), generator=generator)
    scales = torch.randn(rows, layout.groups(columns), generator=generator)
    scales[0, 0] = 0
    zeros = torch.randint(0, 2**bits, scales.shape, generator=generator)
    return layout.pack(codes, scales, None if symmetric else zeros)


@pytest.mark.parametrize(
    ("packed", "kind"),
    [
        (integers(2, 32, True), "Q4_0"),
        (integers(2, 256, True, low=1), "TQ1_0"),
        (integers(2, 128, True, low=1), "Q4_0"),
        (integers(4, 0, True), "Q4_0"),
        (integers(3, 32, False), "Q4_0"),
        (integers(4, 32, False), "Q5_0"),
        (integers(5, 32, True), "Q5_0"),
        (integers(6, 96, True), "Q8_0"),
        (integers(7, 64, False), "Q8_0"),
        (integers(8, 64, True), "Q8_0"),
        (integers(8, 64, False), None),
        (integers(4, 48, True), None),
    ],
)
def test_the_smallest_exact_type_is_chosen(packed: Packed, kind: str | None) -> None:
    found = exact_blocks(packed)
    if kind is None:
        assert found is None
        return
    assert found is not None
    assert found[0] == kind
    decoded = gguf.dequantize(found[1], gguf.GGMLQuantizationType[kind])
    assert np.array_equal(decoded.reshape(values(packed).shape), values(packed))


def test_q4_1_takes_codes_whose_minimum_is_exact_and_refuses_one_that_is_not() -> None:
    layout = GroupedInteger(4, 32, False)
    codes = torch.arange(16).repeat(2, 4)
    scales = torch.tensor([[0.1, 0.3], [1.7, 0.0]])
    powers = layout.pack(codes, scales, torch.tensor([[4, 2], [1, 9]]))
    found = exact_blocks(powers)
    assert found is not None
    assert found[0] == "Q4_1"
    assert np.array_equal(gguf.dequantize(found[1], gguf.GGMLQuantizationType.Q4_1).reshape(2, 64), values(powers))
    # 0.1 in float16 times 7 needs 13 bits: the block must go to a type without a minimum.
    odd = exact_blocks(layout.pack(codes, scales, torch.tensor([[7, 2], [1, 9]])))
    assert odd is not None
    assert odd[0] == "Q5_0"


def test_ternary_values_are_found_in_any_layout() -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 3, (4, 512), generator=generator)
    size = torch.rand(4, 2, 1, generator=generator).half()
    levels = torch.cat([-size, torch.zeros_like(size), size, size], 2)
    packed = LevelTable(2, 256).pack(codes, levels)
    found = exact_blocks(packed)
    assert found is not None
    assert found[0] == "TQ1_0"
    decoded = gguf.dequantize(found[1], gguf.GGMLQuantizationType.TQ1_0).reshape(4, 512)
    assert np.array_equal(decoded, values(packed))
    assert exact_blocks(LevelTable(2, 256).pack(codes, levels * torch.tensor([1.0, 1.0, 0.5, 1.0]))) is None


def test_a_preferred_type_is_taken_where_it_is_exact() -> None:
    ternary, wide = integers(2, 256, True, low=1), integers(8, 64, True)
    found = exact_blocks(ternary, prefer="TQ2_0")
    assert found is not None
    assert found[0] == "TQ2_0"
    decoded = gguf.dequantize(found[1], gguf.GGMLQuantizationType.TQ2_0)
    assert np.array_equal(decoded.reshape(values(ternary).shape), values(ternary))
    other = exact_blocks(wide, prefer="TQ2_0")
    assert other is not None
    assert other[0] == "Q8_0"


def refuse(family: str, tmp_path: Path, pack: Callable[[str, Tensor], Packed], **extra: Any) -> str:
    directory = models.save_packed(models.model(family, **extra), tmp_path / "packed", pack)
    with pytest.raises(ExportError) as caught:
        whit.export(directory, "gguf", tmp_path / "out.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed"]
    return str(caught.value)


def four_bits(name: str, weight: Tensor) -> Packed:
    peak = weight.abs().amax(1, keepdim=True) / 7
    return GroupedInteger(4, 0, True).pack((weight / peak).round() + 8, peak)


def table(name: str, weight: Tensor) -> Packed:
    return LevelTable(1, 0).pack(weight > 0, torch.tensor([-0.1, 0.2]).expand(len(weight), 1, 2))


def test_layers_without_an_exact_type_are_refused(tmp_path: Path) -> None:
    message = refuse("llama", tmp_path, table)
    assert "gguf cannot hold layer 'model.layers.0.self_attn.q_proj', level-table (bits=1, block_size=0)" in message
    assert "none of TQ1_0" in message
    assert "no other target can" in message


@pytest.mark.parametrize(
    ("family", "extra", "words"),
    [
        ("llama-bias", {}, "attention_bias = True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_parameters"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, "layer_types"),
    ],
)
def test_a_config_that_gguf_cannot_say_is_refused(
    family: str, extra: dict[str, Any], words: str, tmp_path: Path
) -> None:
    message = refuse(family, tmp_path, four_bits, **extra)
    assert words in message
    assert "which GGUF cannot say" in message
    assert "compressed-tensors can: --to compressed-tensors" in message


def test_an_embedding_without_an_exact_type_is_written_dense_and_said(tmp_path: Path) -> None:
    directory = models.save_packed(models.model("llama-tied", torch.float16), tmp_path / "packed", four_bits, table)
    record = whit.export(directory, "gguf", tmp_path / "out")
    assert record.stored == {"F16": 1, "Q4_0": 14}
    assert record.notes[0].startswith("model.embed_tokens is written as F16 (3.49 kB -> 49.7 kB)")
    file = tmp_path / "out" / "model.gguf"
    ours, theirs = whit.load(directory, dtype=torch.float32), by_transformers(file)
    assert torch.equal(theirs.model.embed_tokens.weight, ours.model.embed_tokens.weight.half().float())
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight


def halved(name: str, weight: Tensor) -> Packed:
    return Magnitude(pattern="2:4").compress(weight, LayerStatistics(weight.shape[1])).packed


def test_pruned_layers_are_dense_halves_and_it_is_said(tmp_path: Path) -> None:
    directory = models.save_packed(models.model("llama"), tmp_path / "packed", halved)
    record = whit.export(directory, "gguf", tmp_path / "out")
    assert record.stored["F16"] == 14
    assert "14 layers are written as F16" in " ".join(record.notes)
    ours, theirs = whit.load(directory, dtype=torch.float32), by_transformers(tmp_path / "out" / "model.gguf")
    ids = torch.arange(9).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, ours(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    weight = theirs.model.layers[0].mlp.up_proj.weight
    assert torch.equal((weight.reshape(-1, 4) != 0).sum(1), torch.full((weight.numel() // 4,), 2))
