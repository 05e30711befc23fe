"""The kernels of a decoding step against their plain meaning, on a GPU or with Triton's interpreter on a CPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import os

import pytest
import torch
from torch import Tensor

from whit.kernels import decode_launch, decode_ops
from whit.kernels.decode_state import Chosen, KeyValues, Place

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS = importlib.util.find_spec("triton") is not None and (INTERPRETED or torch.cuda.is_available())
needs_triton = pytest.mark.skipif(not RUNS, reason="needs a GPU, or Triton with TRITON_INTERPRET=1")
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
# The interpreter cuts bfloat16 off instead of rounding it.
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)


def close(found: Tensor, wanted: Tensor) -> bool:
    unit = torch.finfo(wanted.dtype).eps
    units = 64 if wanted.dtype == torch.float32 else 4
    return bool(((found.double() - wanted.double()).abs() <= units * unit * wanted.double().abs().amax()).all())


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_ops, "has_kernels", lambda device: False)


@needs_triton
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [48, 256, 4096])
def test_norm_kernel(dtype: torch.dtype, columns: int) -> None:
    torch.manual_seed(columns)
    states, update = (torch.randn(3, columns, device=DEVICE).to(dtype) for _ in range(2))
    weight = torch.rand(columns, device=DEVICE).to(dtype)
    for added in (update, None):
        wanted = decode_ops.add_rms_norm(states, added, weight, 1e-5)
        found = decode_launch.launch_add_rms_norm(states, added, weight, 1e-5)
        assert torch.equal(found[0], wanted[0])
        assert close(found[1], wanted[1])


@needs_triton
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_kernel_takes_rows_that_lie_apart(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    both = (4 * torch.randn(3, 1400, device=DEVICE)).to(dtype)
    gate, up = both.split([700, 700], -1)
    assert close(decode_launch.launch_gated(gate, up), decode_ops.gated(gate, up))


def step_at(position: int, start: list[int], heads: int, size: int, length: int, splits: int, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    sequences = len(start)
    angle = torch.arange(length)[:, None] * 0.1 * torch.arange(1, size + 1)
    place = Place(
        torch.tensor(position, device=DEVICE),
        torch.tensor(start, device=DEVICE),
        angle.cos().to(DEVICE, dtype),
        angle.sin().to(DEVICE, dtype),
        torch.full((sequences * heads, splits, size + 2), torch.nan, device=DEVICE),
        torch.zeros(sequences * heads, dtype=torch.int32, device=DEVICE),
    )
    return place


@needs_triton
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(4, 4, 16), (6, 2, 24), (4, 1, 128)])
@pytest.mark.parametrize(("position", "start"), [(0, [0, 0]), (1, [0, 1]), (63, [0, 5]), (64, [0, 64]), (150, [0, 70])])
@pytest.mark.parametrize("splits", [1, 3])
def test_attention_kernel(
    dtype: torch.dtype, heads: int, key_heads: int, size: int, position: int, start: list[int], splits: int
) -> None:
    torch.manual_seed(position + heads)
    length, sequences = 160, len(start)
    place = step_at(position, start, heads, size, length, splits, dtype)
    keys, values = (torch.randn(sequences, key_heads, length, size, device=DEVICE).to(dtype) for _ in range(2))
    wide = torch.randn(sequences, (heads + 2 * key_heads) * size, device=DEVICE).to(dtype)
    query, key, value = wide.split([heads * size, key_heads * size, key_heads * size], -1)
    caches = [KeyValues(keys.clone(), values.clone()) for _ in range(2)]
    scaling = size**-0.5
    wanted = decode_ops.rotate_and_attend(query, key, value, caches[0], place, scaling)
    for _ in range(2):  # the second call finds the counters as the first left them
        found = decode_launch.launch_rotate_and_attend(query, key, value, caches[1], place, scaling)
        assert close(found, wanted)
    assert close(caches[1].keys, caches[0].keys)
    assert torch.equal(caches[1].values, caches[0].values)
    assert int(place.arrived.abs().sum()) == 0


@needs_triton
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(4, 4, 16), (6, 2, 24), (3, 1, 128)])
def test_prompt_kernel(dtype: torch.dtype, heads: int, key_heads: int, size: int) -> None:
    torch.manual_seed(heads)
    start, tokens, length = [0, 3], 5, 9
    place = step_at(0, start, heads, size, length, 1, dtype)
    wide = torch.randn(len(start) * tokens, (heads + 2 * key_heads) * size, device=DEVICE).to(dtype)
    query, key, value = wide.split([heads * size, key_heads * size, key_heads * size], -1)
    shape = (len(start), key_heads, length, size)
    caches = [KeyValues(*(torch.ones(shape, device=DEVICE, dtype=dtype) for _ in range(2))) for _ in range(2)]
    wanted = decode_ops.rotate_and_store(query, key, value, caches[0], place)
    found = decode_launch.launch_rotate_and_store(query, key, value, caches[1], place)
    assert close(found, wanted)
    assert close(caches[1].keys, caches[0].keys)
    assert torch.equal(caches[1].values, caches[0].values)
    assert bool((caches[1].values[:, :, tokens:] == 1).all())


def chosen_so_far(sequences: int, stops: list[int]) -> Chosen:
    def number(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=DEVICE)

    ended = torch.zeros(sequences, dtype=torch.int32, device=DEVICE)
    return Chosen(
        number(sequences, 1),
        number(sequences, 4),
        number(sequences),
        ended,
        torch.tensor(stops, device=DEVICE).long(),
        7,
    )


@needs_triton
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [97, 40000])
@pytest.mark.parametrize("stops", [[], [5], [11, 5]])
def test_choice_kernel(dtype: torch.dtype, vocabulary: int, stops: list[int]) -> None:
    torch.manual_seed(vocabulary)
    mine, theirs = (chosen_so_far(3, stops) for _ in range(2))
    places = [torch.tensor(7, device=DEVICE) for _ in range(2)]
    for step in range(4):
        logits = torch.randn(3, vocabulary, device=DEVICE).to(dtype)
        logits[0, 20 + step :] = logits[0, 20 + step]  # many equal ones
        logits[0, 20 + step] = logits[0, -1] = 9.0
        logits[1, 5 if step == 1 else 30] = 9.0
        decode_launch.launch_choose(logits, mine, places[0])
        decode_ops.choose(logits, theirs, places[1])
        assert [int(place) for place in places] == [8 + step] * 2
        for name in ("ids", "tokens", "count", "ended"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    assert theirs.tokens[0].tolist() == [20, 21, 22, 23]
    assert theirs.tokens[1].tolist() == ([30, 5, 7, 7] if stops else [30, 5, 30, 30])


@needs_triton
def test_splits_keep_the_device_busy_and_no_part_empty() -> None:
    device = torch.empty(0, device=DEVICE).device
    splits = [decode_launch.splits_for(device, 1, 32, length) for length in (1, 128, 129, 4096)]
    assert splits[0] == splits[1] == 1
    assert splits == sorted(splits)
    assert DEVICE == "cpu" or splits[2] > 1
    assert [decode_launch.keys_at_once(*sizes) for sizes in ((32, 200, 132), (132, 65, 132), (133, 200, 132))] == [
        128,
        128,
        64,
    ]


def test_plain_attention_reads_nothing_outside_the_sequence() -> None:
    """Positions after the new token and before the first are never seen, whatever lies there."""
    length, size = 10, 8
    zeros = torch.zeros(2, 2, length, size)
    place = Place(
        torch.tensor(6), torch.tensor([0, 4]), torch.ones(length, size), torch.zeros(length, size),
        torch.empty(0), torch.empty(0),
    )  # fmt: skip
    query, key, value = torch.randn(3, 2, 2 * size).unbind()
    wild = zeros.clone()
    wild[:, :, 7:] = 1e4
    wild[1, :, :4] = 1e4
    outs = []
    for content in (zeros, wild):
        cache = KeyValues(content.clone(), content.clone())
        outs.append(decode_ops.rotate_and_attend(query, key, value, cache, place, 1.0))
    assert torch.equal(outs[0], outs[1])
    assert dataclasses.astuple(place)[0] == 6
