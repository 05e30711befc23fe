"""The sequential update against closed forms and against a slow, literal optimal-brain-quantisation loop."""

import pytest
import torch

from whit.methods import LayerStatistics
from whit.methods.feedback import round_in_order, round_with_feedback
from whit.methods.grid import fit_grid


def problem(rows=7, columns=45, seed=0):
    """float64 weights, moments H of correlated inputs, and U of H^-1 = U^T U."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) * 0.3 + torch.eye(columns)
    x = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64) @ mix
    moment = 2 * x.T @ x / len(x)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, moment, torch.linalg.cholesky(torch.linalg.inv(moment), upper=True)


def grid_fit(grids, bits=3):
    def fit(first, values):
        grids.append(fit_grid(values.float(), bits, False))
        return grids[-1].rounder()

    return fit


def decode(codes, grids, group):
    parts = codes.double().split(group or codes.shape[1], 1)
    return torch.cat([grid.decode(part) for grid, part in zip(grids, parts, strict=True)], 1)


def brain_quantisation(weight, moment, group, bits=3):
    """Frantar et al. 2022, equations 2 and 3, one column at a time with explicit inverses of what remains."""
    weight, inverse = weight.clone(), torch.linalg.inv(moment)
    out = torch.empty_like(weight)
    for j in range(weight.shape[1]):
        if j % (group or weight.shape[1]) == 0:
            grid = fit_grid(weight[:, j : j + (group or weight.shape[1])].float(), bits, False)
        out[:, j] = grid.decode(grid.encode(weight[:, j : j + 1]))[:, 0]
        error = (weight[:, j] - out[:, j]) / inverse[j, j]
        weight -= torch.outer(error, inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return out


@pytest.mark.parametrize("group", [0, 1, 8, 16, 45, 60])
@pytest.mark.parametrize("block", [1, 5, 16, 128])
def test_agrees_with_the_literal_loop_whatever_the_block_size(group, block):
    weight, moment, upper = problem()
    grids = []
    rounded = round_with_feedback(weight, upper, group, grid_fit(grids), block)
    assert torch.equal(decode(rounded.codes, grids, group), brain_quantisation(weight, moment, group))


@pytest.mark.parametrize("group", [0, 16])
def test_loss_is_the_output_error(group):
    weight, moment, upper = problem()
    grids = []
    rounded = round_with_feedback(weight, upper, group, grid_fit(grids))
    difference = weight - decode(rounded.codes, grids, group)
    torch.testing.assert_close(rounded.loss, (difference @ moment * difference).sum(1), rtol=1e-9, atol=0)


def test_loss_identity_holds_for_any_quantiser_and_order():
    weight, moment, _ = problem()
    order = torch.randperm(45, generator=torch.Generator().manual_seed(1))
    inverse = torch.linalg.inv(moment[order][:, order])
    kept = torch.empty_like(weight)

    def odd(column, values):
        kept[:, column] = (values * (column % 4)).round() / 3
        return torch.zeros(7), kept[:, column]

    rounded = round_in_order(weight, torch.linalg.cholesky(inverse, upper=True), order, 10, [odd] * 5)
    difference = weight - kept
    torch.testing.assert_close(rounded.loss, (difference @ moment * difference).sum(1), rtol=1e-9, atol=0)


def test_an_error_moves_a_correlated_neighbour_by_half():
    """H = [[2, 1], [1, 2]]: min over d of 2 e^2 + 2 e d + 2 d^2 is at d = -e/2, so w2 must rise by e/2."""
    upper = LayerStatistics(2, 1, torch.tensor([[2.0, 1.0], [1.0, 2.0]])).inverse_factor(0.0).upper
    seen = []

    def down(column, values):
        seen.append(values.clone())
        return torch.zeros(1), values.floor()

    round_with_feedback(torch.tensor([[3.5, 7.0]]), upper, 0, lambda first, values: down)
    torch.testing.assert_close(seen[1], torch.tensor([7.25]), rtol=0, atol=1e-5)


def test_the_last_of_three_columns_gets_the_exact_optimum():
    """H = I + 11^T, errors (1, 1) on the first two columns: the exact optimum raises the third by 1, the loss is 4.

    Derivation: minimise dHd = 1 + 1 + d^2 + (2 + d)^2 over d: d = -1, value 4.
    """
    moment = torch.eye(3, dtype=torch.float64) + 1
    upper = torch.linalg.cholesky(torch.linalg.inv(moment), upper=True)
    seen = []

    def wanted(column, values):
        seen.append(values.item())
        return torch.zeros(1), torch.tensor([0.0], dtype=torch.float64) if column < 2 else values + 0

    # Weights chosen so that original minus rounded is 1 in the first two columns.
    rounded = round_with_feedback(torch.ones(1, 3, dtype=torch.float64), upper, 0, lambda first, values: wanted, 2)
    assert seen[2] == pytest.approx(2.0)
    assert rounded.loss.item() == pytest.approx(4.0)


def test_a_twin_column_absorbs_the_error_of_the_first():
    x = torch.randn(50, 1, generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    upper = LayerStatistics(2, 50, 2 * x.T @ x).inverse_factor(1e-4).upper
    seen = []

    def down(column, values):
        seen.append(values.item())
        return torch.zeros(1), values.floor()

    round_with_feedback(torch.tensor([[0.75, 5.0]]), upper, 0, lambda first, values: down)
    assert seen[1] == pytest.approx(5.75, abs=1e-3)


def test_in_order_is_the_permuted_problem():
    weight, moment, _ = problem()
    order = moment.diagonal().argsort(descending=True)
    upper = torch.linalg.cholesky(torch.linalg.inv(moment[order][:, order]), upper=True)
    grid = fit_grid(weight.float(), 3, False)
    rounded = round_in_order(weight, upper, order, 0, [grid.rounder()])
    permuted = round_with_feedback(weight[:, order], upper, 0, lambda first, values: grid.rounder())
    assert torch.equal(rounded.codes[:, order], permuted.codes)
    assert torch.equal(rounded.loss, permuted.loss)


def test_each_column_meets_the_quantiser_of_its_natural_group():
    weight, _, _ = problem(columns=10)
    met = {}

    def named(name):
        def round_column(column, values):
            met[column] = name
            return torch.zeros(7), values

        return round_column

    order = torch.tensor([9, 0, 5, 1, 8, 2, 7, 3, 6, 4])
    round_in_order(weight, torch.eye(10, dtype=torch.float64), order, 4, [named(name) for name in "abc"])
    assert "".join(met[column] for column in range(10)) == "aaaabbbbcc"


def test_the_weight_is_not_modified():
    weight, _, upper = problem()
    before = weight.clone()
    round_with_feedback(weight, upper, 8, grid_fit([]))
    assert torch.equal(weight, before)
