import json

import pytest
import torch

from tests.methods.layers import PRUNERS, SCORERS, layer
from whit.errors import KnobError, ModelError
from whit.methods import LayerStatistics, Statistic, make_method, method_class, method_from_json, relative_output_error
from whit.methods.masks import dropped, keep_in_groups, keep_in_matrix, keep_in_rows
from whit.methods.scores import pruner_zero_score, ria_score, wanda_score


def mask_of(method, weight, statistics):
    return method.prune(weight, statistics).kept


def test_the_lowest_go_and_the_first_of_equals():
    scores = torch.tensor([[5.0, 1, 4, 2, 8, 7, 3, 6]])
    assert keep_in_groups(scores, 4, 8).nonzero()[:, 1].tolist() == [0, 4, 5, 7]
    assert keep_in_groups(scores, 2, 4).nonzero()[:, 1].tolist() == [0, 2, 4, 5]
    ties = torch.ones(2, 4)
    assert keep_in_rows(ties, 3).tolist() == [[False, False, False, True]] * 2
    assert keep_in_matrix(ties, 5).tolist() == [[False] * 4, [False, True, True, True]]


@pytest.mark.parametrize(
    ("count", "sparsity", "expected"), [(100, 0.29, 29), (10, 0.3, 3), (7, 0.5, 3), (576, 0.7, 403), (1, 0.99, 0)]
)
def test_how_many_go_is_the_floor_of_what_is_meant(count, sparsity, expected):
    assert dropped(count, sparsity) == expected


def test_pruner_zero_by_the_numbers():
    magnitude = torch.tensor([[0.5, 0.2, 0.1, 0.4], [0.3, 0.3, 0.6, 0.05]])
    gradient = torch.tensor([[0.1, 0.9, 0.5, 0.2], [0.4, 0.1, 0.1, 0.8]])
    expected = torch.tensor([[0, 0.04, 0.005, 0.02], [0.03375, 0, 0, 0.0021875]])
    weight = magnitude * torch.tensor([1.0, -1, 1, -1])  # the sign is irrelevant
    torch.testing.assert_close(pruner_zero_score(weight, gradient), expected)
    torch.testing.assert_close(pruner_zero_score(weight, 37 * gradient.half()), expected, rtol=2e-2, atol=1e-4)
    statistics = LayerStatistics(4, gradient=gradient)
    kept = mask_of(make_method("pruner-zero", {"sparsity": 0.5}), weight, statistics)
    assert [row.nonzero()[:, 0].tolist() for row in kept] == [[1, 3], [0, 3]]
    kept = mask_of(make_method("magnitude", {"sparsity": 0.5, "comparison": "row"}), weight, statistics)
    assert [row.nonzero()[:, 0].tolist() for row in kept] == [[0, 3], [1, 2]]


def test_gradients_are_scaled_over_the_whole_matrix():
    weight = torch.tensor([[0.3, 0.3, 0.6, 0.05]])
    gradient = torch.tensor([[0.4, 0.1, 0.1, 0.8]])
    alone = pruner_zero_score(weight, gradient)
    torch.testing.assert_close(alone, torch.tensor([[0.0385714, 0, 0, 0.0025]]))
    both = pruner_zero_score(weight.expand(2, 4), torch.cat([gradient, gradient + 1]))
    assert not torch.allclose(both[:1], alone)


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (None, "was not measured"),
        (torch.zeros(2, 4), "zero everywhere"),
        (torch.full((2, 4), 3.0), "3 for every weight"),
        (torch.tensor([[1.0, float("nan")]]).expand(4, 2).reshape(2, 4), "NaN or Inf"),
        (torch.tensor([[1.0, float("inf")]]).expand(4, 2).reshape(2, 4), "NaN or Inf"),
    ],
)
def test_gradients_that_rank_nothing_are_errors(gradient, message):
    with pytest.raises(ModelError, match=message):
        make_method("pruner-zero").compress(torch.ones(2, 4), LayerStatistics(4, tokens=8, gradient=gradient))


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.75])
def test_a_rank_one_gradient_makes_pruner_zero_wanda_with_the_root_of_the_norm(sparsity):
    weight, statistics = layer()
    norms = statistics.input_square_sums().sqrt()
    gradient = torch.rand(48, 1, generator=torch.Generator().manual_seed(3)) * norms
    gradient = torch.cat([gradient, torch.zeros(1, 192)])  # a row without gradient makes the minimum zero
    weight = torch.cat([weight, weight[:1]])
    options = {"sparsity": sparsity}
    zero = mask_of(make_method("pruner-zero", options), weight, LayerStatistics(192, gradient=gradient))
    root = keep_in_rows(wanda_score(weight, norms), dropped(192, sparsity))  # sqrt of the norm: norms for square sums
    assert torch.equal(zero[:-1], root[:-1])


def test_relative_importance_by_the_numbers():
    score = ria_score(torch.tensor([[1.0, -2], [3, 4]]), torch.ones(2), 0.5)
    torch.testing.assert_close(score, torch.tensor([[0.583333, 1.0], [1.178571, 1.238095]]))
    square_sums = torch.tensor([16.0, 1])
    torch.testing.assert_close(ria_score(torch.tensor([[1.0, 1]]), square_sums, 0.5), torch.tensor([[3.0, 1.5]]))
    assert ria_score(torch.zeros(2, 3), torch.ones(3), 0.5).tolist() == [[0] * 3] * 2


def test_wanda_takes_norms_from_square_sums_or_second_moments():
    weight, statistics = layer()
    norms = statistics.input_square_sums()
    method = make_method("wanda", {"pattern": "2:4"})
    alone = mask_of(method, weight, LayerStatistics(192, square_sums=norms))
    assert torch.equal(alone, mask_of(method, weight, statistics))
    assert torch.equal(alone, keep_in_groups(weight.abs() * (statistics.second_moment.diagonal() / 2).sqrt(), 2, 4))


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77])
def test_rows_are_exactly_as_sparse_as_asked(name, sparsity):
    weight, statistics = layer(columns=200)
    kept = mask_of(make_method(name, {"sparsity": sparsity, "comparison": "row"}), weight, statistics)
    if name == "sparsegpt":  # in blocks of 128 columns
        assert (~kept)[:, :128].sum(1).tolist() == [dropped(128, sparsity)] * 48
        assert (~kept)[:, 128:].sum(1).tolist() == [dropped(72, sparsity)] * 48
    else:
        assert (~kept).sum(1).tolist() == [dropped(200, sparsity)] * 48


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77])
def test_matrices_are_exactly_as_sparse_as_asked(name, sparsity):
    weight, statistics = layer(columns=200)
    where = "block" if name == "sparsegpt" else "matrix"
    kept = mask_of(make_method(name, {"sparsity": sparsity, "comparison": where}), weight, statistics)
    counts = [48 * 128, 48 * 72] if name == "sparsegpt" else [48 * 200]
    assert int((~kept).sum()) == sum(dropped(count, sparsity) for count in counts)
    assert len(set((~kept).sum(1).tolist())) > 1, "rows differ"


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (5, 8), (7, 20)])
def test_each_group_keeps_exactly_n(name, n, m):
    weight, statistics = layer(columns=200)
    kept = mask_of(make_method(name, {"pattern": f"{n}:{m}"}), weight, statistics)
    assert (kept.reshape(48, -1, m).sum(-1) == n).all()


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("comparison", ["row", "matrix"])
def test_what_a_lower_sparsity_drops_a_higher_one_drops_too(name, comparison):
    weight, statistics = layer()
    masks = [
        mask_of(make_method(name, {"sparsity": s, "comparison": comparison}), weight, statistics)
        for s in (0.2, 0.5, 0.8)
    ]
    assert not (masks[1] & ~masks[0]).any() and not (masks[2] & ~masks[1]).any()
    assert masks[0].sum() > masks[1].sum() > masks[2].sum()


def test_only_the_order_within_a_comparison_counts():
    scores = torch.rand(6, 40, generator=torch.Generator().manual_seed(0))
    by_row = torch.rand(6, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    for keep in (lambda s: keep_in_rows(s, 13), lambda s: keep_in_groups(s, 2, 4), lambda s: keep_in_matrix(s, 99)):
        assert torch.equal(keep(scores), keep(scores.exp() * 7 + 3))
    for keep in (lambda s: keep_in_rows(s, 13), lambda s: keep_in_groups(s, 2, 4)):
        assert torch.equal(keep(scores), keep(scores * by_row - by_row))


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("options", [{"pattern": "2:4"}, {"sparsity": 0.4}, {"sparsity": 0.4, "comparison": "row"}])
def test_the_packed_weight_is_the_pruned_one_and_its_size_was_known(name, options):
    weight, statistics = layer()
    method = make_method(name, {**options, "value_dtype": "float32"})
    before = weight.clone(), statistics.second_moment.clone(), statistics.gradient.clone()
    pruned, packed = method.prune(weight, statistics), method.compress(weight, statistics).packed
    assert all(
        torch.equal(*pair) for pair in zip(before, (weight, statistics.second_moment, statistics.gradient), strict=True)
    ), "inputs are never written"
    assert torch.equal(packed.unpack(), pruned.weight)
    assert not pruned.weight[~pruned.kept].any()
    assert packed.format == method.format(48, 192)
    assert packed.stored_bytes() == method.format(48, 192).bytes(48, 192)
    if name != "sparsegpt":
        assert torch.equal(pruned.weight[pruned.kept], weight[pruned.kept])


def test_half_of_a_float16_weight_takes_nine_bits_and_two_of_four_less():
    weight, statistics = layer(columns=384)
    assert make_method("wanda").compress(weight, statistics).packed.stored_bits() == 9
    packed = make_method("wanda", {"pattern": "2:4"}).compress(weight, statistics).packed
    assert packed.stored_bits() == pytest.approx(8 + 2 / 3)


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("options", [{"pattern": "2:4"}, {"pattern": "4:8"}, {}])
def test_the_update_keeps_the_mask_and_lowers_the_output_error(name, options):
    for seed in range(2):
        weight, statistics = layer(seed=seed)
        plain = make_method(name, options).prune(weight, statistics)
        better = make_method(name, {**options, "update": True}).prune(weight, statistics)
        assert torch.equal(plain.kept, better.kept)
        assert not better.weight[~better.kept].any()
        moment = statistics.second_moment
        error = relative_output_error(weight, plain.weight, moment)
        assert relative_output_error(weight, better.weight, moment) < 0.5 * error


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": "4:8"}, {"pattern": "2:4"}])
def test_methods_come_in_the_order_of_the_literature(options):
    errors = dict.fromkeys(PRUNERS, 0.0)
    for seed in range(3):
        weight, statistics = layer(seed=seed)
        for name in PRUNERS:
            pruned = make_method(name, options).compress(weight, statistics).packed.unpack()
            errors[name] += relative_output_error(weight, pruned, statistics.second_moment)
    assert errors["sparsegpt"] < 0.5 * errors["wanda"]
    assert max(errors["wanda"], errors["ria"], errors["pruner-zero"]) < 0.8 * errors["magnitude"]


@pytest.mark.parametrize("name", PRUNERS)
def test_freer_patterns_cost_less(name):
    weight, statistics = layer()
    errors = [
        relative_output_error(
            weight, make_method(name, options).compress(weight, statistics).packed.unpack(), statistics.second_moment
        )
        for options in ({"sparsity": 0.5}, {"pattern": "4:8"}, {"pattern": "2:4"})
    ]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "5:4"}, "pattern '5:4' is not N:M with 1 <= N < M: N weights KEPT of every M columns"),
        ({"pattern": "4:4"}, "'4:4' is not N:M"),
        ({"pattern": "0:4"}, "'0:4' is not N:M"),
        ({"pattern": "2-4"}, "'2-4' is not N:M"),
        ({"pattern": "2:4 "}, "'2:4 ' is not N:M"),
        ({"pattern": "2:4", "sparsity": 0.5}, "'sparsity' of method 'wanda' does nothing with a pattern"),
        ({"pattern": "2:4", "comparison": "row"}, "'comparison' of method 'wanda' does nothing with a pattern"),
        ({"sparsity": 0.0}, "between 0 and 1, neither of them, got 0.0"),
        ({"sparsity": 1.0}, "between 0 and 1, neither of them, got 1.0"),
        ({"sparsity": 1.5}, "at most 1, got 1.5"),
        ({"sparsity": float("nan")}, "at least 0, got nan"),
        ({"damping": 0.1}, "'damping' of method 'wanda' does nothing without update"),
        ({"owl_span": 0.1}, "'owl_span' of method 'wanda' does nothing with allocation 'uniform'"),
        ({"allocation": "owl", "sparsity": 0.999}, "sparsity of at most 0.984375"),
        ({"allocation": "sine"}, "one of uniform, owl, got 'sine'"),
        ({"value_dtype": "int8"}, "one of float16, bfloat16, float32"),
    ],
)
def test_knobs_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(KnobError, match=message):
        make_method("wanda", options)


def test_sparsegpt_refuses_what_a_pattern_makes_idle():
    with pytest.raises(KnobError, match="'block_size' of method 'sparsegpt' does nothing with a pattern"):
        make_method("sparsegpt", {"pattern": "2:4", "block_size": 64})


@pytest.mark.parametrize("name", PRUNERS)
def test_columns_that_do_not_fit_the_pattern_are_refused_before_the_work(name):
    with pytest.raises(KnobError, match="a 8 x 90 weight cannot be pruned 2:4, its columns are not divisible by 4"):
        make_method(name, {"pattern": "2:4"}).format(8, 90)


def test_statistics_are_asked_for_by_need():
    assert make_method("magnitude").required() == frozenset()
    assert make_method("wanda").required() == {Statistic.SQUARE_SUMS}
    assert make_method("wanda", {"update": True}).required() == {Statistic.SECOND_MOMENT}
    assert make_method("pruner-zero", {"update": True}).required() == {Statistic.GRADIENT, Statistic.SECOND_MOMENT}
    assert make_method("magnitude").survey_required() == frozenset()
    assert make_method("magnitude", {"allocation": "owl"}).survey_required() == {Statistic.SQUARE_SUMS}


@pytest.mark.parametrize("name", PRUNERS)
def test_json_brings_the_method_back(name):
    method = make_method(name, {"pattern": "4:8", "allocation": "owl", "owl_span": 0.25})
    assert method_from_json(json.loads(json.dumps(method.to_json()))) == method
    assert method_class(name).prunes


def test_a_weight_beyond_the_dtype_of_the_values_is_an_error_with_the_remedy():
    weight = torch.full((4, 8), 1e5)
    with pytest.raises(ModelError, match="beyond float16: choose another dtype"):
        make_method("magnitude").compress(weight, LayerStatistics(8))
    packed = make_method("magnitude", {"value_dtype": "float32"}).compress(weight, LayerStatistics(8)).packed
    assert int((packed.unpack() == 1e5).sum()) == 16


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (3, 1), (2, 130), (5, 129)])
@pytest.mark.parametrize("name", PRUNERS)
def test_small_and_ragged_shapes(name, rows, columns):
    weight, statistics = layer(rows + 1, columns + 1)
    weight, gradient = weight[:rows, :columns].contiguous(), torch.arange(rows * columns + 1.0)[1:]
    statistics = LayerStatistics(
        columns, 9, statistics.second_moment[:columns, :columns], gradient=gradient.reshape(rows, columns)
    )
    if name == "pruner-zero" and rows * columns == 1:
        with pytest.raises(ModelError, match="ranks nothing"):
            make_method(name).compress(weight, statistics)
        return
    packed = make_method(name).compress(weight, statistics).packed
    assert packed.format == make_method(name).format(rows, columns)
    assert packed.unpack().count_nonzero() >= 1


def test_inputs_never_active_are_pruned_first_and_noted_by_an_update():
    weight, statistics = layer()
    moment = statistics.second_moment.clone()
    moment[[5, 77]] = 0
    moment[:, [5, 77]] = 0
    dead = LayerStatistics(192, 1, moment)
    for name, options in (("wanda", {}), ("wanda", {"update": True}), ("sparsegpt", {})):
        result = make_method(name, options).compress(weight, dead)
        assert not result.packed.unpack()[:, [5, 77]].any()
        assert bool(result.notes) == (name == "sparsegpt" or bool(options))
