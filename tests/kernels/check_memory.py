"""Every product of packed weights once on a GPU, for a memory checker; not a test by itself.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.kernels.check_memory 0 16

calls every sixteenth of the layouts. Every tensor has an allocation of its own, of whole 16 bytes: kernels read
aligned words of up to 16 bytes, and of the last one only what lies within the tensor counts.
"""

from __future__ import annotations

import sys

import torch

from tests.kernels.test_attend_cuda import CASES
from tests.kernels.test_attend_cuda import case as attention_case
from tests.kernels.test_cuda_kernels import FORMATS, OTHERS, error_bound, inputs, random_packed, unit_columns
from tests.kernels.test_embedding import weight as embedding_weight
from whit.formats.base import Packed
from whit.formats.binary_residual import BinaryResidual
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.level_table import LevelTable
from whit.formats.signed_levels import signed_levels
from whit.formats.structured_binary import StructuredBinary
from whit.formats.vector_codebook import VectorCodebook
from whit.kernels import explain, packed_embedding, packed_linear
from whit.kernels.cuda_attend import AttendLaunch, launch_attend
from whit.kernels.cuda_inputs import Normed, products_of
from whit.kernels.cuda_ops import starts_early
from whit.kernels.cuda_wide_plan import MANY
from whit.kernels.decode_ops import add_rms_norm
from whit.kernels.linear import choose_several

SHAPES = [(33, 200), (100, 1088), (130, 2176)]
COUNTS = [1, 2, 9, 33, 150]


def padded(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor at the start of an allocation of whole 16 bytes."""
    size = tensor.numel() * tensor.element_size()
    room = torch.zeros(-(-size // 16) * 16, dtype=torch.uint8, device=tensor.device)
    return room[:size].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def moved(packed: Packed) -> Packed:
    """The weight with every tensor in an allocation of its own."""
    tensors = {name: padded(tensor) for name, tensor in packed.tensors.items()}
    return Packed(packed.format, packed.rows, packed.columns, tensors)


def check(part: int, parts: int) -> bool:
    """Call the products of every `parts`-th layout, from number `part` on; whether all results are within bounds."""
    calls, worst = 0, 0.0
    for layout in [*FORMATS, *OTHERS][part::parts]:
        for rows, columns in SHAPES:
            packed = moved(random_packed(layout, rows, columns, "cuda"))
            weight = packed.unpack().double()
            for tokens in COUNTS:
                x = padded(inputs(tokens, columns, torch.float16, "cuda"))
                bias = padded(torch.randn(rows, device="cuda").half()) if tokens % 2 else None
                expected = x.double() @ weight.T + (0 if bias is None else bias.double())
                bound = error_bound(x, weight, expected, explain(x, packed), unit_columns(layout, columns))
                actual = packed_linear(x, packed, bias).double()
                excess = ((actual - expected).abs() / bound).nan_to_num(nan=1e9).max().item()
                if excess > 1:
                    print(f"{excess:.3g} times the bound: {layout}, {rows} x {columns}, {tokens} vectors", flush=True)
                calls, worst = calls + 1, max(worst, excess)
    if part == 0:
        calls += check_others()
    print(f"{calls} calls, at most {worst:.3g} of the bound", flush=True)
    return worst <= 1


def check_others() -> int:
    """Several weights in one launch, and embeddings; how many calls were right."""
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
    for bits, group, columns in [(8, 64, 1100), (8, 0, 30), (4, 24, 50), (2, 8, 1025)]:
        packed = moved(embedding_weight(bits, group, 300, columns).to("cuda"))
        ids = torch.randint(0, 300, (50,), device="cuda")
        assert torch.equal(packed_embedding(ids, packed, torch.float16), packed.unpack()[ids].half())
    return 2 + 4 + check_step()


def check_step() -> int:
    """Products that make their input, and attention, of a decoding step; how many calls were right."""
    calls = 0
    for layout in (
        LevelTable(2, 0),
        BinaryResidual(128, True),
        GroupedInteger(8, 64, True),
        VectorCodebook(256, 12, False),
        StructuredBinary(4, 8, 0),
    ):
        weights = [random_packed(layout, rows, 1096, "cuda", seed=rows) for rows in (100, 33)]
        if isinstance(layout, StructuredBinary):
            weights = [signed_levels(packed, 500) for packed in weights]
        weights = [moved(packed) for packed in weights]
        states, update, norm = (padded(inputs(1, 1096, torch.float16, "cuda")) for _ in range(3))
        total, normal = add_rms_norm(states, update, norm[0], 1e-5)
        found = products_of(Normed(states, update, norm[0], 1e-5), weights)
        if found is None:  # before Hopper
            continue
        assert torch.equal(found[0], total)
        for mine, packed in zip(found[1], weights, strict=True):
            torch.testing.assert_close(mine, packed_linear(normal, packed), rtol=0.02, atol=0.02)
            calls += 1
    if not starts_early(torch.cuda.current_device()):
        return calls
    for number, splits in enumerate((2, 4, 1, 8)):
        given, cache, place = attention_case(*CASES[number], torch.float16, "cuda")
        tensors = [padded(item) for item in (*given, place.cosine, place.sine, cache.keys, cache.values)]
        found_out = launch_attend((*tensors, place.position, place.start), 0.1, AttendLaunch(splits))
        assert bool(found_out.isfinite().all())
        calls += 1
    return calls


if __name__ == "__main__":
    sys.exit(not check(int(sys.argv[1]), int(sys.argv[2])))
