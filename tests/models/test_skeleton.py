from __future__ import annotations

import pytest
import torch

from tests.models.conftest import FAMILIES, SaveFamily, example_inputs
from whit.models.names import tied_groups
from whit.models.resolve import resolve_model
from whit.models.skeleton import build_skeleton, load_dense, materialise, release
from whit.models.stacks import find_stacks


def _output(model, family):
    with torch.no_grad():
        return model(**example_inputs(family))[0]


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_materialised_skeleton_equals_from_pretrained(family: str, shard: str, save_family: SaveFamily):
    folder = save_family(family, max_shard_size=shard)
    assert (folder / "model.safetensors.index.json").exists() == (shard == "20KB")
    reference = resolve_model(folder)
    expected = FAMILIES[family][0].from_pretrained(folder).eval()
    model = load_dense(reference, torch.float32, "cpu")
    assert torch.equal(_output(model, family), _output(expected, family))
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert [set(group) for group in tied_groups(model)] == [set(group) for group in tied_groups(expected)]


@pytest.mark.parametrize("family", FAMILIES)
def test_skeleton_has_no_weights_and_true_buffers(family: str, save_family: SaveFamily):
    folder = save_family(family)
    state = torch.random.get_rng_state()
    skeleton = build_skeleton(resolve_model(folder), torch.float32)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert not skeleton.training
    expected = dict(FAMILIES[family][0].from_pretrained(folder).named_buffers())
    buffers = dict(skeleton.named_buffers())
    assert buffers.keys() == expected.keys()
    for name, buffer in buffers.items():
        assert torch.equal(buffer, expected[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_block_by_block_equals_the_whole(family: str, save_family: SaveFamily):
    reference = resolve_model(save_family(family))
    whole = load_dense(reference, torch.float32, "cpu")
    model = build_skeleton(reference, torch.float32)
    blocks = [block for stack in find_stacks(model) for block in stack.blocks]
    for block in blocks:
        materialise(model, block, reference.source, torch.float32, "cpu")
        assert not any(parameter.is_meta for parameter in model.get_submodule(block).parameters())
        for name, parameter in model.get_submodule(block).named_parameters():
            assert torch.equal(parameter, whole.get_submodule(block).get_parameter(name))
        release(model, block)
        assert all(parameter.is_meta for parameter in model.parameters())
    materialise(model, "", reference.source, torch.float32, "cpu")
    assert torch.equal(_output(model, family), _output(whole, family))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_dtypes_follow_from_pretrained(family: str, dtype: torch.dtype, save_family: SaveFamily):
    folder = save_family(family)
    expected = FAMILIES[family][0].from_pretrained(folder, dtype=dtype)
    model = load_dense(resolve_model(folder), dtype, "cpu")
    found = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert found == {name: tensor.dtype for name, tensor in expected.state_dict().items()}
    assert torch.equal(_output(model, family), _output(expected, family))


def test_tied_head_is_shared_while_streaming(save_family: SaveFamily):
    reference = resolve_model(save_family("llama-tied"))
    model = build_skeleton(reference, torch.float32)
    materialise(model, "lm_head", reference.source, torch.float32, "cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight.is_meta
    before = model.lm_head.weight
    materialise(model, "model.embed_tokens", reference.source, torch.float32, "cpu")
    assert model.lm_head.weight is before
    release(model, "model.embed_tokens")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.is_meta
