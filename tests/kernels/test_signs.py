"""Sums over signed codes and decoding: compiled loops against plain torch."""

from __future__ import annotations

import pytest
import torch

from whit.formats.binary_residual import BinaryResidual
from whit.kernels import signs
from whit.kernels.cpu import compiling

needs_numba = pytest.mark.skipif(not compiling.numba_works(), reason="needs numba")
SIZES = [(1, 1), (7, 33), (40, 130)]


def two_ways(monkeypatch: pytest.MonkeyPatch, call):  # type: ignore[no-untyped-def]
    """The answer of the compiled loop, then that of plain torch."""
    compiled = call()
    monkeypatch.setattr(compiling, "numba_works", lambda: False)
    return compiled, call()


@needs_numba
@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_signed_sums(columns: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    products = torch.randn(columns, 3, rows, generator=generator)
    codes = torch.randint(0, 4, (columns, rows), generator=generator, dtype=torch.uint8)
    compiled, plain = two_ways(monkeypatch, lambda: signs.signed_sums(products, codes))
    expected = torch.einsum("scr,ckr->ksr", signs.patterns(codes), products)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(plain, expected)


@needs_numba
@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_sums_over_some_columns_and_patterns(columns: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    products = torch.randn(columns, 2, rows, generator=generator)
    codes = torch.randint(0, 4, (columns, rows), generator=generator, dtype=torch.uint8)
    chosen = signs.ColumnsAt(codes, torch.arange(0, columns, 3))
    expected = signs.signed_sums(products[::3], codes[::3])
    compiled, plain = two_ways(monkeypatch, lambda: (signs.signed_sums_at(products, chosen), signs.pattern_rows(codes)))
    assert torch.equal(compiled[0], expected)
    torch.testing.assert_close(plain[0], expected)
    assert torch.equal(compiled[1].view(torch.int32), plain[1].view(torch.int32))
    assert torch.equal(chosen.own, codes[::3])


@needs_numba
@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_decoded_signs(columns: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 4, (columns, rows), generator=generator, dtype=torch.uint8)
    low, high = torch.rand(2, 3, rows, generator=generator)
    book = torch.randint(0, 3, (columns,), generator=generator)
    compiled, plain = two_ways(monkeypatch, lambda: signs.decode_signs(codes, low, high, book))
    assert torch.equal(compiled, plain)
    assert float(compiled.abs().max()) > 0


@needs_numba
@pytest.mark.parametrize("block_size", [0, 128, 12])
@pytest.mark.parametrize("means", [False, True])
def test_bit_planes(block_size: int, means: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns = 70, 275
    layout = BinaryResidual(block_size, means)
    signed, second = torch.rand(2, rows, columns, generator=generator) > 0.5
    scalars = torch.randn(rows, layout.blocks(columns), 7 if means else 4, generator=generator)
    packed = layout.pack(signed, second, torch.rand(columns, generator=generator) > 0.5, scalars)
    compiled, plain = two_ways(monkeypatch, packed.unpack)
    assert torch.equal(compiled, plain)
    assert len(compiled.unique()) > 8


def test_work_is_shared_out_completely() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for count in (1, 64, 65, 1000):
                seen = torch.zeros(count)
                compiling.shared_out(lambda first, last, seen=seen: seen[first:last].add_(1), count, 64)  # type: ignore[misc]
                assert torch.equal(seen, torch.ones(count))
    finally:
        torch.set_num_threads(before)


def test_a_failure_in_a_part_is_raised() -> None:
    def fail(first: int, last: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        compiling.shared_out(fail, 1000, 64)
