"""Sorting magnitudes with their columns, and the compiled loops of codebooks against plain torch, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whit.kernels.cpu.compiling import numba_works
from whit.methods import two_codebooks
from whit.methods.two_codebooks import ascending, choose_marks, fit_codebooks, two_magnitudes, two_magnitudes_by_column

needs_numba = pytest.mark.skipif(not numba_works(), reason="needs numba")


def grid(rows: int, columns: int) -> Tensor:
    """Magnitudes on a coarse grid: most are equal to others; zero and the smallest numbers are among them."""
    generator = torch.Generator().manual_seed(rows + columns)
    values = (4 * torch.randn(rows, columns, generator=generator)).round().abs() / 4
    values[:, ::7] *= 1e-45
    return values


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (70, 33), (33, 300), (5, 0), (0, 4)])
def test_equal_magnitudes_keep_the_order_of_their_columns(rows: int, columns: int) -> None:
    magnitude = grid(rows, columns)
    expected = torch.sort(magnitude, dim=1, stable=True)
    for given in (magnitude, magnitude.T.contiguous().T, magnitude.double()):
        ordered, column = ascending(given)
        assert ordered.dtype == given.dtype
        assert torch.equal(ordered.float(), expected.values)
        assert torch.equal(column.long(), expected.indices)


@needs_numba
@pytest.mark.parametrize("columns", [1, 37, 300])
def test_compiled_loops_are_plain_torch_to_the_bit(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(50, columns, generator=generator).sign() * grid(50, columns)
    importance = torch.rand(columns, generator=generator) ** 4 + 1e-3
    ordered, column = ascending(weight.abs())
    some = torch.rand(columns, generator=generator) < 0.3

    def answers() -> list[Tensor]:
        marks = choose_marks(weight, importance)
        return [
            *two_magnitudes_by_column(ordered, column, importance * some),
            two_codebooks._squared_errors(weight.abs(), ordered[:, 0], ordered[:, -1]),
            marks,
            *fit_codebooks(weight, importance, marks),
        ]

    found = answers()
    low, high = two_magnitudes(ordered, (importance * some)[column.long()])
    assert torch.equal(found[0], low) and torch.equal(found[1], high)
    monkeypatch.setattr(two_codebooks, "runs_compiled", lambda tensor: False)
    for compiled, plain in zip(found, answers(), strict=True):
        assert torch.equal(compiled, plain)
