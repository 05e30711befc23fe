"""BiLLM as a method: packing of each variant, the paper's searches, and what the refined variant promises."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from whit.errors import KnobError, ModelError
from whit.formats.binary_residual import BinaryResidual
from whit.kernels.cpu.compiling import numba_works
from whit.methods import LayerStatistics, make_method, relative_output_error, two_codebooks
from whit.methods.billm import BiLLM
from whit.methods.billm_official import official_billm
from whit.methods.billm_paper import paper_billm, search_salient_columns, search_split
from whit.methods.billm_refined import Codebooks, descend, refined_billm, refit, storable
from whit.methods.two_codebooks import choose_marks, two_magnitudes

VARIANTS = ("whit", "paper", "official")


def synthetic_layer(seed: int, rows: int, columns: int, tokens: int) -> tuple[Tensor, LayerStatistics]:
    """Gaussian weights; inputs of rank 64 plus noise, six channels eight times as large."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(64, columns, generator=generator)
    inputs = torch.randn(tokens, 64, generator=generator) @ mixing / 8 + 0.5 * torch.randn(
        tokens, columns, generator=generator
    )
    inputs[:, torch.randperm(columns, generator=generator)[:6]] *= 8
    weight = 0.02 * torch.randn(rows, columns, generator=generator)
    return weight, LayerStatistics(columns, tokens, inputs.T @ inputs * 2 / 8)


def error_of(method: BiLLM, weight: Tensor, statistics: LayerStatistics) -> float:
    packed = method.compress(weight, statistics).packed
    return relative_output_error(weight, packed.unpack(), statistics.second_moment)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_synthetic_layers_rank_the_variants_as_published_and_measured(seed: int) -> None:
    weight, statistics = synthetic_layer(seed, 96, 256, 2048)
    rtn = error_of(BiLLM(variant="official", compensate=False), weight, statistics)
    official = error_of(BiLLM(variant="official"), weight, statistics)
    rounded = error_of(BiLLM(passes=0), weight, statistics)
    whit = error_of(BiLLM(), weight, statistics)
    assert whit < rounded < official < rtn
    assert whit < 0.6 * official
    assert BiLLM().format(96, 256).bytes(96, 256) < BiLLM(variant="official").format(96, 256).bytes(96, 256)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("columns", "block"), [(128, None), (178, None), (40, None), (200, 64), (3, None)])
def test_every_width_is_packed_in_the_promised_format(variant: str, columns: int, block: int | None) -> None:
    weight, statistics = synthetic_layer(columns, 24, columns, 300) if columns > 6 else _narrow(columns)
    method = BiLLM(variant=variant, block_size=block)
    packed = method.compress(weight, statistics).packed
    assert packed.format == method.format(24, columns)
    assert packed.stored_bytes() == packed.format.bytes(24, columns)
    assert error_of(method, weight, statistics) < 0.6


def _narrow(columns: int) -> tuple[Tensor, LayerStatistics]:
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(50, columns, generator=generator)
    return torch.randn(24, columns, generator=generator), LayerStatistics(columns, 50, inputs.T @ inputs)


def test_the_official_variant_stores_its_result_up_to_rounded_scalars() -> None:
    weight, statistics = synthetic_layer(3, 32, 256, 1024)
    packed = BiLLM(variant="official").compress(weight, statistics).packed
    found = official_billm(weight, statistics.inverse_factor(0.01).upper)
    assert packed.stored_bits() == 2.875 + 1 / 32
    difference = (packed.unpack() - found.quantised).abs()
    assert float(difference.max()) <= 2**-9 * float(found.scalars.abs().sum(2).max())
    mean_c, scale_c, mean_s, scale_s, mean, scale_1, scale_2 = found.scalars.half().float().unbind(2)
    for row, column in itertools.product(range(0, 32, 5), range(0, 256, 7)):
        at = (row, column // 128)
        sign = 2.0 * found.first[row, column] - 1
        if found.salient[column]:
            expected = mean[at] + sign * scale_1[at] + (2.0 * found.second[row, column] - 1) * scale_2[at]
        elif found.sparse[row, column]:
            expected = mean_s[at] + sign * scale_s[at]
        else:
            expected = mean_c[at] + sign * scale_c[at]
        assert packed.unpack()[row, column] == expected


def test_the_paper_variant_is_compensated_for_what_is_stored() -> None:
    weight, statistics = synthetic_layer(4, 32, 256, 1024)
    packed = BiLLM(variant="paper").compress(weight, statistics).packed
    upper = statistics.inverse_factor(0.01).upper
    assert packed.stored_bits() == 2.5 + 1 / 32
    first = packed.unpack()[:, :128]
    changed = weight.clone()
    changed[:, 128:] -= ((weight[:, :128] - first) / torch.diagonal(upper)[:128]) @ upper[:128, 128:]
    alone = paper_billm(changed[:, 128:], upper[128:, 128:])
    assert torch.equal(packed.tensors["scalars"][:, 1], alone.scalars[:, 0].half())


def test_paper_searches_agree_with_trying_every_candidate() -> None:
    block = torch.randn(10, 24, generator=torch.Generator().manual_seed(5))
    scores = block.square().sum(0)
    ranked = scores.argsort(descending=True)

    def one_plane(values: Tensor) -> float:
        return float(values.square().sum() - (values.abs().sum(1).square() / max(values.shape[1], 1)).sum())

    errors = [one_plane(block[:, ranked[:k]]) + one_plane(block[:, ranked[k:]]) for k in range(1, 24)]
    marks = search_salient_columns(block, scores)
    assert int(marks.sum()) == 1 + min(range(23), key=errors.__getitem__)

    row = torch.tensor([[-4, -1, -0.5, 0.5, 1, 5]])
    split = search_split(row, torch.zeros(6, dtype=torch.bool))
    assert 1 <= float(split) < 4


@pytest.mark.parametrize(("split", "squared_error"), [(0.75, 12.75), (1.5, 0.75), (4.5, 8.70)])
def test_two_magnitudes_are_the_optimum_of_the_split_objective(split: float, squared_error: float) -> None:
    magnitude = torch.tensor([4, 1, 0.5, 0.5, 1, 5])
    parts = [magnitude[magnitude < split], magnitude[magnitude >= split]]
    naive = sum(float((part - part.mean()).square().sum()) for part in parts)
    assert naive == pytest.approx(squared_error, abs=5e-3)
    low, high = two_magnitudes(magnitude.sort().values[None], torch.ones(1, 6))
    assert (float(low), float(high)) == (0.75, 4.5)
    best = float(torch.minimum((magnitude - low) ** 2, (magnitude - high) ** 2).sum())
    assert best == pytest.approx(0.75) and best <= naive + 1e-6


def test_two_magnitudes_reach_the_gaussian_optimum_and_ignore_massless_entries() -> None:
    magnitude = torch.randn(4, 100_000, generator=torch.Generator().manual_seed(6)).abs().sort(1).values
    low, high = two_magnitudes(magnitude, torch.ones_like(magnitude))
    assert float((low + high).mean() / 2) == pytest.approx(0.982, abs=0.01)
    nearest = torch.minimum((magnitude - low[:, None]) ** 2, (magnitude - high[:, None]) ** 2)
    assert float(nearest.mean()) == pytest.approx(0.11748, abs=1e-3)
    low, high = two_magnitudes(torch.tensor([[1.0, 2.0, 50.0]]), torch.tensor([[1.0, 1.0, 0.0]]))
    assert (float(low), float(high)) == (1.0, 2.0)
    low, high = two_magnitudes(torch.tensor([[3.0, 7.0]]), torch.tensor([[0.0, 2.0]]))
    assert (float(low), float(high)) == (7.0, 7.0)


def test_marks_find_the_columns_that_need_another_codebook() -> None:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(2000, 50, generator=generator)
    odd = torch.zeros(50, dtype=torch.bool)
    odd[[3, 20, 21, 40]] = True
    weight[:, odd] *= 6
    marks = choose_marks(weight, 1.0 + odd.float())
    assert torch.equal(marks, odd)


def _state(seed: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Codebooks, Tensor, Tensor, Tensor]:
    """Target (columns, rows), H, codebooks, book, codes and values of a random start."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * columns, columns, generator=generator)
    moment = inputs.T @ inputs / columns + 0.1 * torch.eye(columns)
    target = torch.randn(columns, rows, generator=generator)
    books = storable(torch.full((2, rows), 0.4), torch.full((2, rows), 1.4))
    book = (torch.rand(columns, generator=generator) < 0.3).long()
    codes = torch.randint(0, 4, (columns, rows), generator=generator, dtype=torch.uint8)
    magnitude = torch.where(codes > 1, books.high[book], books.low[book])
    return target, moment, books, book, codes, torch.where(codes % 2 == 1, magnitude, -magnitude)


def test_descent_and_refitting_never_raise_the_loss_of_any_row() -> None:
    target, moment, books, book, codes, values = _state(8, 12, 150)
    gradient = moment @ (target - values)

    def loss() -> Tensor:
        difference = target - values
        return (difference * (moment @ difference)).sum(0)

    before = loss()
    for _ in range(3):
        books = refit(codes, values, gradient, moment, books, book)
        fitted = loss()
        assert bool((fitted <= before * 1.0001).all())
        descend(codes, values, gradient, moment, books, book)
        before = loss()
        assert bool((before <= fitted * 1.0001).all())
        assert torch.allclose(gradient, moment @ (target - values), atol=1e-3)
    assert float(before.sum()) < 0.5 * float((target * (moment @ target)).sum())


def test_refitting_is_the_joint_least_squares_optimum() -> None:
    target, moment, books, book, codes, values = _state(9, 3, 60)
    descend(codes, values, moment @ (target - values), moment, books, book)
    found = refit(codes, values, moment @ (target - values), moment, books, book)
    root = torch.linalg.cholesky(moment.double()).T
    for row in range(3):
        sign = codes[:, row].double() % 2 * 2 - 1
        groups = [(mark, large) for mark in (0, 1) for large in (False, True)]
        design = torch.stack([sign * ((book == m) & ((codes[:, row] > 1) == big)) for m, big in groups], 1)
        best = torch.linalg.lstsq(root @ design, root @ target[:, row : row + 1].double()).solution.flatten()
        got = torch.stack([found.low[0, row], found.high[0, row], found.low[1, row], found.high[1, row]])
        assert got.tolist() == pytest.approx(best.tolist(), rel=2e-3)


@pytest.mark.parametrize("block", [0, 64])
def test_whit_stores_exactly_what_it_optimised(block: int) -> None:
    weight, statistics = synthetic_layer(10, 20, 150, 600)
    factor = statistics.inverse_factor(0.05, statistics.descending_order())
    moment = statistics.second_moment
    assert moment is not None
    moment = moment + factor.damping * torch.diagonal(moment).mean() * torch.eye(150)
    order = statistics.descending_order()
    found = refined_billm(weight, moment[order][:, order], factor.upper, order, block_size=block)
    layout = BinaryResidual(block, means=False)
    packed = layout.pack(found.signs, found.second, found.salient, found.scalars)
    assert torch.equal(found.scalars, found.scalars.half().float())
    method = BiLLM(block_size=block).compress(weight, statistics).packed
    assert all(torch.equal(packed.tensors[name], method.tensors[name]) for name in packed.tensors)
    books = packed.tensors["scalars"].float()
    assert bool((books >= 0).all())
    assert bool((books[..., 1] >= books[..., 0]).all())


def test_books_survive_storage() -> None:
    generator = torch.Generator().manual_seed(11)
    low = torch.rand(4, 9, generator=generator)
    books = storable(low, low + torch.rand(4, 9, generator=generator))
    scale_c, scale_s, scale_1, scale_2 = books.scalars().unbind(2)
    assert torch.equal(scale_c.T, books.low[0::2]) and torch.equal(scale_s.T, books.high[0::2])
    assert torch.equal((scale_1 - scale_2).T, books.low[1::2]) and torch.equal((scale_1 + scale_2).T, books.high[1::2])


@pytest.mark.parametrize("variant", VARIANTS)
def test_dead_inputs_and_too_few_tokens_still_work(variant: str) -> None:
    generator = torch.Generator().manual_seed(12)
    inputs = torch.randn(20, 96, generator=generator)
    inputs[:, 10:14] = 0
    weight = torch.randn(16, 96, generator=generator)
    statistics = LayerStatistics(96, 20, inputs.T @ inputs)
    result = BiLLM(variant=variant, damping=0.0).compress(weight, statistics)
    assert any("damping raised" in note for note in result.notes)
    assert error_of(BiLLM(variant=variant), weight, statistics) < 0.5
    idle = LayerStatistics(96, 20, torch.zeros(96, 96))
    assert bool(torch.isfinite(BiLLM(variant=variant).compress(weight, idle).packed.unpack()).all())


@pytest.mark.parametrize("variant", VARIANTS)
def test_permuting_rows_permutes_the_packed_rows(variant: str) -> None:
    weight, statistics = synthetic_layer(13, 16, 128, 500)
    order = torch.arange(15, -1, -1)
    straight, flipped = (BiLLM(variant=variant).compress(w, statistics).packed for w in (weight, weight[order]))
    assert torch.allclose(straight.unpack()[order], flipped.unpack(), atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_input_gives_the_same_bytes_and_is_left_alone(variant: str) -> None:
    weight, statistics = synthetic_layer(14, 16, 128, 500)
    kept = weight.clone()
    first, second = (BiLLM(variant=variant).compress(weight, statistics).packed for _ in range(2))
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("variant", VARIANTS)
def test_scales_beyond_float16_are_refused(variant: str) -> None:
    weight, statistics = synthetic_layer(15, 8, 64, 200)
    with pytest.raises(ModelError, match="beyond float16"):
        BiLLM(variant=variant).compress(weight * 1e8, statistics)


def test_knobs_and_defaults() -> None:
    assert BiLLM().format(576, 1536) == BinaryResidual(0, means=False)
    assert BiLLM().format(576, 1536).bytes(576, 1536) * 8 / (576 * 1536) == pytest.approx(2 + 64 / 1536 + 1 / 576)
    assert BiLLM(variant="official").format(576, 1536) == BinaryResidual(128, means=True)
    assert BiLLM(variant="paper").format(64, 100) == BinaryResidual(0, means=False)
    assert make_method("billm", {"variant": "paper", "block-size": "64"}) == BiLLM(variant="paper", block_size=64)
    with pytest.raises(KnobError, match="oficial"):
        make_method("billm", {"variant": "oficial"})
    assert math.isclose(BiLLM(damping=0.2).damping or 0, 0.2)


@pytest.mark.parametrize(
    ("variant", "knob"),
    [("whit", "salient_limit"), ("whit", "compensate"), ("official", "passes"), ("paper", "passes")],
)
def test_a_knob_of_another_variant_is_refused(variant: str, knob: str) -> None:
    value = False if knob == "compensate" else 3
    with pytest.raises(KnobError, match=f"'{knob}'.*'{variant}'"):
        make_method("billm", {"variant": variant, knob: value})


@pytest.mark.skipif(not numba_works(), reason="needs numba")
def test_compiled_magnitudes_are_those_of_torch_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    cases = []
    for columns in (1, 2, 37, 300):
        magnitude = torch.randn(40, columns, generator=generator).abs()
        mass = torch.rand(40, columns, generator=generator) ** 4
        thin = mass * (torch.rand(columns, generator=generator) < 0.1)
        cases += [(magnitude, mass), ((4 * magnitude).round() / 4, 1e4 * thin), (1e-5 * magnitude, 0 * mass)]
    cases = [(magnitude.sort(1).values, mass) for magnitude, mass in cases]
    found = [two_magnitudes(*case) for case in cases]
    monkeypatch.setattr(two_codebooks, "runs_compiled", lambda tensor: False)
    for (low, high), case in zip(found, cases, strict=True):
        expected = two_magnitudes(*case)
        assert torch.equal(low, expected[0]) and torch.equal(high, expected[1])
