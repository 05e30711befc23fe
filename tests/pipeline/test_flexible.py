"""Layers that round their inputs, through the whole pipeline: what is saved, loaded and run is what was chosen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import whit
from tests import tiny
from tests.pipeline.conftest import Recorder, make_case
from whit.cli.main import main
from whit.formats.base import Packed, format_from_json
from whit.formats.quantised_inputs import QuantisedInputs
from whit.models.layers import layer_kind
from whit.models.packed import packed_modules, replace_module
from whit.models.resolve import resolve_model
from whit.models.skeleton import load_dense
from whit.pipeline.plan import make_plan
from whit.pipeline.prepare import prepare
from whit.pipeline.recipe import as_recipe

KNOBS = {
    "token": {},
    "tensor": {"input_scale": "tensor", "group_size": -1, "reserve_top": True},
    "fp8": {"formats": "e4m3fn"},
    "w4a8": {"bits": 4, "group_size": 16, "input_scale": "tensor"},
    "w8a16": {"input_bits": 16},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
def test_the_loaded_model_runs_what_was_packed(knobs: dict[str, object], dtype: torch.dtype, tmp_path: Path) -> None:
    case = make_case("llama", tmp_path, evaluate=False)
    result = whit.compress(case.model, "flexible", tmp_path / "out", options=case.options, **knobs)
    assert isinstance(result, whit.Result)
    ids = tiny.inputs("llama", seed=2)["input_ids"]

    expected = load_dense(resolve_model(case.model), dtype, "cpu")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for layer in result.layers:
        layout = format_from_json(layer.format)
        names = layout.specs(layer.rows, layer.columns)
        tensors = {key: stored[f"{layer.name}.{key}"] for key in names}
        module = expected.get_submodule(layer.name)
        kind = layer_kind(module)
        assert kind is not None
        running = kind.build(module, layout)
        running.set_packed(Packed(layout, layer.rows, layer.columns, tensors))
        replace_module(expected, layer.name, running)
        assert isinstance(layout, QuantisedInputs) == (bool(layer.block) and knobs.get("input_bits") != 16)
    with torch.no_grad():
        logits = expected(input_ids=ids).logits
        for loaded in (
            whit.load(tmp_path / "out", dtype=dtype),
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype),
        ):
            assert torch.equal(loaded(input_ids=ids).logits, logits)

    original = load_dense(resolve_model(case.model), torch.float32, "cpu")
    with torch.no_grad():
        reference = original(input_ids=ids).logits
    error = (logits.float() - reference).square().sum() / (reference - reference.mean()).square().sum()
    assert error < (0.1 if knobs.get("bits") == 4 else 5e-3)


def test_what_runs_is_the_plain_meaning_of_the_weights_and_rounded_inputs(tmp_path: Path) -> None:
    case = make_case("llama", tmp_path, evaluate=False)
    whit.compress(case.model, "flexible", tmp_path / "out", options=case.options, input_bits=4)
    ids = tiny.inputs("llama", seed=2)["input_ids"]
    model = whit.load(tmp_path / "out")
    with torch.no_grad():
        rounded = model(input_ids=ids).logits
        for name, module in packed_modules(model).items():
            if isinstance(module.format, QuantisedInputs):
                linear = torch.nn.Linear(module.columns, module.rows, bias=False)
                linear.weight.copy_(module.weight)
                replace_module(model, name, linear)
        unrounded = model(input_ids=ids).logits
    assert (rounded - unrounded).square().mean() > 1e-4 * unrounded.square().mean(), "inputs were rounded"


def test_the_plan_knows_the_bytes_and_the_record_what_was_chosen(tmp_path: Path) -> None:
    case = make_case("llama", tmp_path, evaluate=False)
    recorder = Recorder()
    knobs = {"input_scale": "tensor"}
    result = whit.compress(case.model, "flexible", tmp_path / "out", options=case.options, listener=recorder, **knobs)
    assert isinstance(result, whit.Result)
    plan = recorder.plans[0]
    assert [layer.stored_bytes for layer in plan.layers] == [layer.stored_bytes for layer in result.layers]
    assert plan.compressed_bits == result.size.compressed_bits
    # The config names each distinct layout once; how many there will be is not known beforehand.
    assert 0 <= result.size.file_bytes - plan.file_bytes < 10_000
    assert any("chosen per layer" in note for note in plan.notes)
    inside = [layer for layer in result.layers if layer.block]
    assert len({json.dumps(layer.format, sort_keys=True) for layer in inside}) > 1
    saved = json.loads((tmp_path / "out" / "result.json").read_text())["layers"]
    for layer, record in zip(result.layers, saved, strict=True):
        assert record["details"] == layer.details
        if layer.block:
            a, w = layer.details["inputs"], layer.details["weights"]
            table = layer.details["scores"]
            chosen = table[a.index(layer.format["system"])][w.index(layer.format["weight"]["system"])]
            assert chosen == min(min(line) for line in table)
            assert layer.error == pytest.approx(chosen, rel=0.01), "the score is the error that the pipeline measures"
            assert layer.notes == []


class Stopper(Recorder):
    """Raises KeyboardInterrupt when the first block is finished."""

    def block(self, index: int, total: int, name: str) -> None:
        raise KeyboardInterrupt


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    case = make_case("llama", tmp_path, evaluate=False)

    def run(name: str, listener: Recorder) -> None:
        whit.compress(
            case.model, "flexible", tmp_path / name, options=case.options, listener=listener, input_scale="tensor"
        )

    with pytest.raises(KeyboardInterrupt):
        run("two", Stopper())
    for name in ("one", "two"):
        run(name, Recorder())
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_later_blocks_are_calibrated_on_rounded_inputs_of_the_earlier(tmp_path: Path) -> None:
    case = make_case("llama", tmp_path, evaluate=False)
    errors = {}
    for bits in (4, 16):
        out = tmp_path / str(bits)
        result = whit.compress(case.model, "flexible", out, options=case.options, input_bits=bits, bits=4)
        assert isinstance(result, whit.Result)
        errors[bits] = [layer.error for layer in result.layers if layer.block]
    assert all(four > sixteen for four, sixteen in zip(errors[4], errors[16], strict=True))


@pytest.mark.parametrize("family", ["gpt2", "llama-tied", "whisper"])
def test_other_families(family: str, tmp_path: Path) -> None:
    case = make_case(family, tmp_path)
    result = whit.compress(case.model, "flexible", tmp_path / "out", options=case.options, input_scale="tensor")
    assert isinstance(result, whit.Result)
    assert result.compressed is not None
    assert all(layer.error < 1e-2 for layer in result.layers)


def test_a_tied_embedding_and_head_can_be_fp8(tmp_path: Path) -> None:
    case = make_case("llama-tied", tmp_path, evaluate=False)
    job = prepare(case.model, as_recipe("flexible", {"formats": "e4m3fn"}), tmp_path / "out", case.options)
    assert make_plan(job).notes == []
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[[step]]\nmethod = "flexible"\ninput_scale = "tensor"\n\n'
        '[[step]]\nmethod = "flexible"\nformats = "e4m3fn"\nlayers = ["@embedding"]\n'
    )
    result = whit.compress(case.model, whit.read_recipe(recipe), tmp_path / "out", options=case.options)
    assert isinstance(result, whit.Result)
    (outside,) = [layer for layer in result.layers if not layer.block]
    assert outside.format["system"] == outside.format["weight"]["system"] == "e4m3fn"
    ids = tiny.inputs("llama", seed=2)["input_ids"]
    with torch.no_grad():
        logits = whit.load(tmp_path / "out")(input_ids=ids).logits
        reference = load_dense(resolve_model(case.model), torch.float32, "cpu")(input_ids=ids).logits
    assert (logits - reference).square().sum() < 0.02 * (reference - reference.mean()).square().sum()


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = make_case("llama", tmp_path)
    arguments = ["compress", str(case.model), "--method", "flexible", "--formats", "int8,e4m3fn", "--limited"]
    arguments += ["--input-scale", "tensor", "--calibration", str(case.options.calibration), "--no-evaluate"]
    assert main([*arguments, "--device", "cpu", "-o", str(tmp_path / "out")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "quantised-inputs" in shown
    for fields in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["formats"]:
        if fields["format"] == "quantised-inputs":
            assert fields["static"] is True
            assert fields["system"] == fields["weight"]["system"]
    assert main([*arguments[:4], "--formats", "int9", "-o", str(tmp_path / "other")]) == 2
    assert "unknown number system 'int9'" in " ".join(capsys.readouterr().err.split())
