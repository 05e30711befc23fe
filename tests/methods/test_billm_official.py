"""The released BiLLM, checked against values its code computed, closed forms and algebra done by hand."""

import math

import pytest
import torch
from torch import Tensor

from whit.formats.bits import unpack_codes
from whit.methods.billm_official import (
    block_masks,
    masks_at,
    official_billm,
    push_error,
    residual_binarise,
    search_salient_columns,
    search_split,
    split_candidates,
)
from whit.methods.billm_screening import explained, promising_counts, promising_splits
from whit.methods.statistics import LayerStatistics


def upper_factor(moment: Tensor) -> Tensor:
    return torch.linalg.cholesky(torch.linalg.inv(moment.double()), upper=True).float()


def tiny_layer() -> tuple[Tensor, Tensor]:
    """A weight (8, 128) and its H made of whole-number arithmetic: the same on every machine."""
    i = torch.arange(8 * 128).reshape(8, 128)
    weight = (((i * i * 31 + i * 17) % 1009) + ((i * i * 7 + i * 389) % 997) + ((i * 613) % 991) - 1500).float() / 16384
    t = torch.arange(96 * 128).reshape(96, 128)
    inputs = (((t * t * 13 + t * 71) % 503).float() - 251) / 256
    inputs[:, 1:] += inputs[:, :-1] / 2
    inputs[:, ::16] *= 4
    return weight, 2 * inputs.T @ inputs / 4


# What the released code (run on CPU with its CUDA calls neutralised) makes of `tiny_layer` with blocks of 64.
RELEASED = {
    "hessian": {
        "salient": "01000000010001040100010001000100",
        "sparse": "00000100042500400800046004b800c000488000000120b0800030424280acc0004008400800488800000200840a0000"
        "00000000000050408000002042a2001800000110800000500041084100407800000000000005d000000030c18c620025"
        "0000018080f02000000000040010d035000041040848080920010014004a3257",
        "sum": 0.3307760935276747,
        "magnitude": 26.467621568590403,
        "column": [
            -0.02197265625,
            -0.021436477079987526,
            -0.026641845703125,
            0.01894928328692913,
            -0.021653760224580765,
            0.024974919855594635,
            0.01839975267648697,
            -0.01827274262905121,
        ],
        "error": 0.7601922750473022,
    },
    "magnitude": {
        "salient": "e8e86ecc846d404c2d4010404040a012",
        "sparse": "030401001a000322801a8e3a289450c41002800128102ab08013c104023200e0040000206b820fb0101c029004124a28"
        "101100001210118280804019232f198c14068132530081904001a60600800e050214002051029801121d0c953d8b4025"
        "10070133219022021020232c042255a5111281322b102a0180ad6d3c84181360",
        "sum": -0.2876612013205886,
        "magnitude": 25.120318985544145,
        "column": [
            -0.009610993787646294,
            -0.03515024483203888,
            -0.05215282738208771,
            0.01836535334587097,
            -0.035116858780384064,
            0.018838243559002876,
            0.011577997356653214,
            -0.01116943359375,
        ],
        "error": 0.7089841365814209,
    },
}


@pytest.mark.parametrize("metric", ["hessian", "magnitude"])
def test_it_reproduces_the_released_code(metric: str) -> None:
    weight, moment = tiny_layer()
    upper = LayerStatistics(128, 96, moment).inverse_factor(0.01).upper
    found = official_billm(weight, upper, block_size=64, salient_metric=metric)
    expected = RELEASED[metric]
    marks = torch.tensor(list(bytes.fromhex(str(expected["salient"]))), dtype=torch.uint8)
    plane = torch.tensor(list(bytes.fromhex(str(expected["sparse"]))), dtype=torch.uint8).reshape(8, 16)
    assert torch.equal(found.salient, unpack_codes(marks, 1, 128).bool())
    assert torch.equal(found.sparse, unpack_codes(plane, 1, 128).bool())
    assert found.quantised[:, 3].tolist() == pytest.approx(expected["column"], rel=1e-4)
    assert float(found.quantised.double().sum()) == pytest.approx(expected["sum"], rel=1e-4)
    assert float(found.quantised.double().abs().sum()) == pytest.approx(expected["magnitude"], rel=1e-5)
    assert found.error == pytest.approx(expected["error"], rel=1e-4)


@pytest.mark.parametrize(
    ("row", "mask", "order", "expected"),
    [
        ([1, 2, 3, 4], [1, 1, 1, 1], 1, [1.5, 1.5, 3.5, 3.5]),
        ([1, 2, 3, 4], [1, 1, 1, 1], 2, [1, 2, 3, 4]),
        ([-3, -1, 2, 6], [1, 1, 1, 1], 1, [-2, -2, 4, 4]),
        ([-3, -1, 2, 6], [1, 1, 1, 1], 2, [-3.5, -0.5, 2.5, 5.5]),
        ([1, -1, 5, -7], [1, 1, 0, 1], 1, [0.7778, 0.7778, 0, -5.4444]),
        ([1, -1, 5, -7], [1, 1, 0, 1], 2, [0.5802, -1.0988, 0, -7.3210]),
        ([0, 0, 2, 4], [1, 1, 1, 1], 1, [0, 0, 3, 3]),
        ([2, 2, 2, 2], [1, 1, 1, 1], 1, [2, 2, 2, 2]),
        ([5, 6, 7, 8], [0, 0, 0, 0], 2, [0, 0, 0, 0]),
    ],
)
def test_residual_binariser_values(row: list[float], mask: list[int], order: int, expected: list[float]) -> None:
    got, orders = residual_binarise(torch.tensor([row], dtype=torch.float32), torch.tensor([mask]).bool(), order)
    assert got[0].tolist() == pytest.approx(expected, abs=6e-5)
    assert len(orders) == order


def test_a_second_order_never_fits_worse() -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 100.0):
        x = torch.randn(64, 40, generator=generator).exp() * scale
        mask = torch.rand(64, 40, generator=generator) < 0.6
        errors = [((x * mask - residual_binarise(x, mask, k)[0]) ** 2).sum(1) for k in (1, 2)]
        assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all())


def test_gaussian_weights_reach_the_closed_forms() -> None:
    x = torch.randn(20, 50_000, generator=torch.Generator().manual_seed(1))
    everything = torch.ones_like(x, dtype=torch.bool)
    relative = [float(((x - residual_binarise(x, everything, k)[0]) ** 2).mean()) for k in (1, 2)]
    one_sign = 1 - 2 / math.pi
    assert relative[0] == pytest.approx(one_sign, abs=2e-3)
    assert relative[1] == pytest.approx(one_sign - 0.48262**2, abs=2e-3)
    masks = masks_at(x, torch.zeros(50_000, dtype=torch.bool), torch.tensor(0.982))
    split = residual_binarise(x, masks.concentrated, 1)[0] + residual_binarise(x, masks.sparse, 1)[0]
    assert float(((x - split) ** 2).mean()) == pytest.approx(0.11748, abs=1e-3)
    assert float(masks.concentrated.float().mean()) == pytest.approx(0.674, abs=2e-3)


@pytest.mark.parametrize(("split", "squared_error"), [(0.75, 12.5), (1.5, 0.25), (4.5, 6.052)])
def test_split_objective_with_means(split: float, squared_error: float) -> None:
    row = torch.tensor([[-4, -1, -0.5, 0.5, 1, 5]])
    masks = masks_at(row, torch.zeros(6, dtype=torch.bool), torch.tensor(split))
    fit = residual_binarise(row, masks.concentrated, 1)[0] + residual_binarise(row, masks.sparse, 1)[0]
    assert float(((row - fit) ** 2).sum()) == pytest.approx(squared_error, abs=1e-4)


def test_the_split_search_ends_at_the_last_quantiles_on_gaussian_saliency() -> None:
    # The signature of searching on S = w^2; searched on the weights, a third of them (0.33) would be sparse.
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    masks = block_masks(weight, torch.ones(128), "hessian")
    assert 0.09 < float(masks.sparse.float().mean()) < 0.15


@pytest.mark.parametrize("columns", [128, 40, 2, 1])
@pytest.mark.parametrize("metric", ["hessian", "magnitude"])
def test_masks_partition_every_block_however_narrow(columns: int, metric: str) -> None:
    weight = torch.randn(16, columns, generator=torch.Generator().manual_seed(columns))
    masks = block_masks(weight, torch.rand(columns) + 0.5, metric)
    total = masks.concentrated.int() + masks.sparse.int() + masks.salient.int()
    assert bool((total == 1).all())
    assert int(masks.salient[0].sum()) <= min(49, max(columns - 1, 0))
    assert torch.equal(masks.salient, masks.salient[:1].expand_as(masks.salient))


def test_searches_agree_with_trying_every_candidate() -> None:
    saliency = torch.randn(12, 20, generator=torch.Generator().manual_seed(3)) ** 2
    found = search_salient_columns(saliency, limit=50)
    ranked = saliency.sum(0).argsort(descending=True)
    errors = []
    for count in range(1, 20):
        mask = torch.zeros(20, dtype=torch.bool)
        mask[ranked[:count]] = True
        wide = mask.expand_as(saliency)
        fit = residual_binarise(saliency, wide, 2)[0] + residual_binarise(saliency, ~wide, 2)[0]
        errors.append(float(((saliency - fit) ** 2).mean()))
    assert int(found.sum()) == 1 + min(range(19), key=errors.__getitem__)
    assert set(torch.nonzero(found).flatten().tolist()) == set(ranked[: int(found.sum())].tolist())
    split = search_split(saliency, found)
    flat = torch.where(found, 0, saliency).flatten().double()
    shares = torch.quantile(flat, torch.linspace(0.1, 0.9, 81).double())
    assert float((shares - split).abs().min()) == pytest.approx(0, abs=1e-5)


def test_a_diagonal_h_makes_saliency_plain_and_compensation_idle() -> None:
    generator = torch.Generator().manual_seed(4)
    weight, variances = torch.randn(8, 96, generator=generator), torch.rand(96, generator=generator) + 0.5
    upper = upper_factor(torch.diag(variances))
    assert torch.allclose(weight**2 / torch.diagonal(upper) ** 2, weight**2 * variances, rtol=1e-5)
    on, off = (official_billm(weight, upper, block_size=32, compensate=flag) for flag in (True, False))
    assert torch.equal(on.quantised, off.quantised)


def test_overwhelming_damping_equals_no_compensation() -> None:
    generator = torch.Generator().manual_seed(5)
    weight, inputs = torch.randn(16, 96, generator=generator), torch.randn(300, 96, generator=generator)
    upper = upper_factor(inputs.T @ inputs + 1e9 * torch.eye(96))
    on, off = (official_billm(weight, upper, block_size=32, compensate=flag) for flag in (True, False))
    assert torch.equal(on.sparse, off.sparse)
    assert torch.allclose(on.quantised, off.quantised, atol=1e-4)


def test_two_inputs_share_an_error_as_algebra_says() -> None:
    upper = upper_factor(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    current, error = torch.tensor([[0.0, 3.0]]), 0.25
    push_error(current, torch.tensor([[error]]) / upper[0, 0], upper, 0, 1)
    assert float(current[0, 1]) == pytest.approx(3 + error / 2)


def test_the_block_push_is_diagonal_and_not_optimal() -> None:
    moment = torch.eye(3) + 1
    upper = upper_factor(moment)
    expected = torch.tensor([[0.866025, -0.288675, -0.288675], [0, 0.816497, -0.408248], [0, 0, 0.707107]])
    assert torch.allclose(upper, expected, atol=1e-5)
    errors = torch.ones(1, 2)
    current = torch.zeros(1, 3)
    push_error(current, errors / torch.diagonal(upper)[:2], upper, 0, 2)
    assert float(current[0, 2]) == pytest.approx(0.83333, abs=1e-4)
    exact = torch.linalg.solve_triangular(upper[:2, :2], errors, upper=True, left=False) @ upper[:2, 2:]
    assert -float(exact) == pytest.approx(1.0, abs=1e-5)

    def quadratic(update: float) -> float:
        delta = torch.tensor([1.0, 1.0, -update])
        return float(delta @ moment @ delta)

    assert [quadratic(u) for u in (0, 0.83333, 1)] == pytest.approx([6.0, 4.0556, 4.0], abs=1e-3)


def test_permuting_rows_permutes_the_result() -> None:
    weight, moment = tiny_layer()
    upper = LayerStatistics(128, 96, moment).inverse_factor(0.01).upper
    order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    straight, permuted = official_billm(weight, upper), official_billm(weight[order], upper)
    assert torch.equal(straight.salient, permuted.salient)
    assert torch.allclose(straight.quantised[order], permuted.quantised, atol=1e-6)


def test_few_distinct_values_per_row_and_block() -> None:
    weight, moment = tiny_layer()
    found = official_billm(weight, LayerStatistics(128, 96, moment).inverse_factor(0.01).upper, block_size=64)
    for start in (0, 64):
        span = slice(start, start + 64)
        for row in range(8):
            values, sparse, salient = found.quantised[row, span], found.sparse[row, span], found.salient[span]
            assert len(values[sparse].unique()) <= 2
            assert len(values[~sparse & ~salient].unique()) <= 2
            assert len(values[salient].unique()) <= 4


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("skewed", [True, False])
def test_the_screening_estimate_is_the_binariser_s_error(order: int, skewed: bool) -> None:
    values = torch.randn(30, 40, generator=torch.Generator().manual_seed(6))
    values = values**2 if skewed else values
    members = torch.arange(40) < 15
    fit, _ = residual_binarise(values, members.expand_as(values), order)
    chosen = values[:, members].double()

    def below(threshold: Tensor) -> Tensor:
        smaller = chosen < threshold.unsqueeze(1)
        return torch.stack([smaller.double().sum(1), (chosen * smaller).sum(1)])

    whole = torch.stack([torch.full((30,), 15.0).double(), chosen.sum(1)])
    error = chosen.square().sum(1) - explained(whole, below, order)
    assert torch.allclose(error, (values[:, members] - fit[:, members]).double().square().sum(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("skewed", [True, False])
def test_screening_keeps_the_winner_and_drops_most(skewed: bool) -> None:
    for seed in range(5):
        values = torch.randn(24, 64, generator=torch.Generator().manual_seed(seed))
        values = values**2 if skewed else values
        ranked = values.abs().sum(0).argsort(descending=True)[:50]
        everywhere = torch.ones_like(values, dtype=torch.bool)
        errors = []
        for count in range(1, 50):
            mask = torch.isin(torch.arange(64), ranked[:count]) & everywhere
            fit = residual_binarise(values, mask, 2)[0] + residual_binarise(values, ~mask, 2)[0]
            errors.append(float(((values - fit) ** 2).mean()))
        kept = promising_counts(values, ranked)
        assert 1 + min(range(49), key=errors.__getitem__) in kept
        assert len(kept) < 10
        salient = torch.zeros(64, dtype=torch.bool)
        salient[ranked[:3]] = True
        splits = split_candidates((values * ~salient).abs())
        errors = []
        for split in splits:
            masks = masks_at(values, salient, split)
            fit = sum((residual_binarise(values, m, 1)[0] for m in (masks.concentrated, masks.sparse)), 0 * values)
            errors.append(float(((values - fit - residual_binarise(values, masks.salient, 2)[0]) ** 2).mean()))
        chosen = promising_splits(values, salient, splits)
        assert min(range(81), key=errors.__getitem__) in chosen
        assert len(chosen) < 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("metric", ["hessian", "magnitude"])
@pytest.mark.parametrize("rows", [0, 64, 200])
def test_a_gpu_agrees_in_every_mask_and_within_rounding_in_scalars(metric: str, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight, moment = tiny_layer()
    if rows:
        inputs = torch.randn(1024, 256, generator=generator)
        inputs[:, ::7] *= 4
        weight, moment = 0.02 * torch.randn(rows, 256, generator=generator), inputs.T @ inputs / 256
    upper = upper_factor(moment + 0.01 * torch.diagonal(moment).mean() * torch.eye(len(moment)))
    size = 128 if rows else 64
    expected = official_billm(weight, upper, block_size=size, salient_metric=metric)
    found = official_billm(weight.cuda(), upper.cuda(), block_size=size, salient_metric=metric)
    assert torch.equal(found.salient.cpu(), expected.salient)
    assert torch.equal(found.sparse.cpu(), expected.sparse)
    torch.testing.assert_close(found.scalars.cpu(), expected.scalars, rtol=1e-3, atol=1e-6)
    assert float((found.first.cpu() == expected.first).float().mean()) > 0.9999
    assert found.error == pytest.approx(expected.error, rel=1e-4)
