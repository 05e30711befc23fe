"""What is worked out once for a weight is used while it holds, and no longer."""

from __future__ import annotations

import copy
import ctypes
import gc
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from tests.kernels.test_cuda_kernels import needs_gpu, random_packed
from whit.formats import Packed
from whit.formats.base import Format
from whit.formats.binary_residual import BinaryResidual
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.level_table import LevelTable
from whit.formats.memory import Memory
from whit.formats.scaled_codes import ScaledCodes
from whit.formats.structured_binary import StructuredBinary
from whit.formats.vector_codebook import VectorCodebook
from whit.kernels import cuda_tuned, launching, linear, nvrtc, packed_linear
from whit.kernels import driver as driver_module
from whit.kernels.calling import unobserved
from whit.kernels.driver import Kernel, PreparedLaunch
from whit.kernels.linear import Implementation, SeveralProducts, register_implementation, several_products
from whit.kernels.repeated import Repeated
from whit.models.packed import PackedLinear

FORMAT = LevelTable(2, 128)


def small(seed: int = 0) -> Packed:
    return random_packed(FORMAT, 16, 256, seed=seed)


def moved(packed: Packed) -> None:
    packed.tensors["codes"] = packed.tensors["codes"].clone()


def moved_in_place(packed: Packed) -> None:
    packed.tensors["levels"].data = packed.tensors["levels"].data.clone()


def turned(packed: Packed) -> None:
    codes = packed.tensors["codes"]
    packed.tensors["codes"] = codes.T.contiguous().T


def learnt(packed: Packed) -> None:
    Memory.forget_all()


@pytest.mark.parametrize("change", [moved, moved_in_place, turned, learnt])
def test_answers_last_as_long_as_the_tensors_lie_where_they_did(change: Callable[[Packed], None]) -> None:
    packed = small()
    packed.memory.of(packed.tensors)["question"] = "answer"
    packed.tensors["codes"].add_(1)  # other values at the same place
    assert packed.memory.of(packed.tensors) == {"question": "answer"}
    change(packed)
    assert packed.memory.of(packed.tensors) == {}


def test_answers_are_bounded() -> None:
    packed = small()
    for number in range(Memory.MOST + 5):
        packed.memory.of(packed.tensors)[number] = number
    assert 0 < len(packed.memory.of(packed.tensors)) <= Memory.MOST


def test_copies_begin_without_answers() -> None:
    packed = small()
    packed.memory.of(packed.tensors)["question"] = lambda: None  # nothing that could be copied or stored
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), packed.to("cpu")):
        assert other.memory is not packed.memory
        assert other.memory.of(other.tensors) == {}
        assert "memory" not in repr(other)


class Asked:
    """An implementation that counts what it is asked; its product names the weight's first level."""

    def __init__(self, factor: float) -> None:
        self.asked, self.prepared, self.direct = 0, 0, 0
        self.factor = factor

    def supports(self, x: Tensor, packed: Packed) -> bool:
        self.asked += 1
        return True

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        self.direct += 1
        return self.factor * packed.linear(x, bias)

    def prepare(self, x: Tensor, packed: Packed) -> linear.Run:
        self.prepared += 1
        weight = self.factor * packed.unpack().to(x.dtype)

        def run(x: Tensor, bias: Tensor | None) -> Tensor:
            assert x.dim() == 2
            assert x.is_contiguous()
            assert bias is None or (bias.dtype == x.dtype and bias.is_contiguous())
            return torch.nn.functional.linear(x, weight, None if bias is None else self.factor * bias)

        return run

    def implementation(self, name: str = "asked") -> Implementation:
        return Implementation(name, self.supports, self.linear, self.prepare)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The only implementation of a registry of its own, on a CPU that is taken for a GPU."""
    monkeypatch.setattr(linear, "_IMPLEMENTATIONS", {})
    monkeypatch.setattr(linear, "remembers", unobserved)
    monkeypatch.setattr(nvrtc, "_FAILED", set())
    found = Asked(2.0)
    register_implementation(FORMAT.name, found.implementation())
    return found


def test_a_call_like_one_before_asks_nothing(asked: Asked) -> None:
    packed, x = small(), torch.randn(3, 256)
    for _ in range(4):
        torch.testing.assert_close(packed_linear(x, packed), 2 * packed.linear(x))
    assert (asked.asked, asked.prepared, asked.direct) == (1, 1, 0)
    packed_linear(torch.randn(4, 256), packed)
    packed_linear(x.double(), packed.__class__(FORMAT, 16, 256, packed.tensors))
    assert asked.asked == 3


def test_prompts_of_other_lengths_ask_nothing_between_two_powers_of_two(asked: Asked) -> None:
    packed = small()
    for vectors in (33, 40, 63, 64, 65, 100, 127, 128):
        x = torch.randn(vectors, 256)
        torch.testing.assert_close(packed_linear(x, packed), 2 * packed.linear(x))
    assert asked.prepared == 4
    for vectors in (1, 16, 32):
        assert len({linear.count_class(count, 8, 8) for count in (vectors, vectors + 1)}) == 2
    large = 2**31 // 128000
    assert linear.count_class(large, 128000, 4096) != linear.count_class(large + 1, 128000, 4096)


def test_inputs_of_any_shape_and_biases_of_any_type(asked: Asked) -> None:
    packed, bias = small(), torch.randn(32, dtype=torch.float64)[::2]
    for x in (torch.randn(256), torch.randn(2, 3, 256), torch.randn(256, 5).T, torch.randn(5, 512)[:, ::2]):
        expected = 2 * packed.linear(x, bias.float())
        torch.testing.assert_close(packed_linear(x, packed, bias), expected)
    assert asked.direct == 0
    with pytest.raises(RuntimeError):
        packed_linear(torch.randn(2, 128), packed)


@pytest.mark.parametrize("change", [moved, moved_in_place])
def test_a_weight_that_moved_is_prepared_again(asked: Asked, change: Callable[[Packed], None]) -> None:
    packed, x = small(), torch.randn(3, 256)
    before = packed_linear(x, packed)
    change(packed)
    for name in packed.tensors:
        packed.tensors[name].copy_(small(seed=1).tensors[name])
    after = packed_linear(x, packed)
    assert asked.prepared == 2
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, 2 * small(seed=1).linear(x))


def test_what_is_registered_or_fails_later_changes_the_choice(asked: Asked) -> None:
    packed, x = small(), torch.randn(3, 256)
    packed_linear(x, packed)
    other = Asked(3.0)

    def refused(x: Tensor, packed: Packed) -> linear.Run:
        raise nvrtc.CompilationError("no such instruction")

    register_implementation(FORMAT.name, other.implementation("other"))
    torch.testing.assert_close(packed_linear(x, packed), 3 * packed.linear(x))
    register_implementation(FORMAT.name, Implementation("refused", other.supports, other.linear, refused))
    with pytest.warns(UserWarning, match="'refused' run in a slower version"):
        again = packed_linear(x, packed)
    torch.testing.assert_close(again, 3 * packed.linear(x))
    assert other.direct == 0


@pytest.mark.parametrize(
    "learn", [lambda: cuda_tuned.use_shape("x", "y", None), lambda: launching.use_tile("x", "y", None)]
)
def test_tuning_changes_the_choice(asked: Asked, learn: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = small(), torch.randn(3, 256)
    packed_linear(x, packed)
    learn()
    packed_linear(x, packed)
    assert asked.prepared == 2


def test_what_is_traced_or_derived_is_not_prepared(asked: Asked) -> None:
    packed, x = small(), torch.randn(3, 256)
    torch.testing.assert_close(torch.vmap(lambda row: packed_linear(row, packed))(x), 2 * packed.linear(x))
    assert (asked.prepared, asked.direct) == (0, 1)


def test_a_preparation_does_not_keep_its_weight(asked: Asked) -> None:
    packed = small()
    packed_linear(torch.randn(3, 256), packed)
    gone = weakref.ref(packed)
    gc.disable()
    try:
        del packed
        assert gone() is None
    finally:
        gc.enable()


def test_several_weights_are_prepared_while_all_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[int] = []

    def prepare(x: Tensor, weights: object) -> linear.RunSeveral:
        assert isinstance(weights, list)
        prepared.append(len(weights))
        dense = [packed.unpack() for packed in weights]
        return lambda x: [x @ weight.T for weight in dense]

    def products(x: Tensor, weights: object) -> list[Tensor]:
        raise AssertionError("it was prepared")

    version = SeveralProducts("joint", lambda x, weights: len(weights) > 1, products, prepare=prepare)
    monkeypatch.setattr(linear, "_SEVERAL", {FORMAT.name: [version]})
    monkeypatch.setattr(linear, "remembers", unobserved)
    first, second, third, x = small(0), small(1), small(2), torch.randn(3, 256)
    for _ in range(3):
        found = several_products(x, [first, second])
        assert found is not None
        torch.testing.assert_close(found[1], second.linear(x))
    assert prepared == [2]
    other = several_products(x, [first, third])
    assert other is not None
    torch.testing.assert_close(other[1], third.linear(x))
    moved(third)
    several_products(x, [first, third])
    assert prepared == [2, 2, 2]
    assert several_products(x, [first]) is None


def test_a_prepared_launch_gives_what_stays_and_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver is handed: the address of every argument, read here as the kernel would."""
    streams, seen = iter([7, 7, 9]), []

    class Driver:
        def __getattr__(self, name: str) -> Callable[..., int]:
            return lambda *arguments: 0

        def cuLaunchKernelEx(self, config: object, function: object, pointers: object, extra: object) -> int:  # noqa: N802
            described = config._obj  # type: ignore[attr-defined]
            first = ctypes.cast(pointers, ctypes.POINTER(ctypes.c_uint64))  # type: ignore[arg-type]
            addresses = first[:4]
            values = [
                ctypes.c_uint64.from_address(addresses[0]).value,
                ctypes.c_int.from_address(addresses[1]).value,
                Pair.from_address(addresses[2]).second,
                ctypes.c_int.from_address(addresses[3]).value,
            ]
            seen.append((described.grid_x, described.block_x, described.shared, described.stream, values))
            return 0

    class Pair(ctypes.Structure):
        _fields_ = (("first", ctypes.c_int), ("second", ctypes.c_int))

    stub = Driver()
    monkeypatch.setattr(driver_module, "_driver", lambda: stub)
    monkeypatch.setattr(driver_module, "current_stream", lambda: next(streams))
    run = PreparedLaunch(Kernel(b"code", "name"), 64, 100, [None, ctypes.c_int(-3), None, None], early=True)
    for address in (1 << 40, 16, 32):
        run.start(address % 7, address, Pair(1, address % 1000), 12)
    assert seen == [
        (address % 7, 64, 100, stream, [address, -3, address % 1000, 12])
        for stream, address in zip((7, 7, 9), (1 << 40, 16, 32), strict=True)
    ]
    with pytest.raises(ValueError, match="shorter"):
        run.start(5, 1, Pair(1, 2))


class Compiled:
    """Stands for a Triton kernel, before and after compilation; keeps what it is launched with."""

    arg_names = ("a", "b", "count", "FIRST", "SECOND")

    def __init__(self) -> None:
        self.compiled: list[tuple[object, ...]] = []
        self.started: list[tuple[object, ...]] = []
        self.refuses = False

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        def run(*arguments: object, **constants: object) -> object:
            self.compiled.append((grid, *arguments[2:], constants))
            outer = self

            class Form:
                def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                    def start(*arguments: object) -> None:
                        if outer.refuses:
                            raise TypeError("function takes exactly 3 arguments")
                        outer.started.append((grid, *arguments[2:]))

                    return start

            return Form()

        return run


def test_a_triton_kernel_is_looked_for_once_while_addresses_are_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whit.kernels.repeated.followed", lambda tensor: True)
    kernel, x = Compiled(), torch.zeros(64)
    repeated = Repeated(kernel, (3,), (8,), {"SECOND": 2, "FIRST": 1}, {"num_warps": 4})
    for _ in range(3):
        repeated.launch(x, x)
    assert kernel.compiled == [((3,), 8, {"SECOND": 2, "FIRST": 1, "num_warps": 4})]
    assert kernel.started == [((3, 1, 1), 8, 1, 2)] * 2  # constants in the order of the parameters
    repeated.launch(x[1:], x)  # not at a multiple of 16 bytes: perhaps another kernel
    repeated.launch(x[1:], x)
    assert len(kernel.compiled) == 3
    kernel.refuses = True
    repeated.launch(x, x)
    repeated.launch(x, x)
    assert len(kernel.compiled) == 5
    assert len(kernel.started) == 2


def test_an_interpreted_kernel_is_called_as_it_is() -> None:
    kernel, x = Compiled(), torch.zeros(64)
    repeated = Repeated(kernel, (3,), (8,), {"FIRST": 1, "SECOND": 2}, {})
    for _ in range(2):
        repeated.launch(x, x)
    assert len(kernel.compiled) == 2
    assert kernel.started == []


GPU_FORMATS: list[Format] = [
    BinaryResidual(0, False),
    BinaryResidual(128, True),
    LevelTable(2, 0),
    GroupedInteger(4, 64, False),
    VectorCodebook(256, 12, False),
    StructuredBinary(4, 8, 0),
    ScaledCodes("int8", 0),
]


def close(found: Tensor, x: Tensor, packed: Packed) -> bool:
    weight = packed.unpack().double()
    expected = x.double() @ weight.T
    size = x.double().abs() @ weight.abs().T
    return bool(((found.double() - expected).abs() <= 2.0**-6 * size + 1e-6).all())


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("layout", GPU_FORMATS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("tokens", [1, 8, 130, 1100])
def test_a_replaced_or_moved_weight_is_not_read_where_it_was(layout: Format, tokens: int) -> None:
    rows, columns = 144, 768
    packed, other = (random_packed(layout, rows, columns, "cuda", seed=seed) for seed in (0, 1))
    module = PackedLinear(layout, rows, columns, None)
    module.set_packed(packed)
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        for _ in range(2):
            assert close(module(x), x, packed)
        module.set_packed(other)
        assert close(module(x), x, other)
        module.to("cpu").to("cuda")
        for tensor in other.tensors.values():
            tensor.zero_()  # nobody reads these any more
        assert close(module(x), x, random_packed(layout, rows, columns, "cuda", seed=1))
        for name, tensor in module.named_buffers():
            tensor.copy_(packed.tensors[name])  # other values at the same place
        assert close(module(x), x, packed)
        for name, tensor in module.named_buffers():
            tensor.data = random_packed(layout, rows, columns, "cuda", seed=2).tensors[name]
        assert close(module(x), x, random_packed(layout, rows, columns, "cuda", seed=2))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("layout", GPU_FORMATS, ids=lambda layout: layout.name)
def test_streams_graphs_threads_and_places(layout: Format) -> None:
    rows, columns = 144, 768
    packed = random_packed(layout, rows, columns, "cuda")
    xs = [torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16) for tokens in (1, 16, 200, 200)]
    bias = torch.randn(rows, device="cuda")
    with torch.inference_mode():
        expected = [packed_linear(x, packed, bias) for x in xs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(2_000_000)
            beside = [packed_linear(2 * x, packed) for x in xs]
        side.synchronize()
        for x, found in zip(xs, beside, strict=True):
            assert close(found, 2 * x, packed)
        graph, still = torch.cuda.CUDAGraph(), [x.clone() for x in xs]
        with torch.cuda.graph(graph):
            captured = [packed_linear(x, packed, bias) for x in still]
        for mine, x in zip(still, reversed(xs), strict=True):
            mine.copy_(x[: len(mine)] if len(x) >= len(mine) else x.repeat(-(-len(mine) // len(x)), 1)[: len(mine)])
        graph.replay()
        for x, found in zip(still, captured, strict=True):
            assert torch.equal(found, packed_linear(x, packed, bias))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: packed_linear(xs[number % 4], packed, bias), range(64)))
    assert all(torch.equal(item, expected[number % 4]) for number, item in enumerate(found))
    room = torch.empty(200 * columns + 1, device="cuda", dtype=torch.bfloat16)
    shifted = room[1:].view(200, columns).copy_(xs[2])
    assert close(packed_linear(shifted, packed), xs[2], packed)  # a library may take another way there
    assert torch.equal(packed_linear(xs[2].view(4, 50, columns), packed, bias), expected[2].view(4, 50, rows))
    assert torch.equal(packed_linear(xs[2].repeat(1, 2)[:, :columns], packed, bias), expected[2])


@needs_gpu
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("layout", GPU_FORMATS, ids=lambda layout: layout.name)
def test_the_device_of_the_inputs_runs_whichever_is_current(layout: Format) -> None:
    packed, there = (random_packed(layout, 144, 768, device) for device in ("cuda:0", "cuda:1"))
    for tokens in (1, 16, 200):
        x = torch.randn(tokens, 768, device="cuda:0", dtype=torch.bfloat16)
        for _ in range(2):
            here, beside = packed_linear(x, packed), packed_linear(x.to("cuda:1"), there)
            assert close(here, x, packed)
            assert beside.device == torch.device("cuda:1")
            assert close(beside, x.to("cuda:1"), there)
