import pytest
import torch

from whit.errors import ModelError
from whit.methods import LayerStatistics, relative_output_error


def inputs(columns=24, tokens=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    return torch.randn(tokens, columns, generator=generator) @ mix


def statistics(x):
    return LayerStatistics(x.shape[1], x.shape[0], 2 * x.T @ x)


def damped(h, damping):
    return h + damping * h.diagonal().mean() * torch.eye(len(h))


def test_factor_is_upper_triangular_and_squares_to_the_inverse():
    stats = statistics(inputs())
    factor = stats.inverse_factor(0.01)
    upper = factor.upper.double()
    assert torch.equal(upper, upper.triu())
    expected = torch.linalg.inv(damped(stats.second_moment.double(), 0.01))
    torch.testing.assert_close(upper.T @ upper, expected, rtol=1e-3, atol=1e-6)
    assert factor.damping == 0.01 and factor.notes == ()


def test_the_squared_diagonal_is_the_variance_given_all_earlier_columns():
    stats = statistics(inputs(8))
    diagonal = stats.inverse_factor(0.02).upper.diagonal().double()
    h = damped(stats.second_moment.double(), 0.02)
    for j in range(8):
        assert diagonal[j] ** 2 == pytest.approx(torch.linalg.inv(h[j:, j:])[0, 0].item(), rel=1e-4)


def test_factors_are_kept_per_damping_and_order():
    stats = statistics(inputs())
    order = stats.descending_order()
    assert stats.inverse_factor(0.01) is stats.inverse_factor(0.01)
    assert stats.inverse_factor(0.01) is not stats.inverse_factor(0.02)
    assert stats.inverse_factor(0.01, order) is stats.inverse_factor(0.01, order.clone())
    assert stats.inverse_factor(0.01, order) is not stats.inverse_factor(0.01)


def test_an_order_permutes_the_moments_first():
    stats = statistics(inputs())
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    permuted = LayerStatistics(24, 200, stats.second_moment[order][:, order].contiguous())
    torch.testing.assert_close(stats.inverse_factor(0.01, order).upper, permuted.inverse_factor(0.01).upper)


def test_descending_order_is_stable():
    stats = LayerStatistics(4, 1, torch.diag(torch.tensor([1.0, 3.0, 1.0, 3.0])))
    assert stats.descending_order().tolist() == [1, 3, 0, 2]


def test_dead_columns_get_a_unit_diagonal():
    x = inputs()
    x[:, [3, 7]] = 0
    stats = statistics(x)
    factor = stats.inverse_factor(0.0)
    assert factor.dead.nonzero().flatten().tolist() == [3, 7]
    assert torch.equal(factor.dead, stats.dead_columns())
    assert factor.upper[3, 3] == 1 and factor.upper[7, 7] == 1
    assert stats.second_moment[3, 3] == 0, "the statistics themselves are not changed"


def test_damping_is_raised_until_it_helps_and_said_so():
    stats = LayerStatistics(2, 1, torch.tensor([[1.0, 3.0], [3.0, 1.0]]))
    factor = stats.inverse_factor(0.01)
    assert factor.damping == pytest.approx(10.0)
    assert factor.notes == ("damping raised from 0.01 to 10: second moments were not positive definite",)
    assert torch.isfinite(factor.upper).all()


def test_zero_damping_of_a_singular_matrix_is_raised():
    factor = statistics(torch.ones(1, 6)).inverse_factor(0.0)
    assert factor.damping > 0 and len(factor.notes) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_an_error(bad):
    moment = torch.eye(3)
    moment[0, 1] = bad
    with pytest.raises(ModelError, match="NaN or Inf: try --dtype float32"):
        LayerStatistics(3, 1, moment).inverse_factor(0.01)


def test_what_cannot_be_inverted_is_an_error():
    moment = torch.full((2, 2), 1.0) - 1e6 * (1 - torch.eye(2))
    with pytest.raises(ModelError, match="more calibration text"):
        LayerStatistics(2, 1, moment).inverse_factor(0.01)


def test_asking_for_what_was_not_gathered_is_a_programming_error():
    with pytest.raises(ValueError, match="SECOND_MOMENT"):
        LayerStatistics(3).inverse_factor(0.01)


def test_relative_output_error_is_the_error_of_the_outputs():
    x = inputs()
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(10, 24, generator=generator)
    rounded = weight + 0.1 * torch.randn(10, 24, generator=generator)
    direct = ((weight - rounded) @ x.T).square().sum() / (weight @ x.T).square().sum()
    assert relative_output_error(weight, rounded, 2 * x.T @ x) == pytest.approx(direct.item(), rel=1e-4)
    plain = (weight - rounded).square().sum() / weight.square().sum()
    assert relative_output_error(weight, rounded, None) == pytest.approx(plain.item(), rel=1e-6)
    assert relative_output_error(weight, weight, 2 * x.T @ x) == 0
    assert relative_output_error(torch.zeros(2, 24), torch.zeros(2, 24), None) == 0
