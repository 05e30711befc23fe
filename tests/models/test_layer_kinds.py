import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from whit.methods import LayerStatistics, make_method
from whit.models.layers import layer_kind


def compress(module):
    """Through the kind, as the pipeline does: stored weight -> matrix -> packed -> replacement module."""
    kind = layer_kind(module)
    matrix = kind.matrix(module.weight.detach()).contiguous()
    assert tuple(matrix.shape) == kind.shape(module)
    packed = make_method("rtn", {"bits": 8, "group_size": 16}).compress(matrix, LayerStatistics(matrix.shape[1])).packed
    replacement = kind.build(module, packed.format)
    replacement.set_packed(packed)
    if getattr(replacement, "bias", None) is not None:
        replacement.bias.data.copy_(module.bias.data)
    return replacement, packed.unpack()


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias):
    module = nn.Linear(48, 10, bias=bias)
    replacement, weight = compress(module)
    x = torch.randn(3, 48)
    torch.testing.assert_close(replacement(x), nn.functional.linear(x, weight, module.bias), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(replacement(x), module(x), rtol=0, atol=0.02)


def test_conv1d_is_stored_transposed():
    module = Conv1D(10, 48)
    nn.init.normal_(module.bias)
    replacement, weight = compress(module)
    x = torch.randn(2, 3, 48)
    assert weight.shape == (10, 48)
    torch.testing.assert_close(replacement(x), nn.functional.linear(x, weight, module.bias), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(replacement(x), module(x), rtol=0, atol=0.02)


def test_embedding():
    module = nn.Embedding(30, 16)
    replacement, weight = compress(module)
    ids = torch.tensor([[0, 29], [5, 5]])
    assert torch.equal(replacement(ids), weight[ids])
    torch.testing.assert_close(replacement(ids), module(ids), rtol=0, atol=0.02)


def test_the_bias_keeps_its_dtype():
    kind = layer_kind(nn.Linear(4, 4))
    layout = make_method("rtn").format(4, 4)
    assert kind.build(nn.Linear(4, 4, dtype=torch.bfloat16), layout).bias.dtype == torch.bfloat16
    assert kind.build(nn.Linear(4, 4, bias=False), layout).bias is None


def test_shapes_are_read_on_the_meta_device():
    with torch.device("meta"):
        assert layer_kind(module := nn.Linear(7, 5)).shape(module) == (5, 7)
        assert layer_kind(module := Conv1D(5, 7)).shape(module) == (5, 7)
        assert layer_kind(module := nn.Embedding(9, 3)).shape(module) == (9, 3)


def test_only_exact_types_are_known():
    class Special(nn.Linear):
        pass

    attention = nn.MultiheadAttention(8, 2)
    assert layer_kind(Special(3, 3)) is None
    assert isinstance(attention.out_proj, nn.Linear) and layer_kind(attention.out_proj) is None
    assert layer_kind(nn.LayerNorm(3)) is None


def test_an_embedding_that_scales_its_rows_is_known_by_what_it_does():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 5.0

    class Normalised(nn.Embedding):
        def forward(self, ids):
            return nn.functional.normalize(super().forward(ids) + torch.arange(16.0), dim=-1)

    module = Scaled(30, 16)
    replacement, weight = compress(module)
    assert replacement.scale == 5.0
    assert torch.equal(replacement(torch.tensor([3])), weight[[3]] * 5.0)
    assert layer_kind(Normalised(30, 16)) is None
