import itertools
import json

import pytest
import torch

from whit.errors import ModelError
from whit.formats import format_from_json
from whit.formats.dense import Dense
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.nm_index import index_bytes
from whit.formats.sparse_bitmask import SparseBitmask
from whit.formats.sparse_nm import SparseNM
from whit.methods import LayerStatistics, make_method


def nm_mask(n, m, rows=5, columns=48, seed=0):
    scores = torch.rand(rows, columns // m, m, generator=torch.Generator().manual_seed(seed))
    return (scores.argsort(-1).argsort(-1) < n).reshape(rows, columns)


def masked(kept, seed=1):
    """Float16-exact values where kept, among them a zero: a kept weight may be zero."""
    weight = torch.randn(kept.shape, generator=torch.Generator().manual_seed(seed)).half().float() * kept
    weight[0, int(kept[0].nonzero()[0])] = 0
    return weight


def pack_dense(layout, weight, kept):
    shape = (len(weight), -1) if isinstance(layout, SparseNM) or layout.by_row else (1, -1)
    return layout.pack(kept, layout.values.pack(weight[kept].reshape(shape)))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (2, 8), (8, 16), (12, 24)])
def test_nm_unpacks_exactly(n, m):
    kept = nm_mask(n, m)
    weight = masked(kept)
    packed = pack_dense(SparseNM(n, m, Dense("float16")), weight, kept)
    assert torch.equal(packed.unpack(), weight)
    index = torch.tensor([4, 0, 0])
    assert torch.equal(packed.format.unpack_rows(packed.tensors, 5, 48, index), weight[index])


def test_every_pattern_of_two_of_four_survives():
    patterns = torch.zeros(6, 4, dtype=torch.bool)
    for row, places in enumerate(itertools.combinations(range(4), 2)):
        patterns[row, list(places)] = True
    kept = patterns[torch.cartesian_prod(*[torch.arange(6)] * 3)].reshape(216, 12)
    packed = pack_dense(SparseNM(2, 4, Dense("float16")), kept.float(), kept)
    assert torch.equal(packed.unpack(), kept.float())
    assert packed.tensors["index"].shape == (216, 1), "three groups in a byte"


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("columns", [1, 7, 48, 50])
def test_bitmask_unpacks_exactly(by_row, columns):
    generator = torch.Generator().manual_seed(columns)
    ranks = torch.rand(5, columns, generator=generator).argsort(-1).argsort(-1)
    count = (columns + 1) // 2
    kept = ranks < count if by_row else ranks <= torch.tensor([[0], [0], [columns], [2], [1]])
    weight = masked(kept)
    layout = SparseBitmask(count if by_row else int(kept.sum()), by_row, Dense("float16"))
    packed = pack_dense(layout, weight, kept)
    assert torch.equal(packed.unpack(), weight)
    index = torch.tensor([4, 2, 2, 0])
    assert torch.equal(layout.unpack_rows(packed.tensors, 5, columns, index), weight[index])
    assert layout.unpack_rows(packed.tensors, 5, columns, index[:0]).shape == (0, columns)


@pytest.mark.parametrize("n", [1, 2])
def test_kept_weights_in_another_format(n):
    kept = nm_mask(n, 4)
    values = torch.randn(5, 12 * n, generator=torch.Generator().manual_seed(0))
    inner = make_method("rtn", {"bits": 3, "group_size": 8}).compress(values, LayerStatistics(12 * n)).packed
    packed = SparseNM(n, 4, inner.format).pack(kept, inner)
    expected = torch.zeros(5, 48)
    expected[kept] = inner.unpack().flatten()
    assert torch.equal(packed.unpack(), expected)
    index = torch.tensor([3, 1])
    assert torch.equal(packed.format.unpack_rows(packed.tensors, 5, 48, index), expected[index])


@pytest.mark.parametrize(
    ("layout", "stored"),
    [
        # 10 rows of 96: 24 groups of four, three in a byte; half of the values at 2 bytes.
        (SparseNM(2, 4, Dense("bfloat16")), 10 * (8 + 48 * 2)),
        (SparseNM(2, 4, GroupedInteger(4, 16, True)), 10 * (8 + 24 + 3 * 2)),
        (SparseBitmask(48, True, Dense("float16")), 10 * (12 + 48 * 2)),
        (SparseBitmask(333, False, Dense("float32")), 10 * 12 + 333 * 4),
    ],
)
def test_stored_bytes_are_counted(layout, stored):
    assert layout.bytes(10, 96) == stored


def test_nm_index_is_smaller_than_a_bitmap_and_no_smaller_than_the_entropy():
    layout = SparseNM(2, 4, Dense("float16"))
    bits = 8 * index_bytes(4096, 2, 4) / 4096
    assert 0.646 < bits < 0.67
    assert layout.bytes(4096, 4096) * 8 / 4096**2 == pytest.approx(8 + bits)


@pytest.mark.parametrize(
    "layout",
    [
        Dense("bfloat16"),
        SparseNM(4, 8, Dense("float16")),
        SparseNM(2, 4, GroupedInteger(4, 128, False)),
        SparseBitmask(7, True, Dense("float32")),
    ],
)
def test_json_brings_the_format_back(layout):
    assert format_from_json(json.loads(json.dumps(layout.to_json()))) == layout


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "sparse-nm", "n": 5, "m": 4, "values": {"format": "dense", "dtype": "float16"}}, "got 5:4"),
        ({"format": "sparse-nm", "n": 0, "m": 4, "values": {"format": "dense", "dtype": "float16"}}, "got 0:4"),
        ({"format": "sparse-bitmask", "kept": 0, "by_row": True, "values": {}}, "not known|at least one"),
        ({"format": "dense", "dtype": "int8"}, "must be one of float16, bfloat16, float32"),
    ],
)
def test_fields_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(ModelError, match=message):
        format_from_json(fields)


def test_masks_that_do_not_fit_the_format_are_refused():
    kept = nm_mask(2, 4)
    values = Dense("float16").pack(torch.zeros(5, 24))
    with pytest.raises(ValueError, match="does not keep 1 of"):
        SparseNM(1, 4, Dense("float16")).pack(kept, values)
    with pytest.raises(ValueError, match="does not keep 23 weights of each row"):
        SparseBitmask(23, True, Dense("float16")).pack(kept, values)


def test_a_value_beyond_the_dtype_is_refused():
    with pytest.raises(ModelError, match="7e\\+04 is beyond float16"):
        Dense("float16").pack(torch.tensor([[7e4]]))
    assert float(Dense("bfloat16").pack(torch.tensor([[65536.0]])).unpack()) == 65536
