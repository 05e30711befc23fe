import math
from fractions import Fraction

import pytest
import torch

from tests.methods.layers import layer
from whit.methods import LayerStatistics, make_method
from whit.methods.allocation import outlier_share, owl_shares, whole_steps
from whit.methods.base import SurveyedBlock
from whit.methods.chain import PruneThenQuantise
from whit.methods.rtn import RTN


def blocks(scores, sizes=None):
    sizes = sizes or [1000] * len(scores)
    return [SurveyedBlock(f"block.{i}", score, size) for i, (score, size) in enumerate(zip(scores, sizes, strict=True))]


def test_outliers_are_counted_against_the_mean_of_the_whole_block():
    scores = [torch.tensor([[1.0, 1, 1, 1]]), torch.tensor([[1.0, 1, 1, 33]])]  # mean 5
    assert outlier_share(scores, 5) == 1 / 8
    assert outlier_share(scores, 7) == 0
    assert outlier_share([scores[0]], 1.5) == 0


def test_shares_span_twice_lambda_around_the_target():
    shares = owl_shares([0.0, 1.0, 4.0], [10, 10, 10], 0.5, 0.08)
    assert max(shares) - min(shares) == pytest.approx(0.16)
    assert sum(shares) / 3 == pytest.approx(0.5)
    assert shares[1] - shares[0] == pytest.approx(0.04)
    weighted = owl_shares([0.0, 4.0], [10, 30], 0.5, 0.08)
    assert (10 * weighted[0] + 30 * weighted[1]) / 40 == pytest.approx(0.5)
    assert owl_shares([2.0, 2.0], [10, 30], 0.5, 0.08) == [0.5, 0.5]


@pytest.mark.parametrize("seed", range(20))
def test_whole_steps_never_exceed_the_budget_and_stay_close(seed):
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 20, (1,), generator=generator))
    sizes = torch.randint(50, 5000, (count,), generator=generator).tolist()
    average = Fraction(int(torch.randint(3, 7, (1,), generator=generator)))
    ideal = (float(average) + 6 * (torch.rand(count, generator=generator) - 0.5)).tolist()
    steps = whole_steps(ideal, sizes, 1, 7, average)
    used = sum(step * size for step, size in zip(steps, sizes, strict=True))
    assert used <= average * sum(sizes)
    assert all(1 <= step <= 7 for step in steps)
    room = [size for step, size in zip(steps, sizes, strict=True) if step < 7]
    assert not room or average * sum(sizes) - used < min(room), "no further step would fit"


def test_ideal_steps_that_fit_are_kept():
    assert whole_steps([3, 5, 4], [10, 10, 10], 1, 7, Fraction(4)) == [3, 5, 4]
    assert whole_steps([3.6, 4.4, 4.0], [10, 10, 10], 1, 7, Fraction(4)) == [4, 4, 4]
    assert whole_steps([9.0, 2.0], [10, 10], 1, 7, Fraction(4)) == [7, 1], "a block at its limit is below its ideal"


@pytest.mark.parametrize("name", ["magnitude", "wanda", "ria", "pruner-zero", "sparsegpt"])
@pytest.mark.parametrize("options", [{"sparsity": 0.7}, {}, {"pattern": "4:8", "owl_span": 0.3}])
def test_owl_keeps_more_where_there_are_more_outliers_within_the_budget(name, options):
    method = make_method(name, {**options, "allocation": "owl"})
    sizes = [64 * 64, 64 * 128, 64 * 64, 64 * 192]
    parts = method.allocate(blocks([0.1, 0.4, 0.2, 0.0], sizes))
    shapes = [(64, 64), (64, 128), (64, 64), (64, 192)]
    kept = [math.prod(part.kept_shape(*shape)) for part, shape in zip(parts, shapes, strict=True)]
    shares = [count / size for count, size in zip(kept, sizes, strict=True)]
    assert shares[1] == max(shares) and shares[3] == min(shares)
    assert shares[1] > shares[3]
    target = 0.3 if "sparsity" in options else 0.5
    assert target - 1 / 16 < sum(kept) / sum(sizes) <= target
    assert all(part.allocation == "uniform" for part in parts), "a part is not divided again"


def test_uniform_and_single_blocks_are_left_as_they_are():
    method = make_method("wanda")
    assert method.allocate(blocks([0.1, 0.9])) == [method, method]
    assert method.survey([], []) == 0
    alone = make_method("wanda", {"allocation": "owl"}).allocate(blocks([0.3]))
    assert alone == [make_method("wanda", {"sparsity": 0.5})]
    assert make_method("wanda", {"allocation": "owl"}).allocate([]) == []


def test_the_survey_counts_outliers_of_wanda_scores_whatever_the_method():
    (weight, statistics), (other, others) = layer(), layer(seed=1)
    scores = [part.abs() * item.input_square_sums().sqrt() for part, item in ((weight, statistics), (other, others))]
    for name in ("magnitude", "sparsegpt"):
        method = make_method(name, {"allocation": "owl", "owl_multiple": 3})
        found = method.survey([weight, other], [statistics, others])
        assert found == outlier_share(scores, 3)
        assert 0 < found < 0.2
    norms = LayerStatistics(192, square_sums=statistics.input_square_sums())
    assert method.survey([weight], [norms]) == method.survey([weight], [statistics])


def test_a_chain_hands_the_division_to_its_pruner():
    chain = PruneThenQuantise(make_method("wanda", {"allocation": "owl"}), RTN(bits=4))
    assert chain.survey_required() == chain.pruner.survey_required() != frozenset()
    parts = chain.allocate(blocks([0.1, 0.4]))
    assert [part.pruner for part in parts] == chain.pruner.allocate(blocks([0.1, 0.4]))
    assert all(part.quantiser == RTN(bits=4) for part in parts)
    weight, statistics = layer()
    assert chain.survey([weight], [statistics]) == chain.pruner.survey([weight], [statistics])
