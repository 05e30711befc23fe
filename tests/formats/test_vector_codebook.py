import pytest
import torch
from torch import Tensor

from whit.formats import Packed, format_from_json
from whit.formats.vector_codebook import VectorCodebook


def random_packed(rows: int, columns: int, layout: VectorCodebook) -> tuple[Packed, list[Tensor]]:
    generator = torch.Generator().manual_seed(rows + columns)
    codes = torch.randint(0, layout.codes, (rows, layout.groups(columns)), generator=generator)
    scales = torch.randn(rows, generator=generator).half()
    span = 1 if layout.ternary else 127
    book = torch.randint(-span, span + 1, (layout.codes // 2, layout.width), generator=generator)
    return layout.pack(codes, scales, book, columns), [codes, scales, book]


@pytest.mark.parametrize("ternary", [False, True])
@pytest.mark.parametrize(("codes", "width"), [(256, 12), (64, 8), (4, 1), (32, 7)])
@pytest.mark.parametrize("columns", [48, 37, 5])
def test_unpacking_is_the_written_equation_bit_for_bit(ternary: bool, codes: int, width: int, columns: int) -> None:
    packed, (chosen, scales, book) = random_packed(5, columns, VectorCodebook(codes, width, ternary))
    weight = packed.unpack()
    for row in range(5):
        for column in range(columns):
            code = int(chosen[row, column // width])
            entry = float(book[code % (codes // 2), column % width]) / (1 if ternary else 128)
            sign = -1 if code >= codes // 2 else 1
            assert weight[row, column] == sign * entry * float(scales[row])
    index = torch.tensor([4, 1, 1])
    assert torch.equal(packed.format.unpack_rows(packed.tensors, 5, columns, index), weight[index])
    assert packed.stored_bytes() == packed.format.bytes(5, columns)


@pytest.mark.parametrize(
    ("codes", "width", "ternary", "size", "bits"),
    [
        (64, 8, True, 576, 0.75 + 16 / 576 + 512 / 576**2),
        (256, 8, True, 576, 1 + 16 / 576 + 2048 / 576**2),
        (64, 8, False, 576, 0.75 + 16 / 576 + 2048 / 576**2),
        (256, 12, False, 576, 2 / 3 + 16 / 576 + 12288 / 576**2),
        (256, 8, False, 4096, 1 + 16 / 4096 + 8192 / 4096**2),
        (64, 8, False, 4096, 0.75 + 16 / 4096 + 2048 / 4096**2),
    ],
)
def test_stored_bits_are_the_formula_and_below_the_claims(
    codes: int, width: int, ternary: bool, size: int, bits: float
) -> None:
    stored = VectorCodebook(codes, width, ternary).bytes(size, size) * 8 / size**2
    assert stored == pytest.approx(bits)
    assert stored < (1.02 if size == 4096 else 1.04)


def test_it_comes_back_from_json_and_refuses_nonsense() -> None:
    layout = VectorCodebook(64, 8, True)
    assert format_from_json(layout.to_json()) == layout
    for codes, width in ((65, 8), (512, 8), (2, 8), (64, 0)):
        with pytest.raises(ValueError, match="must be"):
            VectorCodebook(codes, width, False)
