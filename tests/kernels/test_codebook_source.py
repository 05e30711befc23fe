"""The CUDA source of the table product of codebooks, run on a CPU thread by thread against the plain meaning."""

import pytest
import torch

from tests.kernels.emulator.build import COMPILER, built, executed
from tests.kernels.test_cuda_kernels import error_bound, inputs, random_packed
from whit.formats.vector_codebook import VectorCodebook
from whit.kernels.codebook_plan import (
    clusters_at_once,
    codebook_options,
    codebook_source,
    codebook_tiles,
    place_codebook,
)
from whit.kernels.cuda_layout import layout_of

CASES = [
    (VectorCodebook(256, 12, False), (37, 4000), torch.float16, 3),
    (VectorCodebook(256, 8, True), (130, 2200), torch.bfloat16, 2),
    (VectorCodebook(256, 5, False), (21, 1293), torch.float16, 1),
    (VectorCodebook(256, 17, False), (9, 345), torch.bfloat16, 8),
]


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
@pytest.mark.parametrize(("layout", "shape", "dtype", "splits"), CASES, ids=str)
def test_products(layout, shape, dtype, splits, tmp_path):
    rows, columns = shape
    described = layout_of(layout, columns)
    splits = min(splits, codebook_tiles(described))
    launch = place_codebook(described, rows, 200_000, {splits: 8 // splits})
    assert launch.splits * launch.passes >= codebook_tiles(described)
    options = codebook_options(described, launch, dtype == torch.bfloat16, False)
    program = built("codebook_product", codebook_source(), options, tmp_path)
    packed = random_packed(layout, rows, columns)
    x, bias = inputs(1, columns, dtype, "cpu"), torch.linspace(-1, 1, rows).to(dtype)
    tensors = [packed.tensors[name] for name in described.names if name]
    numbers = (launch.passes, launch.rows_each, launch.grid, launch.shared)
    results = [
        executed(program, described, (*numbers, descending, launch.splits), tensors, shape, x, bias)
        for descending in (0, 1)
    ]
    weight = packed.unpack().double()
    expected = x.double() @ weight.T + bias.double()
    size = x.double().abs() @ weight.abs().T
    stated = (2.0**-11 if dtype == torch.float16 else 2.0**-8) * expected.abs() + 2.0**-18 * size + 1e-7
    assert (stated <= error_bound(x, weight, expected, "table")).all()
    assert ((results[0].double() - expected).abs() <= stated).all()
    assert torch.equal(*results)


@pytest.mark.parametrize("width", [4, 8, 12, 32])
@pytest.mark.parametrize("shape", [(16, 64), (4096, 4096), (28672, 8192), (8192, 28672), (128256, 4096)])
def test_every_launch_covers_the_weight(width, shape):
    rows, columns = shape
    described = layout_of(VectorCodebook(256, width, False), columns)
    for room, memory in ((clusters_at_once(132, True), 232448), (clusters_at_once(108, False), 166912)):
        launch = place_codebook(described, rows, memory, room)
        assert launch.shared <= memory and launch.clusters <= room[launch.splits] and launch.rows_each % 8 == 0
        assert launch.clusters * launch.rows_each >= rows > (launch.clusters - 1) * launch.rows_each
        assert launch.splits * launch.passes >= codebook_tiles(described)


def test_clusters_of_an_h200_are_those_found_to_run_at_once():
    room = clusters_at_once(132, True)
    assert (room[1], room[2], room[3], room[4], room[8]) == (132, 66, 39, 30, 15)
    assert clusters_at_once(108, False) == {1: 108}
