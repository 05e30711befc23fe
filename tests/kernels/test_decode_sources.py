"""The CUDA sources that decode a weight, run on a CPU thread by thread: bit for bit the plain meaning, rounded once."""

import pytest
import torch

from tests.kernels.emulator.build import COMPILER, built, executed
from tests.kernels.test_cuda_kernels import name_of, random_packed
from whit.formats.binary_residual import BinaryResidual
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.level_table import LevelTable
from whit.formats.structured_binary import StructuredBinary
from whit.formats.vector_codebook import VectorCodebook
from whit.kernels.cuda_decode import (
    CODEBOOK,
    CODEWORDS,
    GROUPS,
    OCTETS,
    PATTERNS,
    DecodeShape,
    decode_grid,
    decode_options,
    decode_shared,
    decode_source,
    decode_way,
)
from whit.kernels.cuda_layout import layout_of

CASES = [
    (BinaryResidual(64, True), 1104, OCTETS),
    (BinaryResidual(16, False), 112, OCTETS),
    (BinaryResidual(0, True), 2064, OCTETS),
    (LevelTable(1, 0), 100, OCTETS),
    (LevelTable(2, 384), 1100, OCTETS),
    (LevelTable(3, 32), 100, OCTETS),
    (GroupedInteger(2, 64, False), 1100, OCTETS),
    (GroupedInteger(3, 64, False), 1100, OCTETS),
    (GroupedInteger(3, 0, True), 1003, OCTETS),
    (GroupedInteger(4, 64, False), 1100, OCTETS),
    (GroupedInteger(5, 8, False), 100, OCTETS),
    (GroupedInteger(8, 128, True), 300, OCTETS),
    (VectorCodebook(256, 12, False), 1100, CODEWORDS),
    (VectorCodebook(256, 8, True), 100, CODEWORDS),
    (VectorCodebook(64, 5, True), 100, CODEBOOK),
    (VectorCodebook(8, 3, False), 100, CODEBOOK),
    *((StructuredBinary(n, 8, 0, regions=1 + n % 3, means=n == 5), 1608, PATTERNS) for n in range(1, 8)),
    (StructuredBinary(4, 8, 0), 2056, PATTERNS),
    (StructuredBinary(4, 8, 72, means=True), 1160, PATTERNS),
    (StructuredBinary(4, 8, 24, means=True), 160, GROUPS),
    (StructuredBinary(4, 8, 0), 100, GROUPS),
    (StructuredBinary(1, 4, 0, regions=1), 100, GROUPS),
    (StructuredBinary(1, 1, 64, means=True), 100, GROUPS),
    (StructuredBinary(7, 16, 24), 100, GROUPS),
]


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
@pytest.mark.parametrize(
    ("layout", "columns", "way"), CASES, ids=lambda value: name_of(value) if hasattr(value, "to_json") else str(value)
)
def test_decoded_weight(layout, columns, way, tmp_path):
    """Both types, the last rows of an item missing, every block with several items, threads in both orders."""
    described = layout_of(layout, columns)
    assert decode_way(described, columns) == way
    packed = random_packed(layout, rows := 13, columns)
    tensors = [packed.tensors[name] for name in described.names if name]
    general = way in (CODEBOOK, GROUPS)
    for dtype, shape in ((torch.float16, DecodeShape(64, 4, 4)), (torch.bfloat16, DecodeShape(128, 8, 2))):
        shape = DecodeShape() if general else shape
        options = decode_options(described, dtype == torch.bfloat16, shape=shape)
        program = built("decode", decode_source(described, columns), options, tmp_path)
        results = [
            executed(
                program,
                described,
                (
                    0,
                    0,
                    2 * -(-columns // (8 * shape.threads)),
                    max(16, decode_shared(described, columns, shape)),
                    descending,
                    1,
                ),
                tensors,
                (rows, columns),
                torch.empty(0, columns, dtype=dtype),
                None,
            )
            for descending in (0, 1)
        ]
        assert torch.equal(results[0], packed.unpack().to(dtype)) and torch.equal(*results)


@pytest.mark.parametrize("rows", [1, 4096, 11008, 22016])
@pytest.mark.parametrize("columns", [64, 4096, 11008, 4_000_000])
def test_blocks_of_a_launch_have_as_many_items_each(rows, columns):
    layout = layout_of(BinaryResidual(128, True), columns)
    for shape in (DecodeShape(), DecodeShape(128, 8, 6)):
        stripes, blocks = -(-columns // (8 * shape.threads)), -(-rows // shape.rows)
        grid = decode_grid(layout, rows, columns, 132, shape)
        assert grid % stripes == 0 and grid <= max(stripes, 132 * shape.resident)
        abreast, most = grid // stripes, max(1, 132 * shape.resident // stripes)
        assert 0 < abreast <= blocks and -(-blocks // abreast) == -(-blocks // most)
