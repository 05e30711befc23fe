"""Every product of packed weights once on a GPU, for a memory checker; not a test by itself.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.kernels.check_memory 0 16

runs every sixteenth of the jobs. Every tensor has an allocation of its own, of whole 16 bytes: kernels read
aligned words of up to 16 bytes, and of the last one only what lies within the tensor counts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch

from tests.kernels.test_attend_cuda import CASES
from tests.kernels.test_attend_cuda import case as attention_case
from tests.kernels.test_cuda_kernels import FORMATS, OTHERS, error_bound, inputs, random_packed, unit_columns
from tests.kernels.test_eight_bit_kernels import PAIRS, rounded, weight_only
from tests.kernels.test_embedding import weight as embedding_weight
from tests.kernels.test_outlier_int8_kernels import VARIANTS
from tests.kernels.test_outlier_int8_kernels import inputs as eight_inputs
from tests.kernels.test_outlier_int8_kernels import layer as llm_int8
from whit.formats.base import Format, Packed
from whit.formats.binary_residual import BinaryResidual
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.level_table import LevelTable
from whit.formats.outlier_int8 import OutlierInt8
from whit.formats.signed_levels import signed_levels
from whit.formats.structured_binary import StructuredBinary
from whit.formats.vector_codebook import VectorCodebook
from whit.kernels import explain, packed_embedding, packed_linear
from whit.kernels.cuda_attend import AttendLaunch, launch_attend
from whit.kernels.cuda_inputs import Normed, products_of
from whit.kernels.cuda_layout import layout_of
from whit.kernels.cuda_ops import choice, device_limits, starts_early
from whit.kernels.cuda_plan import place_gemv
from whit.kernels.cuda_shapes import gemv_shapes, step_sizes, step_timings
from whit.kernels.cuda_step import place_step, step_key
from whit.kernels.cuda_tuned import tuning_key, use_shape
from whit.kernels.cuda_wide_plan import MANY
from whit.kernels.decode_ops import add_rms_norm, gated
from whit.kernels.eight_cuda import choice as few_choice
from whit.kernels.eight_cuda import multiply_eight
from whit.kernels.eight_few import MOST_VECTORS, place_few
from whit.kernels.eight_layer import eight_bit_of
from whit.kernels.eight_shapes import few_shapes, found_key, found_shapes
from whit.kernels.linear import choose_several
from whit.kernels.outlier_launch import Weight
from whit.kernels.outlier_wide import TILES, fits, wide_layer

SHAPES = [(33, 200), (100, 1088), (130, 2176)]
COUNTS = [1, 2, 9, 33, 150]
BULK = [LevelTable(1, 128), LevelTable(2, 0), LevelTable(2, 128), BinaryResidual(0, False), BinaryResidual(128, True)]


def padded(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor at the start of an allocation of whole 16 bytes."""
    size = tensor.numel() * tensor.element_size()
    room = torch.zeros(-(-size // 16) * 16, dtype=torch.uint8, device=tensor.device)
    return room[:size].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def moved(packed: Packed) -> Packed:
    """The weight with every tensor in an allocation of its own."""
    tensors = {name: padded(tensor) for name, tensor in packed.tensors.items()}
    return Packed(packed.format, packed.rows, packed.columns, tensors)


Job = Callable[[], tuple[int, float]]
"""Makes calls; returns how many, and the largest error relative to its bound."""


def check(part: int, parts: int) -> bool:
    """Run every `parts`-th job, from number `part` on; whether all results are within bounds."""
    jobs: list[Job] = [partial(check_layout, layout) for layout in [*FORMATS, *OTHERS]]
    jobs += [partial(check_bulk, layout) for layout in BULK]
    jobs += [partial(check_eight, packed, number) for number, packed in enumerate(eight_bit_weights())]
    jobs += [check_several, check_embeddings, check_step]
    jobs += [partial(check_gated, layout) for layout in (*BULK, StructuredBinary(4, 8, 0))]
    results = [job() for job in jobs[part::parts]]
    worst = max((error for _, error in results), default=0.0)
    print(f"{sum(calls for calls, _ in results)} calls, at most {worst:.3g} of the bound", flush=True)
    return worst <= 1


def excess(actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor, what: str) -> float:
    """The largest error relative to its bound; said if it is beyond."""
    found = float(((actual.double() - expected).abs() / bound).nan_to_num(nan=1e9).max())
    if found > 1:
        print(f"{found:.3g} times the bound: {what}", flush=True)
    return found


def check_layout(layout: Format) -> tuple[int, float]:
    """One layout in all shapes."""
    errors = []
    for rows, columns in SHAPES:
        packed = moved(random_packed(layout, rows, columns, "cuda"))
        weight = packed.unpack().double()
        for tokens in COUNTS:
            x = padded(inputs(tokens, columns, torch.float16, "cuda"))
            bias = padded(torch.randn(rows, device="cuda").half()) if tokens % 2 else None
            expected = x.double() @ weight.T + (0 if bias is None else bias.double())
            bound = error_bound(x, weight, expected, explain(x, packed), unit_columns(layout, columns))
            what = f"{layout}, {rows} x {columns}, {tokens} vectors"
            errors.append(excess(packed_linear(x, packed, bias), expected, bound, what))
    return len(errors), max(errors)


def check_bulk(layout: Format) -> tuple[int, float]:
    """One vector, the weight by the tensor copy engine, in every shape that has it."""
    errors = []
    device, processors, memory = device_limits(torch.cuda.current_device())
    for rows, columns in ((48, 2048), (2128, 1536)):
        packed = moved(random_packed(layout, rows, columns, "cuda"))
        described, weight = layout_of(layout, columns), packed.unpack().double()
        assert described is not None
        key = tuning_key(described, rows, columns, 1)
        for shape in gemv_shapes(described, True, starts_early(torch.cuda.current_device())):
            if not shape.bulk or place_gemv(described, rows, columns, processors, memory, shape) is None:
                continue
            use_shape(device, key, shape)
            choice.cache_clear()
            x = padded(inputs(1, columns, torch.float16, "cuda"))
            expected = x.double() @ weight.T
            bound = error_bound(x, weight, expected, explain(x, packed), unit_columns(layout, columns))
            errors.append(excess(packed_linear(x, packed), expected, bound, f"{layout} in {shape}"))
        use_shape(device, key, None)
    assert errors or not starts_early(torch.cuda.current_device())
    return len(errors), max(errors, default=0.0)


def eight_bit_weights() -> list[Packed]:
    """LLM.int8() with outliers of all kinds, rounded inputs, and weights alone."""
    weights = [llm_int8(40, 272, *variant) for variant in VARIANTS]
    weights += [rounded(pair, static, 0, 40, 272) for pair in PAIRS[:2] for static in (False, True)]
    return weights + [weight_only(system, group, 40, 272) for system in ("int8", "e4m3fn", "e5m2") for group in (0, -1)]


def check_eight(packed: Packed, number: int) -> tuple[int, float]:
    """An 8-bit layer by every kernel for it, with few and many tokens, and in some launches of its CUDA C++."""
    packed = moved(packed.to("cuda"))
    errors, layout = [], packed.format
    dtype = torch.float16 if number % 2 or "outlier_weight" in packed.tensors else torch.bfloat16
    for tokens in (1, 9, 33, 70):
        x = padded((eight_inputs(tokens, packed.columns)).to("cuda", dtype))
        bias = padded(torch.randn(packed.rows, device="cuda").to(dtype)) if tokens % 2 else None
        plain = packed.linear(x, bias).double()
        size = x.double().abs() @ packed.unpack().double().abs().T + (0 if bias is None else bias.double().abs())
        bound = 2 * torch.finfo(dtype).eps * plain.abs() + (2.0**-9 + torch.finfo(dtype).eps) * size + 1e-9
        found = [packed_linear(x, packed, bias)]
        found += few_launches(x, packed, bias) if tokens <= MOST_VECTORS else []
        if tokens == 70 and isinstance(layout, OutlierInt8) and fits(x, packed.tensors["codes"]):
            found += wide_launches(x, packed, layout, bias, number)
        errors += [excess(one, plain, bound, f"{layout}, {tokens} tokens") for one in found]
    return len(errors), max(errors)


def few_launches(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> list[torch.Tensor]:
    """The results of some launches of `cuda/eight.cu`."""
    layer, index = eight_bit_of(packed, x.dtype == torch.bfloat16), x.device.index
    if layer is None or not starts_early(index):
        return []
    device, processors, memory = device_limits(index)
    results, sizes = [], (len(x), packed.rows, packed.columns)
    for shape in few_shapes(len(x))[1::5]:
        launch = place_few(layer.kind, *sizes, processors, memory, shape)
        if launch is not None:
            found_shapes(device)[found_key(layer.kind, *sizes)] = shape
            few_choice.cache_clear()
            results.append(multiply_eight(x, *layer.arguments(bias)))
    return results


def wide_launches(
    x: torch.Tensor, packed: Packed, layout: OutlierInt8, bias: torch.Tensor | None, number: int
) -> list[torch.Tensor]:
    """The results of every seventh tile of `cuda/outlier_product.cu`."""
    tensors, dynamic = packed.tensors, layout.outliers == "dynamic"
    index, cached = tensors.get("outlier_index"), tensors.get("outlier_weight")
    weight = Weight(tensors["codes"], tensors["absmax"], index, cached, bias, layout.threshold, dynamic)
    results = []
    for tile in list(TILES)[number::7]:
        results.append(torch.full((len(x), packed.rows), torch.nan, dtype=x.dtype, device=x.device))
        wide_layer(x, weight, results[-1], tile)
    return results


def check_several() -> tuple[int, float]:
    """Several weights in one launch."""
    weights = [moved(random_packed(BinaryResidual(0, False), rows, 1088, "cuda", seed=rows)) for rows in (48, 17, 33)]
    x = padded(inputs(1, 1088, torch.float16, "cuda"))
    version = choose_several(x, weights)
    assert version is not None
    for mine, packed in zip(version.products(x, weights), weights, strict=True):
        torch.testing.assert_close(mine, packed_linear(x, packed), rtol=0, atol=0)
    for rows, columns in SHAPES[1:]:
        packed = random_packed(StructuredBinary(4, 8, 0), rows, columns, "cuda")
        form, weight = moved(signed_levels(packed)), packed.unpack().double()
        for tokens in COUNTS:
            x = padded(inputs(tokens, columns, torch.float16, "cuda"))
            expected = x.double() @ weight.T
            bound = error_bound(x, weight, expected, explain(x, form), 256)
            assert ((packed_linear(x, form).double() - expected).abs() <= bound).all()
    layout, x = StructuredBinary(4, 8, 0), padded(inputs(MANY, 1088, torch.float16, "cuda"))
    weights = [moved(random_packed(layout, rows, 1088, "cuda", seed=rows)) for rows in (48, 17, 33)]
    version = choose_several(x, weights)
    assert version is not None
    for mine, packed in zip(version.products(x, weights), weights, strict=True):
        weight = packed.unpack().double()
        expected = x.double() @ weight.T
        assert ((mine.double() - expected).abs() <= error_bound(x, weight, expected, version.name)).all()
    return 2, 0.0


def check_embeddings() -> tuple[int, float]:
    """Rows looked up."""
    for bits, group, columns in [(8, 64, 1100), (8, 0, 30), (4, 24, 50), (2, 8, 1025)]:
        packed = moved(embedding_weight(bits, group, 300, columns).to("cuda"))
        ids = torch.randint(0, 300, (50,), device="cuda")
        assert torch.equal(packed_embedding(ids, packed, torch.float16), packed.unpack()[ids].half())
    return 4, 0.0


def check_step() -> tuple[int, float]:
    """Products that make their input, and attention, of a decoding step."""
    calls = 0
    layouts = (LevelTable(2, 0), BinaryResidual(128, True), GroupedInteger(8, 64, True), VectorCodebook(256, 12, False))
    several = [[random_packed(layout, rows, 1096, "cuda", seed=rows) for rows in (100, 33)] for layout in layouts]
    structured = (random_packed(StructuredBinary(4, 8, 0), rows, 1096, "cuda", seed=rows) for rows in (100, 33))
    several.append([signed_levels(packed, 500) for packed in structured])
    alone = [llm_int8(100, 1104, "dynamic", "int8", "vector"), rounded(("e4m3fn", "e4m3fn"), False, 0, 33, 1104)]
    alone += [rounded(("e4m3fn", "e4m3fn"), True, 0, 100, 1104), weight_only("e4m3fn", 0, 33, 1104)]
    for given in (*several, *([packed.to("cuda")] for packed in alone)):
        weights = [moved(packed) for packed in given]
        columns = weights[0].columns
        states, update, norm = (padded(inputs(1, columns, torch.float16, "cuda")) for _ in range(3))
        total, normal = add_rms_norm(states, update, norm[0], 1e-5)
        found = products_of(Normed(states, update, norm[0], 1e-5), weights)
        if found is None:  # before Hopper
            continue
        assert torch.equal(found[0], total)
        for mine, packed in zip(found[1], weights, strict=True):
            torch.testing.assert_close(mine, packed_linear(normal, packed), rtol=0.02, atol=0.02)
            calls += 1
    if not starts_early(torch.cuda.current_device()):
        return calls, 0.0
    for number, splits in enumerate((2, 4, 1, 8)):
        given, cache, place = attention_case(*CASES[number], torch.float16, "cuda")
        tensors = [padded(item) for item in (*given, place.cosine, place.sine, cache.keys, cache.values)]
        found_out = launch_attend((*tensors, place.position, place.start), 0.1, AttendLaunch(splits))
        assert bool(found_out.isfinite().all())
        calls += 1
    return calls, 0.0


def check_gated(layout: Format) -> tuple[int, float]:
    """Two weights whose products one launch multiplies with each other, in shapes for a decoding step.

    Ragged ones first; then some of which the tensor copy engine can bring the weights, marks being asked for before.
    """
    calls = 0
    for rows, columns in ((100, 1096), (1008, 2048)):
        given = [random_packed(layout, rows, columns, "cuda", seed=seed) for seed in (1, 2)]
        structured = isinstance(layout, StructuredBinary)
        weights = [moved(signed_levels(packed, 500) if structured else packed) for packed in given]
        described = layout_of(weights[0].format, columns)
        assert described is not None
        device, *limits = device_limits(torch.cuda.current_device())
        states, update, norm = (padded(inputs(1, columns, torch.float16, "cuda")) for _ in range(3))
        key, made = step_key(described, (rows, rows), columns, gated=True), Normed(states, update, norm[0], 1e-5)
        parts = products_of(made, weights)
        if parts is None:  # before Hopper
            continue
        for number, size in enumerate(step_sizes(described)):
            shape = step_timings(size)[-1 if columns == 2048 else -(number % 2)]
            placed = place_step(described, (rows, rows), columns, *limits, shape, gated=True) is not None
            if not placed or shape.bulk != (columns == 2048):
                continue
            use_shape(device, key, shape)
            found = products_of(made, weights, gated=True)
            use_shape(device, key, None)
            assert found is not None and torch.equal(found[0], parts[0])
            torch.testing.assert_close(found[1][0], gated(*parts[1]), rtol=0.02, atol=0.02)
            calls += 1
    assert calls > 4 or not starts_early(torch.cuda.current_device())
    return calls, 0.0


if __name__ == "__main__":
    sys.exit(not check(int(sys.argv[1]), int(sys.argv[2])))
