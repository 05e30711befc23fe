import itertools

import pytest
import torch

from whit.methods import LayerStatistics, make_method, relative_output_error

NOTHING = LayerStatistics(columns=0)


def q4_1_weights(offset=0.0):
    """Rows of 32-wide blocks d * code + m as in GGUF Q4_1, m = -(zero + offset) * d; both ends used."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (12, 4, 32), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15
    step = (torch.rand(12, 4, 1, generator=generator) * 0.02 + 0.001).half().float()
    zero = torch.randint(1, 15, (12, 4, 1), generator=generator)
    return (step * (codes - zero - offset)).reshape(12, 128), step


def test_weights_on_a_4_bit_grid_come_back_exactly():
    weight, _ = q4_1_weights()
    packed = make_method("rtn", {"bits": 4, "group_size": 32}).compress(weight, NOTHING).packed
    assert torch.equal(packed.unpack(), weight)


def test_an_offset_that_is_no_multiple_of_the_step_costs_at_most_half_a_step():
    weight, step = q4_1_weights(offset=0.375)
    packed = make_method("rtn", {"bits": 4, "group_size": 32}).compress(weight, NOTHING).packed
    error = (packed.unpack() - weight).abs().reshape(12, 4, 32) / step
    torch.testing.assert_close(error, torch.full_like(error, 0.375), rtol=0, atol=0.02)


def test_weights_on_an_8_bit_grid_are_nearly_exact():
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-127, 128, (8, 4, 32), generator=generator)
    weight = (codes * torch.rand(8, 4, 1, generator=generator).half().float()).reshape(8, 128)
    packed = make_method("rtn", {"bits": 8, "group_size": 32, "symmetric": True}).compress(weight, NOTHING).packed
    assert relative_output_error(weight, packed.unpack(), None) < 5e-5


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("rows", "columns", "group"), [(5, 40, 16), (1, 7, 128), (3, 1, 1), (4, 130, 0)])
def test_ragged_and_tiny_shapes_round_within_half_a_step(bits, symmetric, rows, columns, group):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(bits))
    before = weight.clone()
    method = make_method("rtn", {"bits": bits, "group_size": group, "symmetric": symmetric})
    packed = method.compress(weight, NOTHING).packed
    assert torch.equal(weight, before)
    assert packed.format == method.format(rows, columns)
    assert packed.stored_bytes() == packed.format.bytes(rows, columns)
    if bits > 1:
        size = packed.format.group_size or columns
        steps = packed.tensors["scales"].float().repeat_interleave(size, 1)[:, :columns]
        # Half a step, and half a step more at the end that a whole zero point or a centred grid cuts off.
        assert ((packed.unpack() - weight).abs() <= 1.01 * steps).all()


def test_more_bits_are_closer():
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    errors = [
        relative_output_error(
            weight, make_method("rtn", {"bits": bits}).compress(weight, NOTHING).packed.unpack(), None
        )
        for bits in range(1, 9)
    ]
    assert all(later < earlier / 2 for earlier, later in itertools.pairwise(errors))
