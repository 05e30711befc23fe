from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from whit.errors import ModelError
from whit.models.source import InMemorySource, RenamedSource, SafetensorsSource, hash_tensor, main_dtype

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.arange(4).to(torch.bfloat16),
    "c": torch.arange(5, dtype=torch.float16),
    "d": torch.tensor([True, False]),
    "e": torch.tensor(7, dtype=torch.int64),
    "f": torch.zeros(0, 3),
    "g": torch.arange(4).to(torch.float8_e4m3fn),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({name: TENSORS[name] for name in "abc"}, tmp_path / "1.safetensors")
    save_file({name: TENSORS[name] for name in "defg"}, tmp_path / "2.safetensors")
    return tmp_path


def test_every_tensor_as_stored(folder: Path):
    source = SafetensorsSource(folder.glob("*.safetensors"))
    assert source.names() == sorted(TENSORS)
    assert source.stored_bytes == sum(path.stat().st_size for path in folder.iterdir())
    for name, tensor in TENSORS.items():
        loaded = source.load(name)
        assert (loaded.dtype, tuple(loaded.shape)) == (tensor.dtype, tuple(tensor.shape))
        assert (source.dtype(name), source.shape(name)) == (tensor.dtype, tuple(tensor.shape))
        assert hash_tensor(loaded) == hash_tensor(tensor)


def test_loaded_tensors_own_their_memory(folder: Path):
    source = SafetensorsSource(folder.glob("*.safetensors"))
    memory = InMemorySource(TENSORS)
    for one in (source, memory):
        one.load("a").fill_(-1)
        assert torch.equal(one.load("a"), TENSORS["a"])
        assert one.load("a").untyped_storage().nbytes() == 24


def test_fingerprint_sees_names_shapes_dtypes_and_values(folder: Path):
    base = {"x": torch.ones(4, dtype=torch.float16), "y": torch.zeros(2)}
    variants = [
        base,
        {"z": base["x"], "y": base["y"]},
        base | {"x": torch.ones(2, 2, dtype=torch.float16)},
        base | {"x": torch.ones(4, dtype=torch.bfloat16)},
        base | {"y": torch.tensor([0.0, 1e-30])},
    ]
    assert len({InMemorySource(item).fingerprint() for item in variants}) == len(variants)
    assert InMemorySource(base).fingerprint() == InMemorySource(dict(base)).fingerprint()
    before = SafetensorsSource(folder.glob("*.safetensors")).fingerprint()
    assert before == SafetensorsSource(folder.glob("*.safetensors")).fingerprint()
    content = bytearray((folder / "1.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "1.safetensors").write_bytes(content)
    assert SafetensorsSource(folder.glob("*.safetensors")).fingerprint() != before


def test_renamed_source_hides_the_rest():
    source = RenamedSource(InMemorySource(TENSORS), {"new": "a"})
    assert source.names() == ["new"]
    assert torch.equal(source.load("new"), TENSORS["a"])
    with pytest.raises(ModelError, match="no tensor 'a'"):
        source.load("a")


def test_unknown_tensor_suggests_the_nearest():
    source = InMemorySource({"model.layers.0.weight": torch.ones(1)})
    with pytest.raises(ModelError, match=r"did you mean 'model\.layers\.0\.weight'"):
        source.load("model.layer.0.weight")


def test_same_tensor_in_two_files_is_refused(folder: Path):
    save_file({"a": torch.ones(1)}, folder / "3.safetensors")
    with pytest.raises(ModelError, match=r"'a' is in '1\.safetensors' and in '3\.safetensors'"):
        SafetensorsSource(folder.glob("*.safetensors"))


def test_file_that_shrinks_while_reading(folder: Path):
    source = SafetensorsSource(folder.glob("*.safetensors"))
    path = folder / "1.safetensors"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ModelError, match="ended early"):
        for name in "abc":
            source.load(name)


def test_main_dtype_is_where_most_values_are():
    assert main_dtype(InMemorySource(TENSORS)) is torch.float32
    assert main_dtype(InMemorySource({"x": torch.ones(3).half(), "y": torch.ones(2)})) is torch.float16
    assert main_dtype(InMemorySource({"x": torch.ones(3, dtype=torch.int64)})) is torch.float32
