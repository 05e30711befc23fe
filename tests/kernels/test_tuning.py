"""Tuning measures each kind of product once, keeps what it finds, and leaves alone what has no choice."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.kernels.test_cuda_kernels import error_bound, inputs, needs_gpu, random_packed, unit_columns
from whit.formats.base import Format, Packed
from whit.formats.binary_residual import BinaryResidual
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.level_table import LevelTable
from whit.generation.weights import meeting_weights, multiplied_weights
from whit.kernels import linear, packed_linear, tuning
from whit.kernels.cuda_tuned import tuned_shapes
from whit.kernels.linear import SeveralProducts, choose_several
from whit.kernels.nvrtc import CompilationError
from whit.kernels.timing import copies_for
from whit.kernels.tuning import Tuner, distinct, tune_products, tuner_of
from whit.models.packed import PackedEmbedding, PackedLinear, tied_linear


def test_each_format_and_shape_counts_once() -> None:
    first, same = (random_packed(LevelTable(2, 128), 32, 256, seed=seed) for seed in (0, 1))
    other = random_packed(LevelTable(2, 128), 16, 256)
    found = distinct([(first,), (same,), (other,), (first,), (first, other), (other, first), (same, other)])
    assert [[id(packed) for packed in weights] for weights in found] == [
        [id(packed) for packed in weights] for weights in ((first,), (other,), (first, other), (other, first))
    ]


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
    packed = random_packed(LevelTable(2, 128), 32, 256)
    assert list(tune_products([packed], [1, 16], torch.bfloat16, [[packed, packed]])) == []


class Search:
    """Ten launches, of which the even ones work, each faster than those before; `ends` ends it at the sixth."""

    def __init__(self, ends: type[BaseException] | None = None) -> None:
        self.used: int | None = None
        self._ends = ends

    def use(self, launch: int | None) -> None:
        self.used = launch

    def seconds(self) -> float:
        assert self.used is not None
        if self._ends is not None and self.used == 6:
            raise self._ends("early")
        if self.used % 2:
            raise CompilationError("not here")
        return 1.0 / (1 + self.used)


def test_the_fastest_launch_that_works_is_used() -> None:
    search = Search()
    best, times = tuning.fastest(range(10), 3, search.use, search.seconds, "it")
    assert best == search.used == 8
    assert set(times) == {0, 2, 4, 6, 8}


@pytest.mark.parametrize("ends", [torch.OutOfMemoryError, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("before", [None, 3])
def test_of_a_search_that_ends_early_nothing_is_used(ends: type[BaseException], before: int | None) -> None:
    search = Search(ends)
    with pytest.raises(ends):
        tuning.fastest(range(10), before, search.use, search.seconds, "it")
    assert search.used == before


def test_a_search_in_which_nothing_works_says_so() -> None:
    search = Search()
    with pytest.raises(CompilationError, match="no launch for it works here"):
        tuning.fastest([1, 3], None, search.use, search.seconds, "it")
    assert search.used is None


class Joint:
    """A version for several weights, and one whose kernel was chosen better for them."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def version(self) -> SeveralProducts:
        return SeveralProducts("at once", lambda x, weights: len(x) == 1, self.products, self.tune)

    def products(self, x: Tensor, weights: Sequence[Packed]) -> list[Tensor]:
        self.asked.append([packed.rows for packed in weights])
        return [packed.linear(x) for packed in weights]

    def tune(self, x: Tensor, weights: Sequence[Packed], seconds: Callable[[], float]) -> int:
        assert seconds() > 0
        return 5


def test_weights_that_meet_are_tuned_as_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    joint = Joint()
    monkeypatch.setattr(linear, "_SEVERAL", {"binary-residual": [joint.version()]})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1 << 16))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    calls: list[int] = []

    def timed(products: Sequence[Callable[[], object]], replays: int = 20) -> tuple[float, float]:
        calls.append(len(products))
        for product in products:
            product()
        return 1.0 / len(calls), 0.0

    monkeypatch.setattr(tuning, "seconds_per_call", timed)
    layout = BinaryResidual(128, False)
    weights = [random_packed(layout, rows, 256, seed=rows) for rows in (32, 16, 48)]
    found = list(tune_products([], [1, 16], torch.bfloat16, [weights, [*weights]]))
    assert [(item.parts, item.rows, item.columns, item.vectors, item.tried) for item in found] == [
        ((32, 16, 48), 96, 256, 1, 5)
    ]
    assert found[0].kernel == "at once" and found[0].seconds < found[0].seconds_before
    size = sum(layout.bytes(rows, 256) for rows in (32, 16, 48))
    assert calls == [-(-2 * (1 << 16) // size)] * 3
    assert all(rows == [32, 16, 48] for rows in joint.asked)


def test_only_weights_that_are_not_joined_meet() -> None:
    """q, k and v of BiLLM have marked columns of their own."""
    for layout in (LevelTable(2, 0), BinaryResidual(0, False)):
        model = packed_llama(layout)
        met = [[packed.rows for packed in weights] for weights in meeting_weights(model)]
        attention, feed = model.model.layers[0].self_attn, model.model.layers[0].mlp
        projections = [attention.q_proj.rows, attention.k_proj.rows, attention.v_proj.rows]
        assert met == (
            []
            if isinstance(layout, LevelTable)
            else [projections, [feed.gate_proj.rows, feed.up_proj.rows]] * len(model.model.layers)
        )
    assert meeting_weights(torch.nn.Sequential(torch.nn.Linear(4, 4))) == []


def test_what_does_not_fit_into_memory_is_named_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(weights: object, vectors: int, dtype: torch.dtype) -> None:
        if vectors > 1:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(tuning, "_tune_one", full)
    packed = random_packed(LevelTable(2, 128), 32, 256)
    with pytest.warns(UserWarning, match="not tuned for 16 vectors: .* of 32 x 256 does not fit"):
        assert list(tune_products([packed], [1, 16], torch.bfloat16)) == []
    with pytest.warns(UserWarning, match=r"not tuned for 16 vectors: .* of 32 \+ 32 x 256 does not fit"):
        assert list(tune_products([], [16], torch.bfloat16, [[packed, packed]])) == []


def test_a_product_that_no_launch_can_be_compiled_for_is_named_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(weights: object, vectors: int, dtype: torch.dtype) -> None:
        raise CompilationError("no launch can be compiled here")

    monkeypatch.setattr(tuning, "_tune_one", broken)
    with pytest.warns(UserWarning, match="not tuned for 1 vectors: no launch can be compiled here"):
        assert list(tune_products([random_packed(LevelTable(2, 128), 32, 256)], [1], torch.bfloat16)) == []


def packed_llama(layout: Format) -> Any:
    """A small model whose blocks hold random packed weights, no two alike."""
    model = tiny.llama()
    linear = [(name, layer) for name, layer in model.model.layers.named_modules() if isinstance(layer, torch.nn.Linear)]
    for seed, (name, layer) in enumerate(linear):
        packed = random_packed(layout, layer.out_features, layer.in_features, seed=seed)
        module = PackedLinear(packed.format, packed.rows, packed.columns, None)
        module.set_packed(packed)
        model.model.layers.set_submodule(name, module)
    return model


def test_joined_weights_of_a_model_come_first() -> None:
    model = packed_llama(LevelTable(2, 0))
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


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [BinaryResidual(0, False), BinaryResidual(128, True), GroupedInteger(4, 64, True)])
def test_joint_launches_are_right_in_every_shape_and_kept(
    layout: Format, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHIT_CACHE", str(tmp_path))
    tuned_shapes.cache_clear()
    weights = [random_packed(layout, rows, 1280, "cuda", seed=rows) for rows in (2048, 496, 520)]
    x = inputs(1, 1280, dtype, "cuda")
    version = choose_several(x, weights)
    assert version is not None and version.tune is not None
    expected = [x.double() @ packed.unpack().double().T for packed in weights]
    worst: list[float] = []

    def check() -> float:
        for packed, mine, wanted in zip(weights, version.products(x, weights), expected, strict=True):
            bound = error_bound(x, packed.unpack().double(), wanted, block=unit_columns(layout, 1280))
            worst.append(float(((mine.double() - wanted).abs() / bound).nan_to_num(nan=1e9).max()))
        return 1.0 + len(worst) % 7

    tried = version.tune(x, weights, check)
    assert tried > 5 and len(worst) == 3 * tried
    assert max(worst) <= 1
    kept = [key for path in tmp_path.rglob("tuned-*.json") for key in json.loads(path.read_text(encoding="utf-8"))]
    assert [key.endswith("/2048+496+520") for key in kept] == [True]
    found = list(tune_products([], [1, 16], dtype, [weights]))
    assert [(item.parts, item.vectors) for item in found] == [((2048, 496, 520), 1)]
    check()
    assert max(worst) <= 1
    tuned_shapes.cache_clear()
