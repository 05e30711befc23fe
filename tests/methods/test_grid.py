import pytest
import torch

from whit.errors import ModelError
from whit.methods.grid import fit_grid


def values(rows=6, columns=32, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("clip_steps", [0, 7])
def test_scales_are_float16_exact_and_codes_in_range(bits, symmetric, clip_steps):
    data = values()
    grid = fit_grid(data, bits, symmetric, clip_steps)
    codes = grid.encode(data)
    assert torch.equal(grid.scale, grid.scale.half().float())
    assert torch.equal(grid.zero, grid.zero.round())
    assert codes.min() >= 0 and codes.max() <= 2**bits - 1
    assert torch.equal(codes, codes.round())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_encode_takes_the_nearest_point_of_the_grid(bits, symmetric):
    data = values()
    grid = fit_grid(data, bits, symmetric)
    points = torch.stack([grid.decode(torch.full((6, 1), float(code))) for code in range(2**bits)], 2)
    best = (data.unsqueeze(2) - points).abs().amin(2)
    error = (grid.decode(grid.encode(data)) - data).abs()
    torch.testing.assert_close(error, best, rtol=1e-5, atol=1e-8)


def test_asymmetric_grid_always_holds_zero():
    data = values().abs() + 1
    grid = fit_grid(data, 3, False)
    assert torch.equal(grid.zero, torch.zeros(6, 1))
    assert torch.equal(grid.decode(grid.encode(torch.zeros(6, 1))), torch.zeros(6, 1))


def test_symmetric_bits_1_is_the_mean_magnitude_with_signs():
    grid = fit_grid(torch.tensor([[1.0, -3.0, 2.0, -2.0]]), 1, True)
    assert grid.scale.item() == 2.0
    assert grid.decode(grid.encode(torch.tensor([[0.5, -0.1]]))).tolist() == [[2.0, -2.0]]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_range_search_never_hurts_and_helps_gaussian_weights(symmetric, bits):
    data = values(40, 64)
    plain, searched = (fit_grid(data, bits, symmetric, steps) for steps in (0, 20))
    before = (plain.decode(plain.encode(data)) - data).square().sum(1)
    after = (searched.decode(searched.encode(data)) - data).square().sum(1)
    assert (after <= before).all()
    assert after.sum() < 0.95 * before.sum()


def test_rows_of_zeros_stay_zeros():
    grid = fit_grid(torch.zeros(2, 8), 4, False, 5)
    assert torch.equal(grid.decode(grid.encode(torch.zeros(2, 8))), torch.zeros(2, 8))


def test_a_scale_beyond_float16_is_an_error():
    with pytest.raises(ModelError, match=r"magnitude 1e\+07.*float16"):
        fit_grid(torch.tensor([[1e7, -1.0]]), 2, False)


def test_one_column_is_rounded_as_the_group_is():
    data = values()
    grid = fit_grid(data, 3, False)
    codes, rounded = grid.rounder()(4, data[:, 4])
    assert torch.equal(codes, grid.encode(data)[:, 4])
    assert torch.equal(rounded, grid.decode(grid.encode(data))[:, 4])
