"""Embeddings looked up by a kernel give the rows of the plain meaning, bit for bit."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter import assert_interpreted_tests_pass, needs_interpreter
from whit.formats import Packed
from whit.formats.grouped_integer import GroupedInteger
from whit.kernels import packed_embedding
from whit.kernels.launching import interpreted


def weight(bits: int, group: int, rows: int, columns: int) -> Packed:
    generator = torch.Generator().manual_seed(0)
    layout = GroupedInteger(bits, group, True)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    return layout.pack(codes, torch.rand(rows, layout.groups(columns), generator=generator))


@needs_interpreter
@pytest.mark.parametrize(("bits", "group", "columns"), [(8, 64, 1100), (8, 0, 30), (4, 24, 50), (2, 8, 20)])
def test_interpreted_look_up(bits: int, group: int, columns: int) -> None:
    packed = weight(bits, group, 9, columns)
    for ids in (torch.tensor(4), torch.tensor([[8, 0], [3, 3]]), torch.zeros(0, dtype=torch.long)):
        assert torch.equal(packed_embedding(ids, packed, torch.float16), packed.unpack()[ids].half())


@needs_interpreter
def test_interpreted_look_up_of_what_is_not_there() -> None:
    out = packed_embedding(torch.tensor([9, 1, -1]), weight(8, 16, 9, 32), torch.float16)
    assert out.isnan().all(1).tolist() == [True, False, True]


@pytest.mark.skipif(interpreted(), reason="this is the interpreter's process")
def test_look_up_in_the_interpreter() -> None:
    assert_interpreted_tests_pass(__file__)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_look_up_on_a_gpu(dtype: torch.dtype) -> None:
    for bits, group, columns in [(8, 64, 4096), (8, 0, 30), (4, 24, 50), (2, 8, 1025)]:
        packed = weight(bits, group, 300, columns)
        plain, there = packed.unpack().to(dtype), packed.to("cuda")
        for count in (1, 16, 500):
            ids = torch.randint(0, 300, (count, 2), generator=torch.Generator().manual_seed(1))
            assert torch.equal(packed_embedding(ids.cuda(), there, dtype).cpu(), plain[ids])
    graph, ids = torch.cuda.CUDAGraph(), torch.tensor([5], device="cuda")
    with torch.cuda.graph(graph):
        out = packed_embedding(ids, there, dtype)
    ids.fill_(7)
    graph.replay()
    assert torch.equal(out.cpu(), plain[[7]])
