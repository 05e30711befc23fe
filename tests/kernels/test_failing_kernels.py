"""Kernels that do not compile or launch on this machine: slower versions take over, with one warning each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tests.kernels.test_cpu_decode import random_packed
from whit.formats.base import Packed
from whit.formats.level_table import LevelTable
from whit.generation.products import Products
from whit.kernels import columns, cuda_attend, explain, groups, linear, lloyd, nvrtc, packed_linear, signs, tuning
from whit.kernels import driver as driver_module
from whit.kernels.linear import Implementation, SeveralProducts
from whit.methods import group_feedback, make_method
from whit.methods.descent import descend_columns
from whit.methods.kmeans import weighted_levels
from whit.methods.rounders import LevelRounder
from whit.methods.statistics import LayerStatistics
from whit.models.packed import PackedLinear

FORMAT = LevelTable(2, 128)
SLOWER = "run in a slower version: CUDA kernel did not compile: whit.cu"


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A compiler that refuses every source, and the sources that it was given."""
    given: list[str] = []

    def refuse(source: str, options: object) -> bytes:
        given.append(source)
        raise nvrtc.CompilationError("CUDA kernel did not compile: whit.cu(1): error: no such instruction")

    monkeypatch.setenv("WHIT_CACHE", str(tmp_path))
    monkeypatch.setattr(nvrtc, "compile_cubin", refuse)
    monkeypatch.setattr(nvrtc, "_FAILED", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    yield given


def by_kernel(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    nvrtc.kernel("product", "product", (), 0)
    raise AssertionError("it compiled")


def by_doubling(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    return 2 * packed.linear(x, bias)


def offer(monkeypatch: pytest.MonkeyPatch, *implementations: Implementation) -> None:
    monkeypatch.setitem(linear._IMPLEMENTATIONS, FORMAT.name, list(implementations))


def anything(x: Tensor, packed: object) -> bool:
    return True


def once(call: Callable[[], Tensor]) -> Tensor:
    """What two calls give; the first must warn and the second must not."""
    with pytest.warns(UserWarning, match=SLOWER) as caught:
        first = call()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(call(), first)
    return first


def test_a_product_that_does_not_compile_is_plain_from_then_on(
    monkeypatch: pytest.MonkeyPatch, compiler: list[str]
) -> None:
    offer(monkeypatch, Implementation("fast", anything, by_kernel))
    packed, x = random_packed(FORMAT, 16, 256), torch.randn(2, 256)
    assert explain(x, packed) == "fast"
    assert torch.equal(once(lambda: packed_linear(x, packed)), packed.linear(x))
    assert compiler == ["product"]
    assert explain(x, packed) == "plain"
    other = random_packed(LevelTable(2, 64), 16, 256)
    assert explain(x, other) == "fast"


def test_the_next_version_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, Implementation("fast", anything, by_kernel), Implementation("double", anything, by_doubling))
    packed, x = random_packed(FORMAT, 16, 256), torch.randn(2, 256)
    assert torch.equal(once(lambda: packed_linear(x, packed)), 2 * packed.linear(x))
    assert explain(x, packed) == "double"


def driver(**statuses: int) -> type:
    """A driver whose calls succeed, but for those that are named here with what they give."""

    class Driver:
        def __getattr__(self, name: str) -> Callable[..., int]:
            return lambda *arguments: statuses.get(name, 0)

    return Driver


def by_launching(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    nvrtc.Kernel(b"code", "product").launch(1, 32, 1 << 20, [])
    raise AssertionError("it ran")


@pytest.mark.parametrize(
    ("call", "status", "said"),
    [
        ("cuFuncSetAttribute", 1, "reserve 1048576 bytes"),
        ("cuModuleLoadData", 209, "load a kernel"),
        ("cuLaunchKernelEx", 701, "launch a kernel"),
    ],
)
def test_what_a_driver_refuses_is_one_of_them(
    call: str, status: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_module, "_driver", driver(**{call: status}))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    offer(monkeypatch, Implementation("fast", anything, by_launching))
    packed, x = random_packed(FORMAT, 16, 256), torch.randn(2, 256)
    with pytest.warns(UserWarning, match=f"'fast' run in a slower version: CUDA driver could not {said}"):
        assert torch.equal(packed_linear(x, packed), packed.linear(x))
    assert explain(x, packed) == "plain"


@pytest.mark.parametrize(
    ("call", "status", "raised", "remedy"),
    [
        ("cuModuleLoadData", 2, torch.OutOfMemoryError, r"empty_cache\(\)"),
        ("cuLaunchKernelEx", 2, torch.OutOfMemoryError, "end other programs"),
        ("cuModuleLoadData", 700, nvrtc.DeviceError, "start again"),
        ("cuLaunchKernelEx", 700, RuntimeError, "start again"),
        ("cuLaunchKernelEx", 719, RuntimeError, "CUDA_LAUNCH_BLOCKING=1"),
        ("cuLaunchKernelEx", 999, RuntimeError, "status 999"),
    ],
)
def test_errors_of_the_device_end_the_call(
    call: str, status: int, raised: type[Exception], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No memory, or a dead context, is no reason to give up a kernel: the plain version would have neither."""
    monkeypatch.setattr(driver_module, "_driver", driver(**{call: status}))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    offer(monkeypatch, Implementation("fast", anything, by_launching))
    packed, x = random_packed(FORMAT, 16, 256), torch.randn(2, 256)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(raised, match=f"CUDA driver could not l.*{remedy}") as caught:
            packed_linear(x, packed)
    assert not isinstance(caught.value, nvrtc.CompilationError)
    assert explain(x, packed) == "fast"


def test_a_thread_that_has_no_context_yet_gets_that_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that torch has kept, and the number of a stream, are had without one."""
    said: list[str] = []

    class Driver:
        def __getattr__(self, name: str) -> Callable[..., int]:
            def call(*arguments: object) -> int:
                said.append(name)
                return 201 * (name == "cuModuleLoadData" and "cuCtxSetCurrent" not in said)

            return call

    monkeypatch.setattr(driver_module, "_driver", Driver)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    nvrtc.Kernel(b"code", "product")
    entering = ["cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"]
    assert said == ["cuModuleLoadData", *entering, "cuModuleLoadData", "cuModuleGetFunction"]


def test_other_errors_are_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    offer(monkeypatch, Implementation("fast", anything, out_of_memory))
    packed = random_packed(FORMAT, 16, 256)
    with pytest.raises(torch.OutOfMemoryError):
        packed_linear(torch.randn(2, 256), packed)
    assert explain(torch.randn(2, 256), packed) == "fast"


def test_tuning_times_nothing_else_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, Implementation("fast", anything, by_kernel))
    with pytest.raises(nvrtc.CompilationError, match="no such instruction"):
        tuning._product(torch.randn(1, 256), [random_packed(FORMAT, 16, 256)])


def test_the_choice_can_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, Implementation("double", anything, by_doubling))
    packed, x = random_packed(FORMAT, 16, 256), torch.randn(2, 256)
    traced = torch.compile(lambda x: packed_linear(x, packed), fullgraph=True, backend="eager")
    assert torch.equal(traced(x), 2 * packed.linear(x))


def test_weights_whose_joint_product_fails_are_multiplied_in_turn(
    monkeypatch: pytest.MonkeyPatch, compiler: list[str]
) -> None:
    def together(x: Tensor, weights: object) -> list[Tensor]:
        nvrtc.kernel("several", "several", (), 0)
        raise AssertionError("it compiled")

    monkeypatch.setitem(linear._SEVERAL, FORMAT.name, [SeveralProducts("fast", anything, together)])
    offer(monkeypatch)
    modules: list[nn.Module] = []
    for seed in (1, 2):
        packed = random_packed(FORMAT, 16 * seed, 256)
        module = PackedLinear(FORMAT, packed.rows, packed.columns, None)
        module.set_packed(packed)
        modules.append(module)
    products, x = Products(modules, join=False), torch.randn(1, 256)
    assert products.explain(x) == "one launch"
    out = once(lambda: torch.cat(products(x), -1))
    assert torch.equal(out, torch.cat([module(x) for module in modules], -1))
    assert compiler == ["several"]
    assert products.explain(x) == "in turn"


@pytest.mark.parametrize("name", ["gptq", "rtn", "kmeans", "billm"])
def test_column_loops_that_do_not_compile_are_plain(
    name: str, monkeypatch: pytest.MonkeyPatch, compiler: list[str]
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(24, 160, generator=generator), torch.randn(400, 160, generator=generator)
    statistics = LayerStatistics(160, 400, 2 * inputs.T @ inputs / 400)
    monkeypatch.setattr(columns, "numba_works", lambda: False)
    expected = make_method(name).compress(weight, statistics)
    assert expected.packed.tensors
    launched = []

    def launch(*arguments: object, **options: object) -> None:
        launched.append(arguments)
        nvrtc.kernel("columns", "round_columns", (), 0)

    monkeypatch.setattr(columns, "_launch", launch)
    monkeypatch.setattr(columns, "available", lambda device, masked=False: not nvrtc.failed("column loops"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = make_method(name).compress(weight, statistics)
    assert [SLOWER in str(item.message) for item in caught] == [True] * len(launched)
    assert len(launched) == len(compiler) == (name != "rtn")
    assert all(torch.equal(found.packed.tensors[key], tensor) for key, tensor in expected.packed.tensors.items())


def test_descent_that_does_not_compile_is_plain(monkeypatch: pytest.MonkeyPatch, compiler: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(150, 200, generator=generator)
    moment, weight = spread @ spread.T, torch.randn(150, 24, generator=generator)
    rounder = LevelRounder(torch.randn(1, 4, 24, generator=generator).sort(1).values)

    def descended() -> Tensor:
        values, codes = torch.zeros_like(weight), torch.zeros(150, 24, dtype=torch.uint8)
        gradient = moment @ weight
        descend_columns(codes, values, gradient, moment, rounder)
        return torch.stack([codes.float(), values, gradient])

    monkeypatch.setattr(columns, "numba_works", lambda: False)
    expected = descended()
    monkeypatch.setattr(columns, "_launch", lambda *arguments, **options: nvrtc.kernel("columns", "loop", (), 0))
    monkeypatch.setattr(columns, "available", lambda device, masked=False: not nvrtc.failed("column loops"))
    assert torch.equal(once(descended), expected)
    assert compiler == ["columns"]


def test_loops_over_groups_that_do_not_compile_are_plain(monkeypatch: pytest.MonkeyPatch, compiler: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(24, 168, generator=generator), torch.randn(400, 168, generator=generator)
    statistics = LayerStatistics(168, 400, 2 * inputs.T @ inputs / 400)
    expected = make_method("codebook").compress(weight, statistics).packed.tensors
    monkeypatch.setattr(group_feedback, "available", lambda device, width: not nvrtc.failed(groups._KIND))
    found = once(lambda: make_method("codebook").compress(weight, statistics).packed.tensors["codes"])
    assert torch.equal(found, expected["codes"])
    assert compiler == [groups.cuda_source()]


def test_column_loops_go_on_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(columns, "nvrtc_found", lambda: True)
    monkeypatch.setattr(columns, "_triton_found", lambda: True)
    assert columns.writes_halves(gpu) and columns.available(gpu, masked=True)
    with pytest.warns(UserWarning, match=SLOWER):
        assert not columns.attempted(lambda: nvrtc.kernel("columns", "round_columns", (), 0))
    assert not columns.writes_halves(gpu) and not columns.available(gpu, masked=True)
    assert columns.available(gpu)


def test_means_that_do_not_compile_are_plain(monkeypatch: pytest.MonkeyPatch, compiler: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    values, importance = torch.randn(5, 64, generator=generator), torch.rand(64, generator=generator) + 0.1
    expected = weighted_levels(values, importance, 4, 20)
    monkeypatch.setattr(lloyd, "nvrtc_found", lambda: True)
    monkeypatch.setattr(lloyd, "available", lambda device: not nvrtc.failed(lloyd._KIND))
    assert torch.equal(once(lambda: weighted_levels(values, importance, 4, 20)), expected)
    assert compiler == [lloyd.cuda_source()]
    assert not lloyd.available(torch.device("cuda"))


def test_sums_over_codes_that_do_not_compile_are_plain(monkeypatch: pytest.MonkeyPatch, compiler: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    products, book = torch.randn(40, 2, 24, generator=generator), torch.zeros(40, dtype=torch.int64)
    codes = torch.randint(0, 4, (40, 24), generator=generator, dtype=torch.uint8)
    low, high = torch.rand(2, 1, 24, generator=generator)
    calls: list[Callable[[], Tensor]] = [
        lambda: signs.signed_sums(products, codes),
        lambda: signs.decode_signs(codes, low, high, book),
        lambda: signs.pattern_rows(codes).float(),
    ]
    expected = [call() for call in calls]
    monkeypatch.setattr(signs, "_on_cuda", lambda tensor: not nvrtc.failed(signs._KIND))
    for call, wanted in zip(calls, expected, strict=True):
        monkeypatch.setattr(nvrtc, "_FAILED", set())
        compiler.clear()
        assert torch.equal(once(call), wanted)
        assert compiler == [signs.cuda_source()]


def test_attention_that_does_not_compile_is_left_to_the_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(tensors: object, scaling: float) -> Tensor:
        raise nvrtc.CompilationError("CUDA kernel did not compile: whit.cu(1): error: no such instruction")

    monkeypatch.setattr(cuda_attend, "launch_attend", launch)
    with pytest.warns(UserWarning, match=f"attention of a decoding step {SLOWER}"):
        assert cuda_attend.attended((torch.zeros(1),) * 9, 1.0) is None
    query = torch.zeros(1, 64, dtype=torch.float16, device="meta")
    assert not cuda_attend.attends(query, query, query, torch.zeros(1, 1, 8, 64, device="meta"))
    assert nvrtc.failed("attention of a decoding step")
