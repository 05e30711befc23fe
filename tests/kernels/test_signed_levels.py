"""Products with N:M sparse binary weights as signed levels: the CUDA sources on a CPU, against what is stored."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.emulator.build import COMPILER, compiled, run
from tests.kernels.test_cuda_kernels import error_bound, inputs, needs_gpu, random_packed
from whit.formats.base import Packed
from whit.formats.level_table import LevelTable
from whit.formats.signed_levels import signed_levels
from whit.formats.structured_binary import StructuredBinary
from whit.generation.products import Products
from whit.kernels import cuda_linear, cuda_ops, explain, packed_linear
from whit.kernels import signed_levels as prepares
from whit.kernels.cuda_decode import decode_source
from whit.kernels.cuda_layout import layout_of
from whit.kernels.cuda_ops import has_warpgroups
from whit.kernels.cuda_plan import place_gemv
from whit.kernels.cuda_shapes import Shape
from whit.kernels.cuda_tuned import keep_tuned, tuned_shapes, tuning_key
from whit.kernels.cuda_wide import Decode, WideShape
from whit.kernels.linear import preparation_of
from whit.models.packed import PackedLinear

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs g++")

FORMS = [
    StructuredBinary(4, 8, 0),
    StructuredBinary(5, 8, 0),
    StructuredBinary(6, 8, 0, regions=2),
    StructuredBinary(2, 8, 0, regions=1),
]
ONE = [
    (StructuredBinary(4, 8, 0), 33, 1000, Shape(64, 512, 1, True), torch.float16),
    (StructuredBinary(5, 8, 0), 48, 640, Shape(64, 512, 1, True), torch.bfloat16),
    (StructuredBinary(4, 8, 0), 64, 832, Shape(64, 1024, 2, True, bulk=True, patient=True), torch.float16),
    (StructuredBinary(2, 8, 0, regions=1), 20, 1024, Shape(64, 256, 2, True, patient=True), torch.float16),
    (
        StructuredBinary(4, 8, 0),
        112,
        2304,
        Shape(384, 1024, 2, True, 1, eager=True, depth=4, patient=True, bulk=True),
        torch.bfloat16,
    ),
    (StructuredBinary(6, 8, 0, regions=2), 50, 4100, Shape(64, 1024, 1, True), torch.float16),
]


@needs_compiler
@pytest.mark.parametrize(("layout", "rows", "columns", "shape", "dtype"), ONE, ids=str)
def test_one_vector(layout, rows, columns, shape, dtype, tmp_path):
    packed = random_packed(layout, rows, columns)
    form = signed_levels(packed)
    described = layout_of(form.format, columns)
    launch = place_gemv(described, rows, columns, 2, 200_000, shape)
    program = compiled("gemv", described, launch, 1, dtype == torch.bfloat16, tmp_path)
    x, bias = inputs(1, columns, dtype, "cpu"), torch.linspace(-1, 1, rows).to(dtype)
    tensors = [form.tensors[name] for name in described.names if name]
    actual = run(program, described, launch, tensors, (rows, columns), x, bias)
    weight = packed.unpack().double()
    expected = x.double() @ weight.T + bias.double()
    assert ((actual.double() - expected).abs() <= error_bound(x, weight, expected, block=256)).all()
    assert torch.equal(run(program, described, launch, tensors, (rows, columns), x, bias, descending=True), actual)


WIDE = [
    (StructuredBinary(4, 8, 0), WideShape(16, 1, 2, 4, 1, 128, 3), 11),
    (StructuredBinary(4, 8, 0), WideShape(16, 1, 1, 3, 1), 16),
    (StructuredBinary(5, 8, 0), WideShape(64, 3, 1, 2, 1, 128, 3), 70),
    (StructuredBinary(6, 8, 0, regions=2), WideShape(16, 1, 2, 3, 1, 128, 1, sends=True, staged=True), 8),
    (StructuredBinary(2, 8, 0, regions=1), WideShape(8, 1, 1, 3, 1, 128), 5),
]


@needs_compiler
@pytest.mark.parametrize(("layout", "shape", "tokens"), WIDE, ids=str)
def test_many_vectors(layout, shape, tokens, tmp_path):
    rows, columns, dtype = 83, 768 if shape.block == 128 else 704, torch.bfloat16 if tokens < 12 else torch.float16
    packed = random_packed(layout, rows, columns)
    form = signed_levels(packed)
    described = layout_of(form.format, columns)
    program = compiled("wide", described, shape, tokens, dtype == torch.bfloat16, tmp_path)
    x, bias = inputs(tokens, columns, dtype, "cpu"), torch.linspace(-1, 1, rows).to(dtype)
    tensors = [form.tensors[name] for name in described.names if name]
    actual = run(program, described, shape, tensors, (rows, columns), x, bias)
    weight = packed.unpack().double()
    expected = x.double() @ weight.T + bias.double()
    assert ((actual.double() - expected).abs() <= error_bound(x, weight, expected)).all()
    assert torch.equal(run(program, described, shape, tensors, (rows, columns), x, bias, descending=True), actual)


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """What kernels ask of a device, answered as an H200 does; its launch shapes are kept in a folder of the test."""
    monkeypatch.setenv("WHIT_CACHE", str(tmp_path))
    monkeypatch.setattr(cuda_ops, "device_limits", lambda index: ("No Such GPU", 132, 232_448))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(prepares, "works", lambda index: True)
    tuned_shapes.cache_clear(), cuda_ops.choice.cache_clear()
    yield
    tuned_shapes.cache_clear(), cuda_ops.choice.cache_clear()


@pytest.mark.parametrize(
    ("dtype", "prepared"), [(torch.float16, True), (torch.bfloat16, True), (torch.float32, False)], ids=str
)
def test_weights_are_prepared_for_inputs_that_kernels_take(dtype, prepared, hopper):
    form, weights = StructuredBinary(4, 8, 0), []
    with FakeTensorMode():
        for columns in (1024, 1000):
            specs = form.specs(64, columns).items()
            tensors = {name: torch.empty(spec.shape, dtype=spec.dtype, device="cuda:0") for name, spec in specs}
            weights.append(Packed(form, 64, columns, tensors))
        assert (preparation_of(weights[:1], dtype) is not None) is prepared
        assert preparation_of(weights[1:], dtype) is None  # `wide` takes whole boxes of 64 columns


@pytest.mark.parametrize("columns", [704, 700])
def test_no_kernel_that_decodes_what_is_stored_is_given_signed_levels(columns, hopper, monkeypatch):
    """The planes are other codes than `decode` knows; a file of launch shapes may say what it likes."""
    stored = random_packed(StructuredBinary(4, 8, 0), 48, columns)
    packed, table = signed_levels(stored), random_packed(LevelTable(2, 64), 48, columns)
    described = layout_of(packed.format, columns)
    for weight in (packed, table):
        layout = layout_of(weight.format, columns)
        keep_tuned("No Such GPU", {tuning_key(layout, 48, columns, tokens): Decode() for tokens in (16, 256)})
    monkeypatch.setattr(cuda_linear, "usable", lambda x, packed: layout_of(packed.format, columns))
    for tokens in (1, 2, 16, 256):
        x = inputs(tokens, columns, torch.float16, "cpu")
        other = "cuda warpgroup product" if columns % 64 == 0 else "plain"
        assert explain(x, packed) == ("cuda bit-plane gemv" if tokens == 1 else other)
        if tokens > 16:
            assert explain(x, table) == "cuda decode + matmul"  # which the file does decide for others
    with pytest.raises(ValueError, match="signed levels"):
        decode_source(described, columns)
    monkeypatch.undo()
    for x in (inputs(3, columns, torch.float16, "cpu"), inputs(1, columns, torch.float32, "cpu")):
        assert explain(x, packed) == "plain" and torch.equal(packed_linear(x, packed), stored.linear(x, None))


@needs_gpu
@pytest.mark.gpu
def test_calls_that_no_kernel_takes():
    if not has_warpgroups(0):
        pytest.skip("weights are held as they are stored")
    stored = random_packed(StructuredBinary(4, 8, 0), 130, 704, "cuda")
    form = signed_levels(stored)
    for tokens in (1, 16, 300):
        for dtype, gradient in ((torch.float32, False), (torch.float16, True)):
            x = inputs(tokens, 704, dtype, "cuda").requires_grad_(gradient)
            assert explain(x, form) == "plain" and torch.equal(packed_linear(x, form), stored.linear(x, None))
    x = inputs(16, 704, torch.float16, "cuda")
    traced = torch.compile(lambda x: packed_linear(x, form), backend="eager", fullgraph=True)(x)
    assert torch.equal(traced, packed_linear(x, form))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("layout", FORMS, ids=str)
def test_prepared_weights(layout, dtype):
    if not has_warpgroups(0):
        pytest.skip("weights are held as they are stored")
    for rows, columns in ((33, 704), (300, 1088), (1000, 4096), (100, 11008)):
        packed = random_packed(layout, rows, columns, "cuda")
        (form,) = preparation_of([packed], dtype).prepare([packed])
        weight = packed.unpack().double()
        assert torch.equal(form.unpack(), packed.unpack())
        for tokens in (1, 2, 16, 70, 300):
            x, bias = inputs(tokens, columns, dtype, "cuda"), torch.randn(rows, device="cuda").to(dtype)
            expected = x.double() @ weight.T + bias.double()
            version = explain(x, form)
            assert version == ("cuda bit-plane gemv" if tokens == 1 else "cuda warpgroup product")
            actual = packed_linear(x, form, bias)
            bound = error_bound(x, weight, expected, version, 256)
            assert ((actual.double() - expected).abs() <= bound).all()
            assert torch.equal(packed_linear(x, form, bias), actual)


@needs_gpu
@pytest.mark.gpu
def test_layers_that_meet_the_same_input_are_prepared_alike():
    layout, generator = StructuredBinary(4, 8, 0), torch.Generator("cuda").manual_seed(0)
    parts = [random_packed(layout, rows, 1088, "cuda", seed=rows) for rows in (512, 128, 130)]
    modules = [PackedLinear(layout, part.rows, 1088, None) for part in parts]
    for module, part in zip(modules, parts, strict=True):
        module.set_packed(part)
    products = Products(modules, dtype=torch.bfloat16)
    if not has_warpgroups(0):
        pytest.skip("weights are held as they are stored")
    assert all(module.running.format.name == "signed-levels" for module in modules)
    assert not any(tensor.is_cuda for module in modules for tensor in module.packed.tensors.values())
    for tokens in (1, 16):
        x = torch.randn(tokens, 1088, device="cuda", generator=generator).bfloat16()
        if tokens == 1:
            assert products.explain(x) == "one launch"
        for found, part in zip(products(x), parts, strict=True):
            weight = part.unpack().double()
            expected = x.double() @ weight.T
            assert ((found.double() - expected).abs() <= error_bound(x, weight, expected, "", 256)).all()
    for module, part in zip(modules, parts, strict=True):
        assert torch.equal(module.to("cuda").packed.unpack(), part.unpack())
