import itertools

import pytest
import torch

from whit.errors import ModelError
from whit.methods import LayerStatistics, make_method, relative_output_error
from whit.methods.kmeans import weighted_levels


def layer(rows=256, columns=512, tokens=4096, seed=0):
    """The synthetic layer of the method comparison: rank-64 inputs plus noise, six loud channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 64, generator=generator) @ torch.randn(64, columns, generator=generator) / 8
    x += 0.1 * torch.randn(tokens, columns, generator=generator)
    x[:, torch.randperm(columns, generator=generator)[:6]] *= 8
    return torch.randn(rows, columns, generator=generator) * 0.02, LayerStatistics(columns, tokens, 2 * x.T @ x)


def error(name, options, weight, statistics):
    packed = make_method(name, options).compress(weight, statistics).packed
    return relative_output_error(weight, packed.unpack(), statistics.second_moment)


def cost(values, importance, levels):
    return (importance * (values.unsqueeze(2) - levels.unsqueeze(1)).square().amin(2)).sum(1)


def slow_lloyd(values, importance, levels, iterations):
    levels = list(levels)
    for _ in range(iterations):
        members = [[] for _ in levels]
        for value, mass in zip(values, importance, strict=True):
            members[min(range(len(levels)), key=lambda k: abs(value - levels[k]))].append((value, mass))
        levels = [
            sum(v * m for v, m in part) / sum(m for _, m in part) if part else level
            for part, level in zip(members, levels, strict=True)
        ]
    return levels


@pytest.mark.parametrize("count", [2, 4, 8])
def test_levels_are_those_of_the_plain_iteration(count):
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(5, 33, generator=generator)
    importance = torch.rand(33, generator=generator) + 0.2
    start = weighted_levels(values, importance, count, 0)
    for row in range(5):
        # The start is a data value whose share of the mass reaches (k + 1/2) / count.
        order = values[row].argsort()
        share = importance[order].cumsum(0) / importance.sum()
        quantiles = [values[row, order[int((share < (k + 0.5) / count).sum())]].item() for k in range(count)]
        assert start[row].tolist() == pytest.approx(quantiles, rel=1e-3)
        expected = slow_lloyd(values[row].tolist(), importance.tolist(), quantiles, 6)
        assert weighted_levels(values, importance, count, 6)[row].tolist() == pytest.approx(
            expected, rel=1e-3, abs=1e-4
        )


def test_well_separated_clusters_are_found_exactly():
    values = torch.tensor([[5.0, -1.0, 5.5, -1.5, 9.0, 2.0]])
    importance = torch.tensor([1.0, 3.0, 1.0, 1.0, 7.0, 2.0])
    levels = weighted_levels(values, importance, 4, 20)
    assert levels[0].tolist() == pytest.approx([-1.125, 2.0, 5.25, 9.0], abs=1e-3)


def test_two_levels_are_near_the_best_of_all_cuts():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20, 40, generator=generator)
    importance = torch.rand(40, generator=generator) + 0.1
    found = cost(values, importance, weighted_levels(values, importance, 2, 50))
    total = 0.0
    for row in range(20):
        order = values[row].argsort()
        w, v = importance[order].double(), values[row, order].double()
        best = min(
            sum(
                (w[part] * (v[part] - (w[part] * v[part]).sum() / w[part].sum()).square()).sum()
                for part in (slice(0, cut), slice(cut, 40))
            )
            for cut in range(1, 40)
        )
        total += float(best)
        assert found[row] <= 1.3 * best
    assert found.sum() <= 1.05 * total


def test_iterations_never_hurt():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(30, 128, generator=generator)
    importance = torch.rand(128, generator=generator) + 0.1
    costs = [cost(values, importance, weighted_levels(values, importance, 4, steps)) for steps in (0, 1, 3, 10, 40)]
    for before, after in itertools.pairwise(costs):
        assert (after <= before * 1.001).all()  # up to the rounding of levels to float16


def test_gaussian_weights_reach_the_known_optimum():
    """Lloyd-Max for N(0, 1) and four levels: +-0.4528, +-1.5104, mean squared error 0.1175 (Max 1960, table I)."""
    values = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0))
    levels = weighted_levels(values, torch.ones(100_000), 4, 300)
    assert levels[0].tolist() == pytest.approx([-1.5104, -0.4528, 0.4528, 1.5104], abs=0.03)
    assert cost(values, torch.ones(100_000), levels).item() / 100_000 == pytest.approx(0.1175, abs=0.002)


@pytest.mark.parametrize("columns", [1, 2, 3, 7])
def test_fewer_values_than_levels_are_exact(columns):
    values = torch.arange(columns).float().unsqueeze(0) - 1
    assert cost(values, torch.ones(columns), weighted_levels(values, torch.ones(columns), 8, 5)).item() == 0


def test_levels_are_ascending_and_float16_exact():
    values = torch.randn(10, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    levels = weighted_levels(values, torch.ones(64), 8, 10)
    assert torch.equal(levels, levels.half().float())
    assert (levels.diff(dim=1) >= 0).all()
    with pytest.raises(ModelError, match=r"1e\+06 is beyond float16"):
        weighted_levels(torch.tensor([[1e6, 1.0]]), torch.ones(2), 2, 3)


def test_two_bits_in_blocks_of_128_are_2_5_stored_bits():
    layout = make_method("kmeans").format(4096, 4096)
    assert layout.bytes(4096, 4096) * 8 / 4096**2 == 2.5


def test_unweighted_inputs_give_the_nearest_of_the_levels():
    weight, _ = layer(16, 256)
    packed = make_method("kmeans", {}).compress(weight, LayerStatistics(256, 1, torch.eye(256))).packed
    levels = packed.tensors["levels"].float()
    for block in range(2):
        part = weight[:, block * 128 : block * 128 + 128]
        expected = weighted_levels(part, torch.ones(128), 4, 20)
        assert torch.equal(levels[:, block], expected)
        nearest = (part.unsqueeze(2) - expected.unsqueeze(1)).abs().amin(2)
        actual = (packed.unpack()[:, block * 128 : block * 128 + 128] - part).abs()
        torch.testing.assert_close(actual, nearest, rtol=0, atol=1e-7)


def test_ordering_of_the_baselines_on_the_synthetic_layer():
    for seed in range(3):
        weight, statistics = layer(seed=seed)
        kmeans = error("kmeans", {}, weight, statistics)
        gptq = error("gptq", {"bits": 2, "group_size": 64}, weight, statistics)
        rtn = error("rtn", {"bits": 2, "group_size": 64}, weight, statistics)
        assert kmeans < 0.6 * gptq
        assert gptq < 0.2 * rtn
        assert error("kmeans", {"act_order": True}, weight, statistics) < 0.9 * kmeans


@pytest.mark.parametrize(("rows", "columns", "block"), [(1, 40, 128), (3, 5, 4), (2, 130, 128), (4, 1, 0), (2, 9, 0)])
@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("act_order", [False, True])
def test_small_and_ragged_shapes(rows, columns, block, bits, act_order):
    weight, statistics = layer(rows, columns, 300)
    method = make_method("kmeans", {"bits": bits, "block_size": block, "act_order": act_order})
    packed = method.compress(weight, statistics).packed
    assert packed.format == method.format(rows, columns)
    assert relative_output_error(weight, packed.unpack(), statistics.second_moment) < 0.5
    again = method.compress(weight, statistics).packed
    assert all(torch.equal(packed.tensors[name], again.tensors[name]) for name in packed.tensors)


def test_dead_inputs_are_noted():
    weight, statistics = layer(8, 64, 300)
    moment = statistics.second_moment.clone()
    moment[7], moment[:, 7] = 0, 0
    result = make_method("kmeans").compress(weight, LayerStatistics(64, 1, moment))
    assert result.notes == ("1 of 64 inputs never active in calibration: weights set to zero",)
