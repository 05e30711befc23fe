"""Pruned models through the command: zeros where they belong, bytes on disk as counted, loaded by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import whit
from tests import tiny
from tests.pipeline.conftest import Case
from whit.cli import main
from whit.errors import KnobError
from whit.methods.chain import PruneThenQuantise
from whit.methods.gptq import GPTQ
from whit.methods.kmeans import KMeans
from whit.methods.magnitude import Magnitude
from whit.methods.rtn import RTN
from whit.methods.wanda import Wanda
from whit.models.packed import PackedLinear, packed_modules
from whit.pipeline.recipe import Recipe, Step
from whit.report.record import Result

RUNS = {
    "wanda": ["--pattern", "2:4"],
    "magnitude": ["--sparsity", "0.5"],
    "sparsegpt": ["--pattern", "4:8"],
    "ria": ["--sparsity", "0.6", "--update"],
}


def run_command(case: Case, method: str, knobs: list[str], output: Path) -> Result:
    arguments = ["compress", str(case.model), "-m", method, "-o", str(output), "--quiet", "--device", "cpu", *knobs]
    arguments += ["--calibration", str(case.options.calibration), "--embedding-bits", "16", "--no-evaluate"]
    assert main(arguments) == 0
    return Result.load(output / "result.json")


@pytest.mark.parametrize("method", RUNS)
def test_a_pruned_model_loads_and_is_smaller_by_the_counted_bytes(
    method: str, case_of: Callable[[str], Case], tmp_path: Path
) -> None:
    case = case_of("llama")
    result = run_command(case, method, RUNS[method], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {item["format"] for item in config["quantization_config"]["formats"]} <= {"sparse-nm", "sparse-bitmask"}
    original = AutoModelForCausalLM.from_pretrained(case.model).eval()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    packed = packed_modules(loaded)
    assert len(packed) == 3 * 7
    removed = 0
    for name, module in packed.items():
        dense = original.get_submodule(name).weight
        weight = module.weight
        share = float((weight == 0).float().mean())
        assert share == pytest.approx(0.6 if method == "ria" else 0.5, abs=0.02)
        if method in ("wanda", "magnitude"):
            assert torch.equal(weight[weight != 0], dense[weight != 0].half().float())
        removed += dense.numel() * 4 - module.packed.stored_bytes()
    tensors = sum(tensor.numel() * tensor.element_size() for tensor in original.state_dict().values())
    saved = tiny_bytes(tmp_path / "out" / "model.safetensors")
    assert saved == tensors - removed
    assert result.size.compressed_bytes == sum(module.packed.stored_bytes() for module in packed.values())
    ids = tiny.inputs("llama")["input_ids"]
    with torch.no_grad():
        logits = loaded(input_ids=ids).logits
        for name, module in packed.items():  # the same model with dense zeros
            original.get_submodule(name).weight.copy_(module.weight)
        torch.testing.assert_close(logits, original(input_ids=ids).logits)


def tiny_bytes(path: Path) -> int:
    """Bytes of the tensors in a safetensors file, without its header."""
    header = int.from_bytes(path.read_bytes()[:8], "little")
    return path.stat().st_size - 8 - header


@pytest.mark.parametrize(
    "layers", [(("@blocks",), ("@blocks",)), (("@blocks",), ("*.down_proj",))], ids=["everywhere", "some layers"]
)
def test_a_recipe_prunes_and_then_quantises(
    layers: tuple[Any, Any], case_of: Callable[[str], Case], tmp_path: Path
) -> None:
    first, second = layers
    recipe = Recipe((Step(Wanda(pattern="2:4"), first), Step(GPTQ(bits=4, group_size=0), second)))
    case = case_of("llama")
    result = whit.compress(case.model, recipe, tmp_path / "out", options=case.options)
    assert isinstance(result, Result)
    both = PruneThenQuantise(Wanda(pattern="2:4"), GPTQ(bits=4, group_size=0))
    for layer in result.layers:
        if layer.block:
            chained = second == ("@blocks",) or layer.name.endswith("down_proj")
            assert layer.method == (both if chained else Wanda(pattern="2:4")).to_json()
            assert any("after wanda" in note and "after gptq" in note for note in layer.notes) == chained
            assert layer.error < 0.6
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    module = loaded.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(module, PackedLinear)
    grouped = module.weight.reshape(48, -1, 4) != 0
    assert (grouped.sum(-1) <= 2).all() and float(grouped.float().mean()) > 0.4
    again = whit.load(tmp_path / "out")
    ids = tiny.inputs("llama")["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_columns_that_do_not_fit_are_refused_by_name_before_any_work(
    case_of: Callable[[str], Case], tmp_path: Path
) -> None:
    case = case_of("llama")  # 48 and 88 columns
    with pytest.raises(KnobError, match=r"'model.layers.0.self_attn.q_proj': a 48 x 48 weight cannot be pruned 5:9"):
        whit.compress(case.model, "wanda", tmp_path / "out", options=case.options, pattern="5:9")
    with pytest.raises(KnobError, match=r"'model.layers.0.mlp.down_proj': .* not divisible by 16"):
        whit.compress(case.model, "wanda", tmp_path / "out", options=case.options, pattern="8:16")
    assert not (tmp_path / "out").exists()


def test_steps_that_cannot_follow_one_another_are_refused(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    case = case_of("llama")

    def refuse(message: str, *methods: Any) -> None:
        with pytest.raises(KnobError, match=message):
            recipe = Recipe(tuple(Step(method) for method in methods))
            whit.compress(case.model, recipe, tmp_path / "out", options=case.options)

    refuse("q_proj' is pruned and then compressed by the recipe: method 'kmeans' cannot follow", Wanda(), KMeans())
    refuse("give the pruning a pattern, or comparison='row'", Magnitude(), RTN())
    refuse("cannot follow a pruning step", Wanda(), Magnitude(comparison="row"))
    refuse("only a pruning step can be followed", RTN(), Wanda())
    refuse("only a pruning step can be followed", Wanda(), RTN(), RTN())


def test_a_pruned_embedding_looks_up_rows(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    case = case_of("llama-tied")
    recipe = Recipe((Step(RTN(bits=8, group_size=0)), Step(Magnitude(sparsity=0.3), ("@embedding",))))
    whit.compress(case.model, recipe, tmp_path / "out", options=case.options)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    embedding = loaded.get_input_embeddings()
    ids = torch.tensor([[5, 3, 5, 96]])
    assert torch.equal(embedding(ids), embedding.weight[ids])
    assert float((embedding.weight == 0).float().mean()) == pytest.approx(0.3, abs=0.001)
