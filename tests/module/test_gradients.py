"""Gradients of the user's loss, sample by sample, and budgets divided among the blocks of the user's module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tests.module.nets import WIDTH, Convolutions, Residual, images, seeded, vectors
from whit.errors import DataError, ModelError
from whit.methods.base import Compressed, Method, SurveyedBlock
from whit.methods.rtn import RTN
from whit.methods.statistics import LayerStatistics, Statistic
from whit.module.assign import assign_module
from whit.module.calibration import Feed, call
from whit.module.compress import compress_module
from whit.module.gradients import loss_gradients, samples_of
from whit.pipeline.recipe import as_recipe

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Graded(RTN):
    """Round to nearest that asks for gradients, keeps what it is given, and has a budget to divide."""

    name: ClassVar[str] = "graded-for-tests"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.GRADIENT})
    seen: ClassVar[list[Tensor]] = []

    def compress(self, weight: Tensor, statistics: LayerStatistics) -> Compressed:
        assert statistics.gradient is not None and statistics.gradient.shape == weight.shape
        self.seen.append(statistics.gradient)
        return super().compress(weight, statistics)


@dataclass(frozen=True)
class Budgeted(RTN):
    """Gives the block with the largest inputs twice the bits of the others."""

    name: ClassVar[str] = "budgeted-for-tests"
    survey_needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.SQUARE_SUMS})
    blocks: ClassVar[list[SurveyedBlock]] = []

    def survey(self, weights: Sequence[Tensor], statistics: Sequence[LayerStatistics]) -> float:
        assert all(weight.shape[1] == item.columns for weight, item in zip(weights, statistics, strict=True))
        return float(sum(item.input_square_sums().sum() for item in statistics))

    def allocate(self, blocks: Sequence[SurveyedBlock]) -> list[Any]:
        self.blocks[:] = blocks
        best = max(block.score for block in blocks)
        return [RTN(8 if block.score == best else 4, self.group_size) for block in blocks]


def cross_entropy(output: Tensor, item: Any) -> Tensor:
    return nn.functional.cross_entropy(output, item[1])


def labelled(inputs: Sequence[Tensor]) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [[item, torch.randint(0, 5, (len(item),), generator=generator)] for item in inputs]


def gradients(module: nn.Module, items: list[Any], loss: Callable[[Any, Any], Any]) -> dict[str, Tensor]:
    assignment = assign_module(module, as_recipe(RTN(8, 0), {}), ())
    return loss_gradients(module, assignment.layers, Feed(items, call, CPU), loss)[0]


@pytest.mark.parametrize(("make", "inputs"), [(Residual, vectors), (Convolutions, images)])
def test_gradients_are_those_of_single_samples(make: type[nn.Module], inputs: Any) -> None:
    module, items = seeded(make).eval(), labelled(inputs(2, 3))
    found = gradients(module, items, cross_entropy)
    squares = {name: torch.zeros_like(module.get_parameter(f"{name}.weight")) for name in found}
    for batch, labels in items:
        for index in range(len(batch)):
            module.zero_grad()
            cross_entropy(module(batch[index : index + 1]), [None, labels[index : index + 1]]).backward()
            for name, total in squares.items():
                total += module.get_parameter(f"{name}.weight").grad.square()
    assert set(found) >= {"head"}
    for name, gradient in found.items():
        assert gradient.dim() == 2
        torch.testing.assert_close(gradient, squares[name].flatten(1).sqrt(), rtol=1e-4, atol=1e-7)


def test_the_batch_size_changes_nothing() -> None:
    module = seeded(Residual).eval()
    one = gradients(module, labelled([torch.cat(vectors(2, 3))]), cross_entropy)
    parts = [
        [a[None], b[None]]
        for batch, labels in labelled([torch.cat(vectors(2, 3))])
        for a, b in zip(batch, labels, strict=True)
    ]
    many = gradients(module, parts, cross_entropy)
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, many[name], rtol=1e-5, atol=1e-8)


def test_frozen_weights_have_gradients_and_stay_frozen() -> None:
    module = seeded(Residual).requires_grad_(False)
    found = gradients(module, labelled(vectors(1, 3)), cross_entropy)
    assert set(found) == {"up", "gate", "down", "head"}
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_items_that_are_no_batch_are_one_sample() -> None:
    x, y = torch.ones(3, 2), torch.ones(4)
    assert len(list(samples_of([x, torch.ones(3)]))) == 3
    assert len(list(samples_of((x, y)))) == 1  # two leading dimensions
    assert len(list(samples_of({"x": x, "scale": torch.tensor(2.0)}))) == 1  # a scalar belongs to all
    (part, *_) = samples_of({"x": x, "y": (x, [x]), "flag": True})
    assert part["y"][1][0].shape == (1, 2) and part["flag"] is True


def test_a_method_gets_the_gradient_of_its_layer() -> None:
    Graded.seen.clear()
    module, items = seeded(Residual), labelled(vectors())
    result = compress_module(module, Graded(4, 0), calibration=items, loss=cross_entropy)
    expected = gradients(module.eval(), items, cross_entropy)
    assert len(Graded.seen) == len(result.layers) == 4
    for record, gradient in zip(("up", "gate", "down", "head"), Graded.seen, strict=True):
        assert torch.equal(gradient, expected[record])


def test_a_layer_that_the_loss_does_not_depend_on_is_left_alone() -> None:
    class Idle(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            self.idle(x)
            return super().forward(x)

    result = compress_module(seeded(Idle), Graded(4, 0), calibration=labelled(vectors()), loss=cross_entropy)
    assert result.untouched["idle"] == "the loss does not depend on it, so it has no gradient"


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (None, DataError, r"'graded-for-tests' needs gradients: pass loss=lambda output, item"),
        (lambda output, item: output, DataError, r"gave shape \(1, 5\) for calibration item 1: return a scalar"),
        (lambda output, item: 3.0, DataError, "gave a float for calibration item 1"),
        (lambda output, item: output.detach().sum(), DataError, "does not depend on the module's weights"),
        (lambda output, item: (output * 0).sum(), ModelError, "is zero throughout"),
        (lambda output, item: (output * torch.inf).sum(), ModelError, "holds NaN or Inf"),
    ],
)
def test_losses_without_a_usable_gradient_are_refused(loss: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        compress_module(seeded(Residual), Graded(4, 0), calibration=labelled(vectors()), loss=loss)


def test_a_budget_is_divided_among_repeated_blocks_and_layers_outside_them() -> None:
    blocks = [seeded(Residual, seed) for seed in range(2)]
    blocks[0].head = nn.Linear(WIDTH, WIDTH)
    module = nn.ModuleDict({"body": nn.Sequential(*blocks), "end": nn.Linear(5, 3)})
    module.forward = lambda x: module["end"](module["body"](x))  # type: ignore[method-assign]
    result = compress_module(
        module,
        Budgeted(4, 0),
        calibration=vectors(),
        forward=lambda part, x: part["end"](part["body"](x)),
        in_place=True,
    )
    assert [block.name for block in Budgeted.blocks] == ["body.0", "body.1", "end"]
    assert Budgeted.blocks[2].parameters == 15
    bits = {record.name: record.method["bits"] for record in result.layers}
    best = max(Budgeted.blocks, key=lambda block: block.score).name
    assert {name for name, value in bits.items() if value == 8} == {name for name in bits if name.startswith(best)}
    assert set(bits.values()) == {4, 8}


def test_without_repeated_blocks_every_layer_is_a_block() -> None:
    compress_module(seeded(Residual), Budgeted(4, 0), calibration=vectors())
    assert [block.name for block in Budgeted.blocks] == ["up", "gate", "down", "head"]
    assert issubclass(Budgeted, Method)
