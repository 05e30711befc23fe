"""SparseGPT against loops that invert what remains of H after every column."""

import pytest
import torch

from tests.methods.layers import layer
from whit.methods import LayerStatistics, make_method
from whit.methods.pruning_feedback import prune_with_feedback


def damped(statistics, damping=0.01):
    moment = statistics.second_moment.double()
    return moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)


def slow_sparsegpt(weight, hessian, step, choose):
    """Frantar & Alistarh 2023, algorithm 1, by the definition: the remaining columns absorb each pruned weight."""
    weight = weight.double().clone()
    columns = weight.shape[1]
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    leading = torch.stack([inverse[0, 0] for inverse in inverses])  # U_jj^2
    kept = torch.ones_like(weight, dtype=torch.bool)
    for j in range(columns):
        if j % step == 0:
            kept[:, j : j + step] = choose(weight[:, j : j + step] ** 2 / leading[j : j + step])
        error = weight[:, j] * ~kept[:, j] / leading[j]
        weight[:, j:] -= error[:, None] * inverses[j][0]
    return weight * kept, kept


def lowest_of_all(count):
    def choose(scores):
        flat = torch.ones(scores.numel(), dtype=torch.bool)
        flat[scores.flatten().argsort(stable=True)[: int(scores.numel() * count)]] = False
        return flat.reshape(scores.shape)

    return choose


def lowest_of_rows(count):
    return lambda scores: scores.argsort(dim=-1, stable=True).argsort(dim=-1) >= count


@pytest.mark.parametrize(
    ("options", "step", "choose"),
    [
        ({"pattern": "2:4"}, 4, lowest_of_rows(2)),
        ({"pattern": "3:8"}, 8, lowest_of_rows(5)),
        ({"sparsity": 0.5, "block_size": 32}, 32, lowest_of_all(0.5)),
        ({"sparsity": 0.25, "block_size": 32, "comparison": "row"}, 32, lowest_of_rows(8)),
        ({"sparsity": 0.5}, 128, lowest_of_all(0.5)),
    ],
)
def test_sparsegpt_is_its_definition(options, step, choose):
    weight, statistics = layer(rows=12, columns=160)
    statistics = LayerStatistics(160, 1, statistics.second_moment.double())
    expected, kept = slow_sparsegpt(weight, damped(statistics), step, choose)
    pruned = make_method("sparsegpt", options).prune(weight, statistics)
    # The implementation works in float32: a near tie may fall the other way.
    assert (pruned.kept != kept).float().mean() < 0.005
    rows = (pruned.kept == kept).all(1)
    assert rows.float().mean() > 0.7
    torch.testing.assert_close(pruned.weight[rows].double(), expected[rows], rtol=2e-2, atol=2e-4)


@pytest.mark.parametrize("step", [1, 4, 7, 96, 200])
def test_feedback_does_not_depend_on_the_steps_of_a_fixed_mask(step):
    weight, statistics = layer(rows=12, columns=160)
    hessian = damped(statistics)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    kept = torch.rand(12, 160, generator=torch.Generator().manual_seed(0)) > 0.5
    fed = prune_with_feedback(
        weight.double(), upper, step, lambda first, values: kept[:, first : first + values.shape[1]]
    )
    steps = iter(range(160))
    expected, _ = slow_sparsegpt(weight, hessian, 1, lambda scores: kept[:, [next(steps)]])
    assert torch.equal(fed.kept, kept)
    torch.testing.assert_close(fed.weight, expected, rtol=1e-8, atol=1e-10)


def test_the_loss_is_the_damped_output_error_and_lower_than_without_update():
    weight, statistics = layer(rows=12, columns=160)
    hessian = damped(statistics)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    kept = weight.abs() >= weight.abs().median()
    fed = prune_with_feedback(
        weight.double(), upper, 128, lambda first, values: kept[:, first : first + values.shape[1]]
    )
    difference = weight.double() - fed.weight
    torch.testing.assert_close(fed.loss, (difference @ hessian * difference).sum(1))
    plain = weight.double() * ~kept
    assert (fed.loss < (plain @ hessian * plain).sum(1)).all()


def test_rows_may_keep_everything_or_nothing():
    weight, statistics = layer(rows=4, columns=32)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(statistics)), upper=True)
    kept = torch.zeros(4, 32, dtype=torch.bool)
    kept[1] = True
    fed = prune_with_feedback(weight.double(), upper, 8, lambda first, values: kept[:, first : first + 8])
    assert torch.equal(fed.weight[1], weight[1].double())
    assert not fed.weight[0].any()
    assert float(fed.loss[1]) == 0
