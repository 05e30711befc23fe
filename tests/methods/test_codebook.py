"""The codebook method: exact feedback for groups, monotone refinement, learning, bits, and its place among others."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import whit
from tests import tiny
from whit.cli import main
from whit.errors import KnobError, ModelError
from whit.methods import LayerStatistics, make_method, relative_output_error
from whit.methods.codebook import storable
from whit.methods.codebook_learning import (
    _best_ternary,
    distinct_ternary,
    initial_words,
    learn_words,
    nearest_words,
    ternary_words,
)
from whit.methods.group_feedback import (
    decode,
    descend_groups,
    loudest_first,
    metrics,
    refit_scales,
    round_groups,
    stacked,
)


def layer(rows: int = 48, columns: int = 96, tokens: int = 2000, seed: int = 0) -> tuple[Tensor, LayerStatistics]:
    """Gaussian weights; inputs of rank 16 plus noise, four channels eight times as large."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, 16, generator=generator) @ torch.randn(16, columns, generator=generator) / 4
    inputs += 0.5 * torch.randn(tokens, columns, generator=generator)
    inputs[:, torch.randperm(columns, generator=generator)[:4]] *= 8
    return 0.02 * torch.randn(rows, columns, generator=generator), LayerStatistics(columns, 8, inputs.T @ inputs / 4)


def error(weight: Tensor, statistics: LayerStatistics, name: str = "codebook", **knobs: object) -> float:
    packed = make_method(name, knobs).compress(weight, statistics).packed
    return relative_output_error(weight, packed.unpack(), statistics.second_moment)


def loss(weight: Tensor, values: Tensor, moment: Tensor) -> float:
    difference = (weight - values).double()
    return float((difference @ moment.double() * difference).sum())


class Setting:
    """A permuted layer with its order, damped moments, factor and a random codebook."""

    def __init__(self, columns: int = 52, width: int = 8) -> None:
        weight, statistics = layer(20, columns)
        moment = statistics.second_moment
        assert moment is not None
        self.width = width
        self.order = loudest_first(torch.diagonal(moment), width)
        self.weight = weight[:, self.order.columns]
        self.moment = moment[self.order.columns][:, self.order.columns].clone()
        torch.diagonal(self.moment).add_(0.1 * float(torch.diagonal(moment).mean()))
        self.upper = statistics.inverse_factor(0.1, self.order.columns).upper
        self.metric = metrics(self.upper, self.order, width)
        self.scales = self.weight.square().mean(1).sqrt()
        groups = stacked(self.weight, self.order, width)
        self.words = initial_words(groups, self.scales, 16)


def test_nearest_words_are_those_of_trying_all() -> None:
    generator = torch.Generator().manual_seed(0)
    values, words, metric = (torch.randn(shape, generator=generator) for shape in ((30, 5), (6, 5), (5, 5)))
    scales = torch.rand(30, generator=generator)
    signed = torch.cat([words, -words])
    distance = ((values[:, None] - scales[:, None, None] * signed) @ metric).square().sum(2)
    assert torch.equal(nearest_words(values, scales, words, metric), distance.argmin(1))


def test_groups_go_by_loudness_and_the_narrow_one_takes_part() -> None:
    order = loudest_first(torch.tensor([1.0, 1, 5, 3, 9]), 2)
    assert order.groups.tolist() == [2, 1, 0]
    assert order.columns.tolist() == [4, 2, 3, 0, 1]
    assert order.bounds == ((0, 1), (1, 3), (3, 5))


def test_the_loss_is_the_sum_of_group_errors() -> None:
    """tr(D H D^T) = sum_B ||D_B U_BB^-1||^2, D of the values at their turn: exact feedback, groups of unequal width."""
    setting = Setting()
    codes, current = round_groups(
        setting.weight, setting.upper, setting.order, setting.metric, setting.scales, setting.words
    )
    values = decode(codes, setting.scales, setting.words, setting.order)
    total = 0.0
    for group, (start, stop) in enumerate(setting.order.bounds):
        inner = setting.metric[group, : stop - start, : stop - start]
        total += float(((current - values)[:, start:stop] @ inner).square().sum())
    assert total == pytest.approx(loss(setting.weight, values, setting.moment), rel=1e-3)
    assert len({stop - start for start, stop in setting.order.bounds}) == 2


def test_feedback_follows_the_textbook_recursion() -> None:
    setting = Setting()
    codes, _ = round_groups(setting.weight, setting.upper, setting.order, setting.metric, setting.scales, setting.words)
    signed = torch.cat([setting.words, -setting.words])
    rest = setting.weight.double()
    upper = setting.upper.double()
    differing = 0
    for group, (start, stop) in enumerate(setting.order.bounds):
        inverse = torch.linalg.inv(upper[start:stop, start:stop])
        choice = nearest_words(
            rest[:, start:stop], setting.scales.double(), setting.words[:, : stop - start].double(), inverse
        )
        differing += int((choice != codes[:, group]).sum())
        rounded = setting.scales[:, None] * signed[codes[:, group], : stop - start]
        scaled = (rest[:, start:stop] - rounded) @ inverse
        rest[:, stop:] -= scaled @ upper[start:stop, stop:]
    assert differing <= 1  # a tie in float32 at most


def test_no_pass_of_descent_and_no_new_scale_raises_the_loss() -> None:
    setting = Setting()
    weight, moment, words, order = setting.weight, setting.moment, setting.words, setting.order
    scales = setting.scales
    codes, _ = round_groups(weight, setting.upper, order, setting.metric, scales, words)
    losses = [loss(weight, decode(codes, scales, words, order), moment)]
    for _ in range(3):
        values = decode(codes, scales, words, order)
        scales = refit_scales(weight, values, moment, scales)
        values = decode(codes, scales, words, order)
        losses.append(loss(weight, values, moment))
        gradient = (weight - values) @ moment
        descend_groups(codes, values, gradient, moment, order, scales, words)
        assert torch.equal(values, decode(codes, scales, words, order))
        torch.testing.assert_close(gradient, (weight - values) @ moment, rtol=1e-3, atol=1e-3)
        losses.append(loss(weight, values, moment))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    assert losses[2] < 0.97 * losses[0]


@pytest.mark.parametrize(
    ("weight", "values", "moment", "expected"),
    [
        ([[1.0, 2]], [[1.0, 1]], [1.0, 1], 1.5),
        ([[1.0, 2]], [[1.0, 1]], [1.0, 3], 7 / 4),
        ([[1.0]], [[0.0]], [1.0], 1.0),
    ],
)
def test_refitted_scales_in_closed_form(weight, values, moment, expected) -> None:
    found = refit_scales(torch.tensor(weight), torch.tensor(values), torch.diag(torch.tensor(moment)), torch.ones(1))
    assert found.item() == pytest.approx(expected)


def test_learning_lowers_the_error_and_its_fixed_point_solves_the_normal_equations() -> None:
    setting = Setting(48)
    groups = stacked(setting.weight, setting.order, setting.width)

    def cost(words: Tensor) -> float:
        codes = nearest_words(groups, setting.scales, words, setting.metric)
        signed = torch.cat([words, -words])
        return float(((groups - setting.scales[:, None] * signed[codes]) @ setting.metric).square().sum())

    words = [learn_words(groups, setting.scales, setting.metric, setting.words, turns) for turns in (0, 1, 5, 60)]
    costs = [cost(item) for item in words]
    assert costs[0] > costs[1] > costs[2] >= costs[3] * 0.9999
    codes = nearest_words(groups, setting.scales, words[3], setting.metric)
    best = words[3].clone().requires_grad_()
    signed = torch.cat([best, -best])
    ((groups - setting.scales[:, None] * signed[codes]) @ setting.metric).square().sum().backward()
    assert best.grad is not None
    assert float(best.grad.abs().max()) < 1e-2 * costs[3]


def test_ternary_words_are_the_best_of_all_and_distinct() -> None:
    generator = torch.Generator().manual_seed(0)
    root, right = torch.randn(3, 4, 4, generator=generator), torch.randn(3, 4, generator=generator)
    normal = root @ root.transpose(1, 2)
    chosen = _best_ternary(normal, right)
    for number in range(3):
        costs = {
            c: float(torch.tensor(c) @ normal[number] @ torch.tensor(c) - 2 * right[number] @ torch.tensor(c))
            for c in itertools.product((-1.0, 0.0, 1.0), repeat=4)
        }
        assert tuple(chosen[number].tolist()) == min(costs, key=costs.__getitem__)
    assert len(ternary_words(3)) == 14
    words = distinct_ternary(torch.randn(14, 3, generator=generator))
    both = {tuple(word) for word in torch.cat([words, -words]).abs().tolist()}
    assert len({tuple(word) for word in words.tolist()}) == 14 and len(both) == 8


def test_storable_words_fill_their_eight_bits_and_keep_their_product_with_the_scales() -> None:
    words, scales = torch.tensor([[0.5, -3.0], [0.1, 1.0]]), torch.tensor([0.01, 2.0])
    steps, stored, kept = storable(words, scales, ternary=False)
    assert steps.abs().max() == 127 and torch.equal(stored, steps / 128)
    torch.testing.assert_close(stored * kept[0], words * scales[0], rtol=0, atol=0.01 * 3 / 250)
    assert torch.equal(kept, kept.half().float())
    assert storable(torch.zeros(2, 2), scales, ternary=False)[0].abs().sum() == 0


@pytest.mark.parametrize("patterns", ["real", "ternary"])
@pytest.mark.parametrize(
    ("rows", "columns", "codes", "width"), [(1, 40, 16, 8), (9, 37, 64, 8), (5, 3, 4, 4), (7, 8, 8, 3)]
)
def test_every_shape_is_packed_in_the_promised_format(
    patterns: str, rows: int, columns: int, codes: int, width: int
) -> None:
    weight, statistics = layer(rows, columns, 300) if columns > 8 else _narrow(rows, columns)
    method = make_method("codebook", {"patterns": patterns, "codes": codes, "width": width})
    packed = method.compress(weight, statistics).packed
    assert packed.format == method.format(rows, columns)
    assert packed.stored_bytes() == packed.format.bytes(rows, columns)
    again = method.compress(weight, LayerStatistics(columns, 1, statistics.second_moment)).packed
    assert all(torch.equal(packed.tensors[name], again.tensors[name]) for name in packed.tensors)
    assert relative_output_error(weight, packed.unpack(), statistics.second_moment) < 0.8


def _narrow(rows: int, columns: int) -> tuple[Tensor, LayerStatistics]:
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(50, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), LayerStatistics(columns, 50, inputs.T @ inputs)


@pytest.mark.parametrize("seed", [0, 1])
def test_each_part_earns_its_place(seed: int) -> None:
    weight, statistics = layer(128, 192, seed=seed)
    whole = error(weight, statistics, codes=64, width=8)
    assert whole < 0.97 * error(weight, statistics, codes=64, width=8, rounds=1, passes=0)
    assert whole < 0.9 * error(weight, statistics, codes=64, width=8, iterations=0, rounds=1)
    assert whole < error(weight, statistics, codes=64, width=8, patterns="ternary")
    assert error(weight, statistics, codes=256, width=8) < 0.85 * whole
    blind = LayerStatistics(192, 1, torch.eye(192))
    packed = make_method("codebook", {"codes": 64, "width": 8}).compress(weight, blind).packed
    assert whole < 0.5 * relative_output_error(weight, packed.unpack(), statistics.second_moment)


def test_gaussian_weights_come_near_the_limit_of_any_code() -> None:
    """No code of R bits per weight has less than 4^-R; one sign per weight has 1 - 2/pi = 0.363 at one bit."""
    weight = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    statistics = LayerStatistics(256, 1, torch.eye(256))
    one = error(weight, statistics, codes=256, width=8, passes=0, rounds=1)
    assert 0.25 < one < 0.33
    most = error(weight, statistics, codes=64, width=8, passes=0, rounds=1)
    assert 4**-0.75 < most < 0.44


def test_dead_inputs_and_zero_rows_do_no_harm() -> None:
    weight, statistics = layer(24, 64, 500)
    moment = statistics.second_moment
    assert moment is not None
    alive = error(weight, statistics, codes=64, width=8)
    moment = moment.clone()
    moment[:, 8:24] = 0
    moment[8:24] = 0
    weight[3] = 0
    packed = make_method("codebook", {"codes": 64, "width": 8}).compress(weight, LayerStatistics(64, 1, moment)).packed
    assert not packed.unpack()[3].any()
    assert relative_output_error(weight, packed.unpack(), moment) < 1.5 * alive
    nothing = make_method("codebook").compress(torch.zeros(4, 24), LayerStatistics(24, 1, torch.zeros(24, 24))).packed
    assert not nothing.unpack().any()


def test_weights_beyond_float16_are_refused() -> None:
    with pytest.raises(ModelError, match=r"beyond float16"):
        make_method("codebook").compress(torch.full((2, 24), 1e6), LayerStatistics(24, 1, torch.eye(24)))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"patterns": "ternary", "width": 9}, "width 9 is too wide for ternary"),
        ({"patterns": "ternary", "width": 2, "codes": 64}, "only 9 ternary patterns of width 2, fewer than 64"),
        ({"codes": 100}, "'codes' of method 'codebook' is one of 4, 8"),
        ({"patterns": "binary"}, "is one of real, ternary"),
    ],
)
def test_nonsense_is_refused(knobs: dict[str, object], message: str) -> None:
    with pytest.raises(KnobError, match=message):
        make_method("codebook", knobs)


def test_a_tiny_model_is_compressed_by_the_command_and_reloaded(tmp_path: Path) -> None:
    model = tiny.save_model("llama", tmp_path / "model")
    data = tiny.save_inputs("llama", tmp_path / "calibration.safetensors")
    arguments = [
        "compress",
        str(model),
        "--method",
        "codebook",
        "-o",
        str(tmp_path / "out"),
        "--calibration",
        str(data),
    ]
    arguments += ["--no-evaluate", "--device", "cpu", "--dtype", "float32", "--codes", "16", "--width", "8"]
    assert main(arguments) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    inside = [item for item in result["layers"] if item["block"]]
    assert len(inside) == 21
    assert all(item["error"] < 0.9 and item["format"]["format"] == "vector-codebook" for item in inside)
    loaded = whit.load(tmp_path / "out", device="cpu")
    with torch.no_grad():
        logits = loaded(input_ids=tiny.inputs("llama")["input_ids"]).logits
    assert bool(torch.isfinite(logits).all())
