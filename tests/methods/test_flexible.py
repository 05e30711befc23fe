import pytest
import torch

from whit.errors import KnobError, ModelError
from whit.formats.base import nested_tensors
from whit.formats.minifloat import number_system
from whit.formats.quantised_inputs import QuantisedInputs
from whit.formats.scaled_codes import ScaledCodes
from whit.methods import LayerStatistics, Statistic, make_method
from whit.methods.chain import PruneThenQuantise
from whit.methods.number_choice import (
    choose_pair,
    fit_scales,
    may_meet,
    output_scores,
    resolution_score,
    round_weight,
    tensor_score,
)

PAPER = {"group_size": -1, "input_scale": "tensor", "reserve_top": True}
FIVE = ["int8", "e3m4", "e4m3", "e2m5", "e5m2"]


def statistics_of(sample):
    return LayerStatistics(sample.shape[1], len(sample), absolute_maximum=sample.abs().amax(0), sample=sample)


def linear_layer(seed=0, rows=24, columns=40, tokens=300):
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(tokens, columns, generator=generator)
    sample[:, :3] *= 15
    return torch.randn(rows, columns, generator=generator) * 0.05, sample


def conv_layer(seed=0):
    """A 3 x 3 convolution as the product it is: filters (12, 8 * 9) and the patches of four images."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 8, 10, 10, generator=generator).relu()
    patches = torch.nn.functional.unfold(images, 3, padding=1).transpose(1, 2).reshape(-1, 72)
    filters = torch.randn(12, 8, 3, 3, generator=generator)
    expected = torch.nn.functional.conv2d(images, filters, padding=1).permute(0, 2, 3, 1).reshape(-1, 12)
    torch.testing.assert_close(patches @ filters.reshape(12, 72).T, expected, rtol=1e-4, atol=1e-4)
    return filters.reshape(12, 72), patches


def systems(packed):
    layout = packed.format
    return (layout.system, layout.weight.system) if isinstance(layout, QuantisedInputs) else (None, layout.system)


def slow_score(weight, sample, input_system, weight_system):
    """The published score with scales per tensor, in float64."""
    rounded = []
    for values, name in ((sample, input_system), (weight, weight_system)):
        numbers = number_system(name)
        scale = values.abs().max() / numbers.maximum
        rounded.append((numbers.round(values / scale) * scale).double())
    exact = sample.double() @ weight.double().T
    return float((rounded[0] @ rounded[1].T - exact).square().mean() / exact.square().mean())


@pytest.mark.parametrize("layer", [linear_layer, conv_layer])
def test_the_pair_of_least_output_error_of_all_25(layer):
    weight, sample = layer()
    result = make_method("flexible", PAPER).compress(weight, statistics_of(sample))
    details = result.details
    assert details["inputs"] == details["weights"] == FIVE
    table = {(a, w): details["scores"][i][j] for i, a in enumerate(FIVE) for j, w in enumerate(FIVE)}
    for (a, w), score in table.items():
        assert score == pytest.approx(slow_score(weight, sample, a, w), rel=2e-3)
    chosen = systems(result.packed)
    assert chosen == min(table, key=table.__getitem__)
    assert all(table[chosen] <= table[name, name] for name in FIVE), "never worse than one system for all"
    exact = sample @ weight.T
    error = (result.packed.linear(sample) - exact).square().sum() / exact.square().sum()
    assert float(error) == pytest.approx(table[chosen], rel=2e-3), "what was scored is what runs"


@pytest.mark.parametrize("layer", [linear_layer, conv_layer])
def test_limited_never_mixes_and_never_gains(layer):
    for seed in range(4):
        weight, sample = layer(seed)
        free = make_method("flexible", PAPER).compress(weight, statistics_of(sample))
        bound = make_method("flexible", PAPER | {"limited": True}).compress(weight, statistics_of(sample))
        assert free.details == bound.details
        a, w = systems(bound.packed)
        assert (a == "int8") == (w == "int8")
        table, at = bound.details["scores"], {name: index for index, name in enumerate(FIVE)}
        assert table[at[a]][at[w]] >= min(min(line) for line in table)


def test_limited_changes_a_choice():
    weight, sample = linear_layer()
    assert systems(make_method("flexible", PAPER).compress(weight, statistics_of(sample)).packed) == ("e3m4", "int8")
    limited = make_method("flexible", PAPER | {"limited": True})
    assert systems(limited.compress(weight, statistics_of(sample)).packed) == ("e3m4", "e2m5")


def test_ties_go_to_the_first_of_the_menu():
    names = [number_system(name) for name in FIVE]
    assert choose_pair(torch.ones(5, 5), names, names, limited=False) == (0, 0)
    table = torch.ones(5, 5)
    table[3, 1] = table[2, 4] = 0.5
    assert choose_pair(table, names, names, limited=False) == (2, 4)
    table[1, 0] = 0.1
    assert choose_pair(table, names, names, limited=False) == (1, 0)
    assert choose_pair(table, names, names, limited=True) == (2, 4)
    assert not may_meet(names[0], names[1])
    with pytest.raises(ValueError, match="every pair mixes"):
        choose_pair(torch.ones(1, 1), names[:1], names[1:2], limited=True)


def distribution(kind):
    generator = torch.Generator().manual_seed(5)
    count = (1000, 400)
    normal, uniform = torch.randn(count, generator=generator), torch.rand(count, generator=generator) * 2 - 1
    if kind[0] == "t":
        chi = torch.randn(int(kind[1]), *count, generator=generator).square().sum(0)
        return normal * (int(kind[1]) / chi).sqrt()
    laplace = uniform.sign() * uniform.abs().clamp(min=1e-9).log()
    return {"uniform": uniform, "normal": normal, "laplace": laplace, "relu": normal.relu()}[kind]


def finest(values, raw=False):
    scores = {}
    for name in FIVE:
        numbers = number_system(name)
        scale = values.abs().max().reshape(1, 1) / numbers.maximum
        scores[name] = resolution_score(values, scale, 0, numbers, raw=raw)
    return min(scores, key=scores.__getitem__), scores


@pytest.mark.parametrize(
    ("kind", "winner"),
    [("uniform", "int8"), ("normal", "e3m4"), ("laplace", "e3m4"), ("t5", "e3m4"), ("t3", "e4m3")],
)
def test_the_rule_of_spacings_on_data_without_zeros(kind, winner):
    values = distribution(kind)
    assert finest(values)[0] == winner
    raw, scores = finest(values, raw=True)
    assert raw == winner
    assert scores[winner] == pytest.approx(finest(values)[1][winner] * values.numel(), rel=1e-6)


def test_the_published_rule_of_spacings_takes_zeros_for_precision():
    values = distribution("relu")
    winner, scores = finest(values, raw=True)
    assert winner == "e5m2"
    assert finest(values)[0] in ("int8", "e3m4")
    numbers, count = number_system("e5m2"), values.numel()
    h = numbers.bias - torch.log2(values.max() / numbers.maximum)
    logs = (torch.floor(values.log2() + h) - h - 2).clamp(min=float(1 - h - 2))
    assert scores["e5m2"] == pytest.approx(float(logs.double().sum()), rel=1e-5)
    assert scores["e5m2"] / count < scores["int8"] / count - 1


def test_weights_by_spacing_and_by_their_own_error():
    weight, sample = linear_layer()
    by_spacing = make_method("flexible", {"score": "resolution", **PAPER}).compress(weight, statistics_of(sample))
    assert systems(by_spacing.packed) == (finest(sample)[0], finest(weight)[0])
    by_tensor = make_method("flexible", {"score": "tensor", **PAPER}).compress(weight, statistics_of(sample))
    numbers = [number_system(name) for name in FIVE]
    errors = [tensor_score(weight, round_weight(weight, ScaledCodes(name, -1), search=False).unpack()) for name in FIVE]
    of_inputs = []
    for item in numbers:
        scale = sample.abs().max() / item.maximum
        of_inputs.append(tensor_score(sample, item.round(sample / scale) * scale))
    expected = (FIVE[of_inputs.index(min(of_inputs))], FIVE[errors.index(min(errors))])
    assert systems(by_tensor.packed) == expected


def test_the_norm_counts():
    weight, sample = linear_layer()
    packed = [round_weight(weight, ScaledCodes("int8", 0), search=False)]
    exact, rounded = sample.double() @ weight.double().T, sample.double() @ packed[0].unpack().double().T
    for p in (1.0, 2.0, 3.5):
        expected = (rounded - exact).abs().pow(p).mean() / exact.abs().pow(p).mean()
        assert output_scores(sample, weight, [sample], [packed[0].unpack()], p).item() == pytest.approx(
            float(expected), rel=1e-3
        )


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("input_bits", [16, 8, 6, 4])
@pytest.mark.parametrize("group", [-1, 0, 16])
@pytest.mark.parametrize("input_scale", ["token", "tensor"])
def test_bytes_are_known_beforehand_whatever_is_chosen(bits, input_bits, group, input_scale):
    weight, sample = linear_layer(columns=44)
    knobs = {"bits": bits, "input_bits": input_bits, "group_size": group}
    method = make_method("flexible", knobs if input_bits == 16 else knobs | {"input_scale": input_scale})
    result = method.compress(weight, statistics_of(sample))
    expected = method.format(24, 44)
    assert result.packed.format.specs(24, 44) == expected.specs(24, 44)
    assert result.packed.format.changes_inputs == expected.changes_inputs == (input_bits != 16)
    assert result.packed.stored_bytes() == expected.bytes(24, 44)
    again = method.compress(weight, statistics_of(sample))
    assert again.packed.format == result.packed.format
    assert all(torch.equal(again.packed.tensors[name], tensor) for name, tensor in result.packed.tensors.items())


def test_one_system_is_plain_rounding_without_data():
    weight, sample = linear_layer()
    for name in ("int8", "e4m3fn", "e5m2"):
        method = make_method("flexible", {"formats": name})
        assert method.required() == frozenset()
        assert method.plan_note() is None
        result = method.compress(weight, LayerStatistics(columns=40))
        assert systems(result.packed) == (name, name)
        assert (result.notes, result.details) == ((), {})
        exact = sample @ weight.T
        assert (result.packed.linear(sample) - exact).square().mean() < 0.01 * exact.square().mean()


def test_four_bit_weights_with_eight_bit_inputs():
    weight, sample = linear_layer(columns=64)
    method = make_method("flexible", {"bits": 4, "group_size": 32, "formats": "int8,e2m1fn,e4m3fn,int4"})
    assert [item.name for item in method.weight_menu()] == ["e2m1fn", "int4"]
    assert [item.name for item in method.input_menu()] == ["int8", "e4m3fn"]
    packed = method.compress(weight, statistics_of(sample)).packed
    assert packed.stored_bits() == 4.5
    exact = sample @ weight.T
    error = (packed.linear(sample) - exact).square().sum() / exact.square().sum()
    assert error < 0.02


def test_what_a_method_asks_for():
    sample, ranges = Statistic.SAMPLE, Statistic.RANGE
    for knobs, expected in [
        ({}, {sample}),
        ({"input_scale": "tensor"}, {sample, ranges}),
        ({"input_scale": "tensor", "formats": "int8"}, {ranges}),
        ({"input_scale": "tensor", "formats": "int8", "scale": "mse"}, {sample, ranges}),
        ({"input_bits": 16}, {sample}),
        ({"input_bits": 16, "score": "tensor"}, set()),
        ({"score": "resolution"}, {sample}),
        ({"bits": 4, "formats": "int4,e2m1,int8"}, {sample}),
        ({"bits": 4, "formats": "int4,e2m1,int8", "score": "tensor"}, set()),
    ]:
        assert make_method("flexible", knobs).required() == expected, knobs


def test_a_stored_scale_covers_what_the_sample_missed():
    weight, sample = linear_layer()
    statistics = statistics_of(sample)
    statistics.absolute_maximum = statistics.absolute_maximum * 3
    packed = make_method("flexible", {"formats": "int8", "input_scale": "tensor"}).compress(weight, statistics).packed
    assert packed.tensors["input_scales"].tolist() == pytest.approx([float(sample.abs().max()) * 3 / 127])


def test_input_groups():
    weight, sample = linear_layer()
    exact = sample @ weight.T
    errors = {}
    for scale in ("token", "tensor"):
        for group in (0, 8):
            knobs = {"formats": "int8", "input_scale": scale, "input_group_size": group}
            packed = make_method("flexible", knobs).compress(weight, statistics_of(sample)).packed
            errors[scale, group] = float((packed.linear(sample) - exact).square().mean())
    assert errors["token", 8] < errors["token", 0] < errors["tensor", 0]
    assert errors["tensor", 8] < errors["tensor", 0]


def test_searched_scales_clip_what_is_rare():
    weight, sample = linear_layer()
    weight[0, 0] = 1.0
    exact = sample @ weight.T
    errors = {}
    for scale in ("max", "mse"):
        method = make_method("flexible", {"bits": 4, "input_bits": 16, "formats": "int4", "scale": scale})
        packed = method.compress(weight, LayerStatistics(40)).packed
        errors[scale] = float((packed.unpack() - weight).square().mean())
    assert errors["mse"] < errors["max"]
    assert exact.isfinite().all()


@pytest.mark.parametrize("input_scale", ["token", "tensor"])
def test_layers_that_calibration_never_reached(input_scale):
    weight, sample = linear_layer()
    unreached = LayerStatistics(40, 0, torch.eye(40), absolute_maximum=torch.ones(40))
    method = make_method("flexible", {"input_scale": input_scale})
    result = method.compress(weight, unreached)
    assert result.notes[0] == "no sample of the inputs: number systems chosen by the weights alone"
    assert (len(result.notes) == 2) == (input_scale == "tensor")
    assert not result.packed.format.static, "a scale of inputs nobody has seen would be an invention"
    assert result.packed.stored_bytes() <= method.format(*weight.shape).bytes(*weight.shape)
    assert systems(result.packed)[0] == "int8"
    exact = sample @ weight.T
    assert (result.packed.linear(sample) - exact).square().sum() < 0.01 * exact.square().sum()


@pytest.mark.parametrize("knobs", [{}, PAPER, {"bits": 4, "group_size": 8}, {"scale": "mse"}])
def test_weights_and_inputs_of_zeros(knobs):
    method = make_method("flexible", knobs)
    result = method.compress(torch.zeros(4, 16), statistics_of(torch.zeros(10, 16)))
    assert (result.packed.unpack() == 0).all()
    assert (result.packed.linear(torch.ones(2, 16)) == 0).all()
    tiny = torch.full((4, 16), 1e-30)
    assert (make_method("flexible", knobs).compress(tiny, statistics_of(torch.zeros(10, 16))).packed.unpack() > 0).all()


def test_ranges_that_are_not_finite():
    weight, sample = linear_layer()
    statistics = statistics_of(sample)
    statistics.absolute_maximum[3] = torch.inf
    with pytest.raises(ModelError, match=r"magnitude of inf has no finite scale for int8.*--dtype float32"):
        make_method("flexible", {"input_scale": "tensor"}).compress(weight, statistics)
    with pytest.raises(ModelError, match="magnitude of nan"):
        fit_scales(
            torch.ones(1, 2),
            number_system("e2m1"),
            torch.float32,
            search=False,
            largest=torch.tensor([torch.nan]),
        )


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"bits": 5}, "'bits' of method 'flexible' is one of 8, 6, 4, got 5"),
        ({"formats": "int8,e4m3x"}, "knob 'formats' of method 'flexible': unknown number system 'e4m3x'"),
        ({"formats": "int4"}, "names 'int4', which has 4 bits: bits is 8 and input_bits 8"),
        ({"formats": "e4m3fn", "bits": 4}, r"no number system of 4 bits, got 'e4m3fn' \(for example: int4"),
        ({"formats": "int4", "bits": 4}, "no number system of 8 bits, got 'int4'"),
        ({"input_bits": 16, "input_scale": "tensor"}, "'input_scale' .*does nothing with input_bits 16"),
        ({"input_bits": 16, "limited": True}, "'limited' .*does nothing with input_bits 16"),
        ({"raw_resolution": True}, "'raw_resolution' .*does nothing with score 'output'"),
        ({"limited": True, "bits": 4, "formats": "int4,e4m3fn"}, "'limited' .*leaves no pair among formats 'int4,e4m3"),
        ({"norm": 0.1}, "'norm' .*at least 0.5"),
        ({"group_size": -2}, "'group_size' .*at least -1"),
        ({"scale": "min"}, "'scale' .*is one of max, mse"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(KnobError, match=message):
        make_method("flexible", knobs)


def test_after_pruning_the_kept_weights_are_judged_in_their_places():
    weight, sample = linear_layer(columns=64)
    quantiser = make_method("flexible", {"bits": 4, "input_bits": 16, "group_size": 8})
    method = PruneThenQuantise(make_method("wanda", {"pattern": "2:4"}), quantiser)
    assert method.plan_note() == quantiser.plan_note()
    statistics = statistics_of(sample)
    statistics.square_sums = sample.square().sum(0)
    result = method.compress(weight, statistics)
    assert result.packed.stored_bytes() == method.format(24, 64).bytes(24, 64)
    pruned = make_method("wanda", {"pattern": "2:4"}).compress(weight, statistics).packed.unpack()
    exact, scores = sample @ pruned.T, result.details["scores"][0]
    assert (
        systems(nested_tensors("values", result.packed.format.values, result.packed.tensors, 24, 32))[1]
        == (result.details["weights"][scores.index(min(scores))])
    )
    error = (sample @ result.packed.unpack().T - exact).square().sum() / exact.square().sum()
    assert float(error) == pytest.approx(min(scores), rel=2e-3)
    with pytest.raises(KnobError, match="'flexible' can follow a pruning step with input_bits 16 only"):
        PruneThenQuantise(make_method("wanda", {"pattern": "2:4"}), make_method("flexible", {}))


def test_the_plan_says_that_systems_are_chosen_later():
    assert "chosen per layer during compression" in make_method("flexible", {}).plan_note()
    assert "e2m1fn" in make_method("flexible", {"bits": 4}).plan_note()
