"""The CUDA kernels against the plain meaning in float64, within the bounds stated in `whit/kernels/cuda_linear.py`."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from whit.formats import Packed
from whit.formats.binary_residual import BinaryResidual
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.level_table import LevelTable
from whit.formats.nm_index import encode_mask, kept_in_group
from whit.formats.structured_binary import StructuredBinary
from whit.formats.vector_codebook import VectorCodebook
from whit.kernels import explain, packed_linear
from whit.kernels.cuda_layout import layout_of
from whit.kernels.cuda_ops import choice, device_limits, has_warpgroups, layout_fields
from whit.kernels.cuda_plan import plan
from whit.kernels.cuda_products import decoded_weight
from whit.kernels.cuda_shapes import gemv_shapes, small_shapes
from whit.kernels.cuda_tuned import tuning_key, use_shape
from whit.kernels.cuda_wide import bucket
from whit.kernels.cuda_wide_plan import likely_shapes, wide_shapes
from whit.models.packed import PackedLinear

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs a CUDA device of compute capability 8.0",
)
FORMATS = [
    BinaryResidual(128, True),
    BinaryResidual(128, False),
    BinaryResidual(0, True),
    BinaryResidual(64, False),
    LevelTable(1, 128),
    LevelTable(2, 128),
    LevelTable(2, 64),
    LevelTable(2, 0),
    LevelTable(2, 384),
    GroupedInteger(1, 64, True),
    GroupedInteger(1, 128, True),
    GroupedInteger(1, 128, False),
    GroupedInteger(2, 64, False),
    GroupedInteger(2, 128, True),
    GroupedInteger(3, 64, False),
    GroupedInteger(3, 128, True),
    GroupedInteger(4, 128, False),
    GroupedInteger(4, 64, True),
    GroupedInteger(3, 0, True),
    GroupedInteger(4, 0, True),
    GroupedInteger(8, 128, False),
    GroupedInteger(8, 0, True),
]
OTHERS = [
    LevelTable(4, 32),
    GroupedInteger(5, 8, False),
    VectorCodebook(256, 12, False),
    VectorCodebook(256, 8, True),
    VectorCodebook(64, 5, True),
    VectorCodebook(256, 17, False),
    StructuredBinary(4, 8, 0),
    StructuredBinary(5, 8, 0, means=True),
    StructuredBinary(6, 8, 0, regions=2),
    StructuredBinary(2, 8, 0, regions=1),
    StructuredBinary(2, 8, 64, regions=2),
    StructuredBinary(1, 1, 128, means=True),
]
"""Formats that `gemv` and `small` do not multiply."""
SHAPES = [(16, 128), (48, 512), (33, 200), (7, 13), (130, 1000), (256, 4096), (100, 11008)]
COUNTS = [1, 2, 7, 8, 9, 16, 17, 32, 33, 150, 600]
ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def name_of(layout):
    return "-".join(str(value).replace("-", "_") for value in layout.to_json().values())


def random_packed(layout, rows, columns, device="cpu", seed=0):
    """Random codes; scalars like those of a trained layer (0.02), one column in ten marked."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for name, spec in layout.specs(rows, columns).items():
        if not spec.dtype.is_floating_point:
            low, high = (-127, 128) if spec.dtype == torch.int8 else (0, 256)
            tensor = torch.randint(low, high, spec.shape, dtype=spec.dtype, device=device, generator=generator)
            if name in ("codebook", "regions") and spec.dtype == torch.uint8 and getattr(layout, "regions", 3) == 3:
                tensor %= 243  # five trits
            if name == "index":
                tensor = random_index(layout, rows, columns, generator)
            if name == "salient":
                for _ in range(2):
                    again = torch.randint(0, 256, spec.shape, dtype=torch.uint8, device=device, generator=generator)
                    tensor &= again
        else:
            tensor = (0.02 * torch.randn(spec.shape, device=device, generator=generator)).to(spec.dtype)
        tensors[name] = tensor
    return Packed(layout, rows, columns, tensors)


def random_index(layout, rows, columns, generator):
    """The index of random N:M masks; a last, narrower group keeps its share."""
    score = torch.rand(rows, columns, device=generator.device, generator=generator)
    mask = torch.zeros(rows, columns, dtype=torch.bool, device=generator.device)
    for start in range(0, columns, layout.m):
        part = score[:, start : start + layout.m]
        kept = part.topk(kept_in_group(part.shape[1], layout.n, layout.m), dim=1).indices
        mask.scatter_(1, kept + start, True)
    return encode_mask(mask, layout.n, layout.m)


def inputs(tokens, columns, dtype, device, seed=1):
    """Normal inputs with a few channels a hundred times larger, as language models have."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(tokens, columns, device=device, generator=generator)
    x[:, :: max(1, columns // 3)] *= 100
    return x.to(dtype)


def unit_columns(layout, columns):
    """Columns of one vector that share a unit of fixed point."""
    described = layout_of(layout, columns)
    return 256 if described is not None and described.multiplies and described.group % 256 == 0 else 128


def error_bound(x, weight, expected, version="", block=128):
    """The bound of the version that runs (as `explain` names it), element by element, the bias's part in `expected`.

    `block` columns of one vector share a unit of fixed point. The library's product may round twice more: its sum
    before the bias, and parts of the sum in the type of x.
    """
    u = ROUNDOFF[x.dtype]
    size = x.double().abs() @ weight.abs().T
    if "decode" in version or "warpgroup" in version:
        # In float16, weights below 2^-14 are rounded to multiples of 2^-24.
        least = 2.0**-25 * x.double().abs().sum(1, keepdim=True) if x.dtype == torch.float16 else 0
        return u * expected.abs() + ((2 if "decode" in version else 1) * u + 2.0**-18) * size + least + 1e-7
    if len(x) > 1 or any(name in version for name in ("structured", "table")):
        return u * expected.abs() + (u + 2.0**-18) * size + 1e-7
    padded = torch.nn.functional.pad(x.double().abs(), (0, -x.shape[1] % block)).reshape(len(x), -1, block).amax(-1)
    blocks = torch.nn.functional.pad(weight.abs(), (0, -x.shape[1] % block)).reshape(len(weight), -1, block).sum(-1)
    return u * expected.abs() + 2.0**-15.99 * (padded @ blocks.T) + 2.0**-18 * size + 1e-7


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("layout", [*FORMATS, *OTHERS], ids=name_of)
def test_products_are_those_of_the_plain_meaning(layout, dtype):
    failures = []
    for shape_number, (rows, columns) in enumerate(SHAPES):
        packed = random_packed(layout, rows, columns, "cuda", seed=shape_number)
        weight = packed.unpack().double()
        for tokens in COUNTS:
            x = inputs(tokens, columns, dtype, "cuda", seed=tokens)
            bias = torch.randn(rows, device="cuda").to(dtype) if tokens % 2 else None
            expected = x.double() @ weight.T + (0 if bias is None else bias.double())
            torch.empty(tokens, rows, dtype=dtype, device="cuda").fill_(float("nan"))  # freed: the result may land here
            actual = packed_linear(x, packed, bias)
            assert "cuda" in explain(x, packed)
            version = explain(x, packed)
            bound = error_bound(x, weight, expected, version, unit_columns(layout, columns))
            excess = ((actual.double() - expected).abs() / bound).nan_to_num(nan=1e9).max().item()
            if excess > 1:
                failures.append(f"{rows} x {columns}, {tokens} vectors, {version}: {excess:.3g} times the bound")
    assert not failures, "\n".join(failures)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("layout", [*FORMATS, *OTHERS], ids=name_of)
def test_decoded_weight_is_the_unpacked_weight(layout, dtype):
    for rows, columns in SHAPES[:5]:
        packed = random_packed(layout, rows, columns, "cuda")
        described = layout_of(layout, columns)
        tensors = [packed.tensors[name] for name in described.names if name]
        fields = layout_fields(described)
        assert torch.equal(decoded_weight(tensors, fields, rows, columns, dtype), packed.unpack().to(dtype))


LIKELY = [
    BinaryResidual(128, True),
    LevelTable(2, 64),
    GroupedInteger(3, 128, False),
    GroupedInteger(4, 64, True),
    VectorCodebook(256, 12, False),
    VectorCodebook(256, 8, True),
]


@needs_gpu
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or not has_warpgroups(0), reason="needs compute capability 9.0")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("layout", LIKELY, ids=name_of)
def test_every_likely_launch_of_several_vectors(layout, dtype):
    rows, columns = 333, 1408
    packed, described = random_packed(layout, rows, columns, "cuda"), layout_of(layout, columns)
    device, _, memory = device_limits(0)
    weight = packed.unpack().double()
    for tokens in (11, 50, 300):
        x, key = inputs(tokens, columns, dtype, "cuda"), tuning_key(described, rows, columns, bucket(tokens))
        bound = error_bound(x, weight, x.double() @ weight.T, "warpgroup")
        offered = wide_shapes(described, bucket(tokens), columns, memory)
        shapes = [shape for shape in likely_shapes(described, bucket(tokens), columns) if shape in offered]
        assert shapes
        for shape in shapes:
            use_shape(device, key, shape)
            choice.cache_clear()
            try:
                actual, again = packed_linear(x, packed), packed_linear(x, packed)
            finally:
                use_shape(device, key, None)
                choice.cache_clear()
            assert ((actual.double() - x.double() @ weight.T).abs() <= bound).all(), (tokens, shape)
            assert torch.equal(actual, again), (tokens, shape)


@needs_gpu
@pytest.mark.gpu
def test_same_input_same_bytes():
    packed = random_packed(BinaryResidual(128, True), 3000, 4096, "cuda")
    for tokens in (1, 5):
        x = inputs(tokens, 4096, torch.bfloat16, "cuda")
        first = packed_linear(x, packed)
        assert all(torch.equal(packed_linear(x, packed), first) for _ in range(20))


@needs_gpu
@pytest.mark.gpu
def test_a_new_thread_multiplies():
    """Its first call is a kernel's, in memory that torch has kept: nothing has brought it to the device before."""
    packed = random_packed(GroupedInteger(2, 64, True), 3000, 1024, "cuda")
    x = inputs(1, 1024, torch.float16, "cuda")
    expected = packed_linear(x, packed)
    packed_linear(x, packed)  # its result's memory is free again
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(packed_linear, x, packed).result(), expected)


@needs_gpu
@pytest.mark.gpu
def test_a_nan_in_the_inputs_reaches_the_outputs():
    packed = random_packed(LevelTable(2, 128), 64, 512, "cuda")
    for tokens in (1, 3):
        x = inputs(tokens, 512, torch.float16, "cuda")
        x[-1, 300] = float("nan")
        assert packed_linear(x, packed)[-1].isnan().all()


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [0, 1, 4, 40])
def test_a_layer_compiles_and_captures(tokens):
    packed = random_packed(BinaryResidual(128, True), 96, 640, "cuda")
    layer = PackedLinear(packed.format, 96, 640, torch.float16).cuda()
    layer.set_packed(packed)
    with torch.no_grad():
        layer.bias.normal_()
        x = inputs(tokens, 640, torch.float16, "cuda")
        expected = layer(x)
        assert expected.shape == (tokens, 96)
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), expected)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        x.mul_(-1)
        graph.replay()
        torch.testing.assert_close(out, layer(x), rtol=0, atol=0)


@needs_gpu
@pytest.mark.gpu
def test_calls_that_no_kernel_serves_are_plain():
    packed = random_packed(GroupedInteger(2, 64, True), 32, 128, "cuda")
    x = inputs(2, 128, torch.float16, "cuda")
    assert explain(x.float(), packed) == "plain"
    assert explain(x.clone().requires_grad_(), packed) == "plain"
    assert "cuda" not in explain(x.cpu(), random_packed(GroupedInteger(2, 64, True), 32, 128))
    odd_groups = random_packed(GroupedInteger(2, 20, True), 32, 120, "cuda")
    assert explain(x[:, :120], odd_groups) == "plain"
    strided = x.repeat(1, 2)[:, ::2]
    assert not strided.is_contiguous()
    torch.testing.assert_close(
        packed_linear(strided, packed), packed_linear(strided.contiguous(), packed), rtol=0, atol=0
    )


@pytest.mark.parametrize("layout", FORMATS, ids=name_of)
@pytest.mark.parametrize("shape", [(16, 8), (4096, 4096), (28672, 8192), (8192, 28672), (128256, 4096), (100, 65536)])
def test_every_launch_fits_the_device(layout, shape):
    rows, columns = shape
    described = layout_of(layout, columns)
    for processors, memory in ((132, 232448), (108, 166912), (84, 101376)):  # H100 and H200, A100, consumer cards
        for tokens in (1, 8, 16, 32):
            launch = plan(described, rows, columns, tokens, processors, memory)
            assert launch.shared <= memory
            assert launch.chunk % launch.shape.item == 0
            assert launch.chunk > 0 and launch.tiles >= 1 and launch.depth >= 2
            assert launch.shape in (gemv_shapes(described) if tokens == 1 else small_shapes(described))


def test_on_a_cpu_no_cuda_version_runs():
    for layout in FORMATS:
        packed = random_packed(layout, 24, 128)
        assert "cuda" not in explain(torch.randn(1, 128, dtype=torch.bfloat16), packed)
        assert layout_of(layout, 128).stage_bytes(256) % 16 == 0
