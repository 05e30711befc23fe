"""LLM.int8() from the command to a reloaded model: outliers planted in a language model cost it nothing."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import whit
from tests import tiny
from tests.pipeline.conftest import Case, Recorder, make_case
from whit.methods import make_method
from whit.models.packed import packed_modules

CHANNEL = 11


def plant(folder: Path, factor: float) -> None:
    """Make one channel behind every norm of a saved Llama louder and the weights that read it as much smaller: the
    model computes what it did before."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for block in model.model.layers:
            attention, feed_forward = block.self_attn, block.mlp
            for norm, readers in (
                (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (block.post_attention_layernorm, (feed_forward.gate_proj, feed_forward.up_proj)),
            ):
                norm.weight[CHANNEL] *= factor
                for reader in readers:
                    reader.weight[:, CHANNEL] /= factor
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A random Llama with a channel thirty times as loud."""
    case = make_case("llama", tmp_path_factory.mktemp("loud"), embedding_bits=16)
    plant(case.model, 30)
    return case


def compress(case: Case, folder: Path, **knobs: object) -> whit.Result:
    result = whit.compress(case.model, "llm-int8", folder, options=case.options, **knobs)
    assert isinstance(result, whit.Result)
    return result


def metric(result: whit.Result, name: str) -> float:
    assert result.compressed is not None
    found = result.compressed.metric(name)
    assert found is not None, name
    return found.value


def divergence(result: whit.Result) -> float:
    return metric(result, "kl_divergence")


def test_planted_outliers_hurt_without_decomposition_and_not_with_it(loud: Case, tmp_path: Path) -> None:
    quiet = make_case("llama", tmp_path / "quiet", embedding_bits=16)
    without = {
        name: divergence(compress(case, tmp_path / f"none-{name}", outliers="none"))
        for name, case in (("quiet", quiet), ("loud", loud))
    }
    assert without["loud"] > 20 * without["quiet"]
    dynamic = divergence(compress(loud, tmp_path / "dynamic"))
    static = divergence(compress(loud, tmp_path / "static", outliers="static"))
    int8 = divergence(compress(loud, tmp_path / "int8", outlier_weights="int8"))
    assert dynamic < 1.5 * without["quiet"]
    assert static < 1.5 * without["quiet"]
    assert 2 * dynamic < int8 < without["loud"]


def test_a_trained_model_loses_perplexity_without_decomposition_and_not_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(Path(__file__).parents[1] / "assets" / "stories260k", folder)
    plant(folder, 100)
    options = whit.RunOptions(
        samples=4, sequence_length=128, evaluation_windows=2, window=256, embedding_bits=16, device="cpu"
    )
    case = Case("llama", folder, options)
    none = compress(case, tmp_path / "none", outliers="none")
    assert none.original is not None
    original = none.original.metric("perplexity")
    assert original is not None
    assert metric(none, "perplexity") > 1.2 * original.value
    for outliers in ("dynamic", "static"):
        result = compress(case, tmp_path / outliers, outliers=outliers)
        assert metric(result, "perplexity") == pytest.approx(original.value, rel=0.01)
        assert divergence(result) < 0.02 * divergence(none)


@pytest.mark.parametrize("outliers", ["dynamic", "static", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_loads_and_generates(loud: Case, tmp_path: Path, outliers: str, dtype: torch.dtype) -> None:
    result = compress(loud, tmp_path / "out", outliers=outliers)
    assert {layer.format["outliers"] for layer in result.layers} == {outliers}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    modules = packed_modules(model)
    assert {module.get_buffer("codes").dtype for module in modules.values()} == {torch.int8}
    listed = {name for name, module in modules.items() if "outlier_index" in module.packed.tensors}
    readers = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    assert listed == (set() if outliers == "none" else {name for name in modules if name.endswith(readers)})
    for name in listed:
        assert modules[name].get_buffer("outlier_index").tolist() == [CHANNEL]
        assert modules[name].get_buffer("outlier_weight").dtype == torch.float16
    ids = tiny.inputs("llama", sequences=2)["input_ids"]
    assert model.generate(ids, max_new_tokens=4, do_sample=False, min_new_tokens=4).shape == (2, 28)
    assert bool(torch.isfinite(model(ids).logits).all())


def test_the_plan_is_an_upper_bound_and_says_so(loud: Case, tmp_path: Path) -> None:
    recorder = Recorder()
    result = whit.compress(loud.model, "llm-int8", tmp_path / "out", options=loud.options, listener=recorder)
    assert isinstance(result, whit.Result)
    (plan,) = recorder.plans
    assert any("max_outlier_share=0.01" in note for note in plan.notes)
    assert result.size.compressed_bits < plan.compressed_bits
    assert 0.9 * plan.file_bytes < result.size.file_bytes < plan.file_bytes
    planned = {layer.name: layer.stored_bytes for layer in plan.layers}
    assert all(layer.stored_bytes <= planned[layer.name] for layer in result.layers)
    files = list((tmp_path / "out").glob("model*.safetensors"))
    assert result.size.file_bytes == sum(path.stat().st_size for path in [*files, tmp_path / "out" / "config.json"])


def test_without_listed_columns_the_plan_is_exact_and_needs_no_calibration(loud: Case, tmp_path: Path) -> None:
    recorder = Recorder()
    result = whit.compress(
        loud.model, "llm-int8", tmp_path / "out", options=loud.options, listener=recorder, outlier_weights="int8"
    )
    assert isinstance(result, whit.Result)
    assert recorder.plans[0].notes == []
    assert recorder.plans[0].compressed_bits == result.size.compressed_bits
    assert "calibration" not in [phase for phase, _ in recorder.phases]
    matrices = {"self_attn": 48 * (48 + 24 + 24 + 48), "mlp": 3 * 48 * 88}
    rows = 48 + 24 + 24 + 48 + 88 + 88 + 48
    assert result.size.compressed_bytes == 3 * (sum(matrices.values()) + 4 * rows)


def test_the_same_command_writes_the_same_bytes(loud: Case, tmp_path: Path) -> None:
    digests = set()
    for name in ("one", "two"):
        compress(loud, tmp_path / name, outliers="static")
        digests.add(hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize("family", ["gpt2", "opt", "whisper", "bert"])
def test_other_families_come_through(family: str, tmp_path: Path) -> None:
    case = make_case(family, tmp_path)
    result = compress(case, tmp_path / "out", outliers="static")
    assert max(layer.error for layer in result.layers) < 2e-3
    model = whit.load(tmp_path / "out")
    assert packed_modules(model)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_embedding_and_head_can_be_int8_as_well(family: str, tmp_path: Path) -> None:
    case = make_case(family, tmp_path)
    ends = ("@embedding",) if family == "llama-tied" else ("@embedding", "@head")
    without_data = make_method("llm-int8", {"outlier_weights": "int8"})
    recipe = whit.Recipe((whit.Step(make_method("llm-int8")), whit.Step(without_data, ends)))
    result = whit.compress(case.model, recipe, tmp_path / "out", options=case.options)
    assert isinstance(result, whit.Result)
    assert divergence(result) < 1e-4
    model = whit.load(tmp_path / "out")
    embedding = model.get_submodule("model.embed_tokens")
    assert embedding.packed.stored_bytes() == 97 * 48 + 4 * 97
    ids = torch.tensor([[5, 5, 96]])
    assert torch.equal(embedding(ids), embedding.packed.unpack()[ids])
    inputs = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
    head = model.get_output_embeddings()
    shared = embedding.packed if family == "llama-tied" else head.packed
    assert torch.equal(head(inputs), shared.linear(inputs))
