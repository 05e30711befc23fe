import pytest
import torch

from whit.methods import LayerStatistics, make_method, relative_output_error


def layer(rows=48, columns=192, tokens=1024, seed=0):
    """Gaussian weights; inputs of rank 24 plus noise with four loud channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 24, generator=generator) @ torch.randn(24, columns, generator=generator) / 5
    x += 0.1 * torch.randn(tokens, columns, generator=generator)
    x[:, torch.randperm(columns, generator=generator)[:4]] *= 8
    return torch.randn(rows, columns, generator=generator) * 0.02, LayerStatistics(columns, tokens, 2 * x.T @ x)


def error(method, weight, statistics):
    packed = method.compress(weight, statistics).packed
    return relative_output_error(weight, packed.unpack(), statistics.second_moment)


@pytest.mark.parametrize("options", [{"bits": 3}, {"bits": 1, "symmetric": True}, {"bits": 4, "clip_steps": 5}])
@pytest.mark.parametrize("group", [0, 32, 50])
@pytest.mark.parametrize("act_order", [False, True])
def test_uncorrelated_inputs_make_it_round_to_nearest(options, group, act_order):
    weight, _ = layer()
    options = {**options, "group_size": group}
    statistics = LayerStatistics(192, 1, torch.eye(192))
    gptq = make_method("gptq", {**options, "act_order": act_order}).compress(weight, statistics).packed
    rtn = make_method("rtn", options).compress(weight, statistics).packed
    assert gptq.format == rtn.format
    assert all(torch.equal(gptq.tensors[name], tensor) for name, tensor in rtn.tensors.items())


def test_any_diagonal_of_moments_makes_it_round_to_nearest():
    weight, _ = layer()
    diagonal = torch.rand(192, generator=torch.Generator().manual_seed(2)) + 0.1
    statistics = LayerStatistics(192, 1, torch.diag(diagonal))
    gptq, rtn = (make_method(name, {"bits": 2}).compress(weight, statistics).packed for name in ("gptq", "rtn"))
    assert torch.equal(gptq.unpack(), rtn.unpack())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_correlated_inputs_make_it_better_than_rounding(bits, act_order):
    options = {"bits": bits, "group_size": 64, "symmetric": bits == 1}
    for seed in range(3):
        weight, statistics = layer(seed=seed)
        gptq = error(make_method("gptq", {**options, "act_order": act_order}), weight, statistics)
        assert gptq < 0.5 * error(make_method("rtn", options), weight, statistics)


def test_activation_order_and_range_search_pay_at_two_bits():
    plain, ordered, both = 0.0, 0.0, 0.0
    for seed in range(3):
        weight, statistics = layer(seed=seed)
        options = {"bits": 2, "group_size": 64}
        plain += error(make_method("gptq", options), weight, statistics)
        ordered += error(make_method("gptq", {**options, "act_order": True}), weight, statistics)
        both += error(make_method("gptq", {**options, "act_order": True, "clip_steps": 10}), weight, statistics)
    assert both < ordered < 0.8 * plain


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_do_not_touch_each_other(act_order, symmetric):
    weight, statistics = layer()
    method = make_method("gptq", {"bits": 3, "group_size": 48, "act_order": act_order, "symmetric": symmetric})
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    whole, shuffled = (method.compress(part, statistics).packed.unpack() for part in (weight, weight[order]))
    # Matrix products round differently for other row positions, so a few codes next to a tie may differ.
    assert (whole[order] != shuffled).float().mean() < 0.01


@pytest.mark.parametrize(("rows", "columns"), [(1, 192), (1, 1), (3, 5), (2, 7), (5, 129), (4, 130)])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [0, 4, 128])
def test_small_and_ragged_shapes(rows, columns, act_order, group):
    weight, statistics = layer(rows, columns)
    method = make_method("gptq", {"bits": 4, "group_size": group, "act_order": act_order})
    packed = method.compress(weight, statistics).packed
    assert packed.format == method.format(rows, columns)
    assert packed.stored_bytes() == packed.format.bytes(rows, columns)
    assert relative_output_error(weight, packed.unpack(), statistics.second_moment) < 0.05


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_inputs_get_zero_weights_and_a_note(act_order):
    weight, statistics = layer()
    moment = statistics.second_moment.clone()
    moment[[5, 77]] = 0
    moment[:, [5, 77]] = 0
    result = make_method("gptq", {"bits": 3, "act_order": act_order}).compress(weight, LayerStatistics(192, 1, moment))
    assert torch.equal(result.packed.unpack()[:, [5, 77]], torch.zeros(48, 2))
    assert result.notes == ("2 of 192 inputs never active in calibration: weights set to zero",)
    assert weight[:, 5].abs().min() > 0, "the caller's weight is not modified"


def test_moments_that_are_not_positive_definite_raise_the_damping_and_say_so():
    weight, statistics = layer(columns=16)
    moment = statistics.second_moment - statistics.second_moment.diagonal().mean() * torch.eye(16)
    moment.fill_diagonal_(float(statistics.second_moment.diagonal().mean()) / 50)
    result = make_method("gptq", {"bits": 4}).compress(weight, LayerStatistics(16, 1, moment))
    assert len(result.notes) == 1 and "damping raised from 0.01" in result.notes[0]
    assert torch.isfinite(result.packed.unpack()).all()


def test_fewer_tokens_than_columns_still_work():
    weight, statistics = layer(tokens=10)
    assert error(make_method("gptq", {"bits": 3}), weight, statistics) < 0.02


def test_the_same_input_gives_the_same_bytes():
    method = make_method("gptq", {"bits": 2, "act_order": True})
    first, second = (method.compress(*layer()).packed for _ in range(2))
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
