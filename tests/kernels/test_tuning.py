"""Tuning measures each kind of product once, keeps what it finds, and leaves alone what has no choice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.kernels.test_cuda_kernels import needs_gpu, random_packed
from whit.formats.base import Packed
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.level_table import LevelTable
from whit.generation.weights import multiplied_weights
from whit.kernels import packed_linear, tuning
from whit.kernels.nvrtc import CompilationError
from whit.kernels.timing import copies_for
from whit.kernels.tuning import Tuner, distinct, tune_products, tuner_of
from whit.models.packed import PackedEmbedding, PackedLinear, tied_linear


def test_each_format_and_shape_counts_once() -> None:
    first, same = (random_packed(LevelTable(2, 128), 32, 256, seed=seed) for seed in (0, 1))
    other = random_packed(LevelTable(2, 128), 16, 256)
    found = distinct([first, same, other, first])
    assert [id(packed) for packed in found] == [id(first), id(other)]


def test_copies_exceed_the_cache_and_no_more() -> None:
    assert copies_for(100, 1000) == 20
    assert copies_for(10**9, 1000) == 2
    assert copies_for(1, 10**9) == 200
    assert copies_for(1, 10**9, result_bytes=1 << 31) == 4


def test_the_last_tuner_that_supports_a_product_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_TUNERS", {})
    every = Tuner(lambda x, packed: True, lambda x, packed, seconds: 1)
    single = Tuner(lambda x, packed: len(x) == 1, lambda x, packed, seconds: 2)
    tuning.register_tuner("level-table", every)
    tuning.register_tuner("level-table", single)
    packed = random_packed(LevelTable(2, 128), 32, 256)
    assert tuner_of(torch.ones(1, 256), packed) is single
    assert tuner_of(torch.ones(2, 256), packed) is every
    assert tuner_of(torch.ones(2, 256), random_packed(GroupedInteger(3, 64, True), 32, 256)) is None


def test_on_a_cpu_there_is_nothing_to_tune() -> None:
    assert list(tune_products([random_packed(LevelTable(2, 128), 32, 256)], [1, 16], torch.bfloat16)) == []


def test_what_does_not_fit_into_memory_is_named_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(packed: Packed, vectors: int, dtype: torch.dtype) -> None:
        if vectors > 1:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(tuning, "_tune_one", full)
    with pytest.warns(UserWarning, match="not tuned for 16 vectors: .* of 32 x 256 does not fit"):
        assert list(tune_products([random_packed(LevelTable(2, 128), 32, 256)], [1, 16], torch.bfloat16)) == []


def test_a_product_that_no_launch_can_be_compiled_for_is_named_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(packed: Packed, vectors: int, dtype: torch.dtype) -> None:
        raise CompilationError("no launch can be compiled here")

    monkeypatch.setattr(tuning, "_tune_one", broken)
    with pytest.warns(UserWarning, match="not tuned for 1 vectors: no launch can be compiled here"):
        assert list(tune_products([random_packed(LevelTable(2, 128), 32, 256)], [1], torch.bfloat16)) == []


def test_joined_weights_of_a_model_come_first() -> None:
    model = tiny.llama()
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    packed = random_packed(LevelTable(2, 0), child.out_features, child.in_features)
                    layer = PackedLinear(packed.format, packed.rows, packed.columns, None)
                    layer.set_packed(packed)
                    setattr(parent, name, layer)
    found = multiplied_weights(model)
    attention, feed = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert found[0].rows == sum(item.rows for item in (attention.q_proj, attention.k_proj, attention.v_proj))
    assert found[1].rows == feed.gate_proj.rows + feed.up_proj.rows
    assert len(found) == 9 * len(model.model.layers)


def test_an_output_head_multiplies_by_the_embedding_that_it_shares() -> None:
    embedding = PackedEmbedding(GroupedInteger(8, 0, True), 97, 48, torch.float32)
    model = torch.nn.ModuleDict({"embedding": embedding, "head": tied_linear(embedding, torch.nn.Linear(48, 97))})
    assert [packed.rows for packed in multiplied_weights(model)] == [97]


def test_a_model_of_other_parts_gives_its_layers() -> None:
    packed = random_packed(LevelTable(2, 0), 16, 32)
    layer = PackedLinear(packed.format, 16, 32, None)
    layer.set_packed(packed)
    assert [item.rows for item in multiplied_weights(torch.nn.Sequential(layer, torch.nn.ReLU()))] == [16]


@needs_gpu
@pytest.mark.gpu
def test_products_are_tuned_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WHIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    packed = random_packed(LevelTable(2, 128), 256, 1024, "cuda")
    x: Tensor = torch.randn(1, 1024, device="cuda", dtype=torch.float16)
    before = packed_linear(x, packed)
    found = list(tune_products([packed], [1, 16], torch.float16))
    assert [product.vectors for product in found] == [1, 16]
    assert all(product.tried > 1 and 0 < product.seconds < 1 for product in found)
    assert list(tmp_path.rglob("tuned-*.json"))
    torch.testing.assert_close(packed_linear(x, packed), before, rtol=2e-2, atol=2e-2)
