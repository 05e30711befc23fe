"""The CUDA sources of N:M sparse binary weights, run on a CPU thread by thread against the plain meaning."""

import pytest
import torch

from tests.kernels.emulator.build import COMPILER, built, executed
from tests.kernels.test_cuda_kernels import error_bound, inputs, random_packed
from whit.formats.structured_binary import StructuredBinary
from whit.kernels.cuda_layout import layout_of
from whit.kernels.structured_plan import (
    structured_launch,
    structured_options,
    structured_source,
    unit_of,
)

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs g++")
PRODUCTS = [
    (StructuredBinary(4, 8, 0), (35, 1600), 1, torch.float16, False),
    (StructuredBinary(4, 8, 0), (100, 2600), 16, torch.float16, True),
    (StructuredBinary(4, 8, 0, means=True), (16, 640), 7, torch.bfloat16, False),
    (StructuredBinary(5, 8, 0), (20, 1320), 1, torch.bfloat16, True),
    (StructuredBinary(6, 8, 0, regions=2), (17, 400), 11, torch.float16, False),
    (StructuredBinary(2, 8, 0, regions=1), (16, 1400), 1, torch.float16, False),
    (StructuredBinary(7, 8, 0), (16, 96), 3, torch.float16, False),
]


@needs_compiler
@pytest.mark.parametrize(("layout", "shape", "tokens", "dtype", "split"), PRODUCTS, ids=str)
def test_products(layout, shape, tokens, dtype, split, tmp_path):
    rows, columns = shape
    described = layout_of(layout, columns)
    unit = unit_of(described)
    parts = unit.parts(columns)
    launch = structured_launch(described, rows, columns, tokens, 180_000, {1: 2, parts: 2}, split=split)
    assert launch.splits == (parts if split else 1) and (not split or parts > 1)
    source = structured_source(described, "structured_product")
    options = structured_options(
        described, unit, launch.threads, launch.tokens, dtype == torch.bfloat16, False, launch.splits
    )
    program = built("structured_product", source, options, tmp_path)
    packed = random_packed(layout, rows, columns)
    x, bias = inputs(tokens, columns, dtype, "cpu"), torch.linspace(-1, 1, rows).to(dtype)
    tensors = [packed.tensors[name] for name in described.names if name]
    results = [
        executed(
            program,
            described,
            (launch.parts, launch.tiles, launch.grid, launch.shared, descending, launch.splits),
            tensors,
            shape,
            x,
            bias,
        )
        for descending in (0, 1)
    ]
    weight = packed.unpack().double()
    expected = x.double() @ weight.T + bias.double()
    assert ((results[0].double() - expected).abs() <= error_bound(x, weight, expected, "structured")).all()
    assert torch.equal(*results)


def test_every_word_can_be_parted():
    for n in range(1, 8):
        for columns in (*range(8, 400, 8), 4096, 11008, 28672):
            described = layout_of(StructuredBinary(n, 8, 0), columns)
            unit = unit_of(described)
            if unit is None:
                continue
            assert unit.groups % described.numbers[2] == 0 and unit.groups * n % 5 == 0
            assert "places_of_pattern" in structured_source(described, "structured_product")
