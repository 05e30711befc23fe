"""Saving modules of the user's own, and reading them into fresh ones: the same bytes, the same answers, or an error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import whit
from tests import tiny
from tests.module.nets import WIDTH, Convolutions, Odd, Residual, images, seeded, vectors
from whit.errors import ModelError, OutputError
from whit.pipeline.recipe import Recipe, Step


class Words(nn.Module):
    """An embedding tied to a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.out = nn.Linear(WIDTH, 50)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.out(self.embed(ids))
        return out


INPUTS: dict[type[nn.Module], Callable[[], list[Tensor]]] = {
    Residual: vectors,
    Convolutions: images,
    Odd: vectors,
    Words: lambda: [torch.arange(12).view(2, 6)],
}


def compressed(make: type[nn.Module]) -> nn.Module:
    if make is Words:
        return whit.compress(seeded(make), Recipe((Step(whit.make_method("rtn"), ("@embedding",)),))).module
    return whit.compress(seeded(make), "gptq", calibration=INPUTS[make](), bits=4).module


@pytest.mark.parametrize("make", list(INPUTS))
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_reloaded_modules_answer_alike_and_are_saved_as_the_same_bytes(
    make: type[nn.Module], device: str, tmp_path: Path
) -> None:
    original = compressed(make).eval()
    whit.save(original, tmp_path / "one")
    with torch.device(device):
        skeleton = make().eval()
    loaded = whit.load_into(skeleton, tmp_path / "one")
    assert loaded is skeleton
    whit.save(loaded, tmp_path / "two")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["model.safetensors", "whit.json"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with torch.no_grad():
        for item in INPUTS[make]():
            assert torch.equal(loaded(item), original(item))


def test_a_shared_tensor_is_stored_once(tmp_path: Path) -> None:
    module = compressed(Odd)
    whit.save(module, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "here.codes" in stored and "there.codes" not in stored
    assert sum(value.nbytes for value in stored.values()) == sum(
        value.nbytes for value in {id(item): item for item in module.state_dict(keep_vars=True).values()}.values()
    )
    loaded = whit.load_into(Odd(), tmp_path)
    assert loaded.here is loaded.there and loaded.second.source is loaded.first


def test_dtypes_are_those_of_the_file_and_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    whit.save(whit.compress(seeded(Residual).to(torch.bfloat16), "rtn").module, tmp_path)
    skeleton = Residual()
    skeleton.head.bias.requires_grad_(False)
    loaded = whit.load_into(skeleton, tmp_path)
    assert {value.dtype for value in loaded.parameters()} == {torch.bfloat16}
    assert not loaded.head.bias.requires_grad and loaded.up.bias.requires_grad


def test_a_module_without_packed_layers_is_saved_too(tmp_path: Path) -> None:
    module = seeded(Residual)
    whit.save(module, tmp_path)
    assert torch.equal(whit.load_into(Residual(), tmp_path).down.weight, module.down.weight)


def test_an_untied_skeleton_gets_values_of_its_own(tmp_path: Path) -> None:
    module = seeded(Words)
    whit.save(module, tmp_path)
    skeleton = Words()
    skeleton.out.weight = nn.Parameter(torch.zeros(50, WIDTH))
    loaded = whit.load_into(skeleton, tmp_path)
    assert torch.equal(loaded.out.weight, module.embed.weight)
    with torch.no_grad():
        loaded.embed.weight.zero_()
    assert bool(loaded.out.weight.any())


def test_saving_again_replaces_and_foreign_weights_are_kept(tmp_path: Path) -> None:
    whit.save(compressed(Residual), tmp_path / "a")
    whit.save(compressed(Words), tmp_path / "a")
    assert isinstance(whit.load_into(Words(), tmp_path / "a"), Words)
    foreign = tmp_path / "b"
    foreign.mkdir()
    save_file({"x": torch.ones(1)}, foreign / "model.safetensors")
    with pytest.raises(OutputError, match=r"'model.safetensors' of another model"):
        whit.save(compressed(Residual), foreign)
    assert set(load_file(foreign / "model.safetensors")) == {"x"}
    (tmp_path / "c").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        whit.save(compressed(Residual), tmp_path / "c")


def test_what_cannot_be_stored_as_plain_tensors_is_refused(tmp_path: Path) -> None:
    class Extra(nn.Module):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

        def set_extra_state(self, state: dict[str, int]) -> None:
            assert state

    with pytest.raises(ModelError, match=r"'_extra_state' of the module is a dict"):
        whit.save(Extra(), tmp_path / "x")
    with pytest.raises(ModelError, match=r"complex64"):
        whit.save(nn.Linear(2, 2, dtype=torch.complex64), tmp_path / "x")
    with pytest.raises(ModelError, match=r"save_pretrained"):
        whit.save(tiny.llama(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def other_width() -> nn.Module:
    module = Residual()
    module.head = nn.Linear(WIDTH, 6)
    return module


def other_kind() -> nn.Module:
    module = Residual()
    module.up = nn.Identity()
    return module


@pytest.mark.parametrize(
    ("skeleton", "words"),
    [
        (Words, "packs 'up', which Words lacks"),
        (other_width, r"tensor 'head.bias' is \(5,\) .* in the saved module, \(6,\) .* in Residual"),
        (other_kind, "packs 'up', but a Identity cannot be packed"),
        (lambda: whit.compress(Residual(), "rtn").module, "packs 'up', but a PackedLinear cannot be packed"),
    ],
)
def test_another_architecture_is_refused_and_left_as_it_was(
    skeleton: Callable[[], nn.Module], words: str, tmp_path: Path
) -> None:
    whit.save(compressed(Residual), tmp_path)
    module = skeleton()
    before = {name: id(value) for name, value in module.state_dict(keep_vars=True).items()}
    with pytest.raises(ModelError, match=words):
        whit.load_into(module, tmp_path)
    assert {name: id(value) for name, value in module.state_dict(keep_vars=True).items()} == before


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_json(folder: Path, **fields: Any) -> None:
    described = json.loads((folder / "whit.json").read_text())
    (folder / "whit.json").write_text(json.dumps({**described, **fields}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: change_tensors(folder, lambda tensors: tensors.pop("up.codes")), "has no tensor 'up.codes'"),
        (lambda folder: change_tensors(folder, lambda tensors: tensors.update(x=torch.ones(1))), "has a tensor 'x'"),
        (lambda folder: change_tensors(folder, lambda t: t.update({"up.codes": t["up.codes"].int()})), "torch.int32"),
        (lambda folder: (folder / "whit.json").unlink(), "has no whit.json: give a directory that whit.save wrote"),
        (lambda folder: (folder / "whit.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "whit.json").write_text("{}"), "description None"),
        (lambda folder: change_json(folder, version=99), "pip install -U whit"),
        (lambda folder: change_json(folder, layers={"up": 7}), "damaged"),
        (lambda folder: change_json(folder, formats=[{"format": "future"}]), "'future' is not known"),
        (lambda folder: change_json(folder, tied={"head": "nowhere"}), "ties 'head' to 'nowhere', which is not packed"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"123"), "model.safetensors"),
        (shutil.rmtree, "has no whit.json"),
    ],
)
def test_damaged_files_are_refused(damage: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    whit.save(compressed(Residual), folder)
    damage(folder)
    with pytest.raises(ModelError, match=words):
        whit.load_into(Residual(), folder)


def test_a_buffer_that_is_not_saved_needs_a_skeleton_with_values(tmp_path: Path) -> None:
    class Buffered(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(3), persistent=False)

    whit.save(whit.compress(Buffered(), "rtn").module, tmp_path)
    assert torch.equal(whit.load_into(Buffered(), tmp_path).table, torch.arange(3))
    with torch.device("meta"):
        skeleton = Buffered()
    with pytest.raises(ModelError, match=r"'table' of Buffered is not saved .* build the module on the CPU"):
        whit.load_into(skeleton, tmp_path)
