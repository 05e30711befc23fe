"""Bad input through the real command line: an exit code with a meaning, one line on stderr, nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import whit
from tests import tiny
from tests.pipeline.conftest import Case, Finished, make_case
from whit.cli import main
from whit.errors import DataError, KnobError, ModelError, OutputError
from whit.report.record import Result

CALIBRATION = ("--calibration", "--evaluation")


@pytest.fixture
def case(case_of: Callable[[str], Case], tmp_path: Path) -> Case:
    """The tiny LLaMA in a folder that the test may damage."""
    original = case_of("llama")
    shutil.copytree(original.model, tmp_path / "model")
    return Case("llama", tmp_path / "model", original.options)


def arguments(case: Case, output: Path, *extra: str, method: str = "gptq", **replaced: str) -> list[str]:
    data = {"calibration": case.options.calibration, "evaluation": case.options.evaluation} | replaced
    named = [text for key, value in data.items() for text in (f"--{key}", str(value))]
    return ["compress", str(case.model), "-o", str(output), "-m", method, "--device", "cpu", "-q", *named, *extra]


def refused(argv: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail in the promised way; returns its message."""
    capsys.readouterr()
    assert main(argv) == code
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert captured.out == ""
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    return lines[0]


def change_weights(case: Case, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = case.model / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_missing_path(tmp_path: Path, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    gone = Case("llama", tmp_path / "modle", case.options)
    assert "did you mean" in refused(arguments(gone, tmp_path / "out"), ModelError.exit_code, capsys)
    assert not (tmp_path / "out").exists()


def test_directory_without_config(tmp_path: Path, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    (case.model / "config.json").unlink()
    assert "has no config.json" in refused(arguments(case, tmp_path / "out"), ModelError.exit_code, capsys)


def test_unknown_architecture(tmp_path: Path, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((case.model / "config.json").read_text())
    (case.model / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLX"]}))
    assert "'LlamaForCausalLX'" in refused(arguments(case, tmp_path / "out"), ModelError.exit_code, capsys)


def test_truncated_weights(tmp_path: Path, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    weights = case.model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "damaged or incomplete" in refused(arguments(case, tmp_path / "out"), ModelError.exit_code, capsys)
    assert not (tmp_path / "out").exists()


def test_shapes_that_disagree(tmp_path: Path, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(case, lambda tensors: tensors.update({name: torch.zeros(3, 3)}))
    assert f"{name} is (3, 3) in the file" in refused(arguments(case, tmp_path / "out"), ModelError.exit_code, capsys)


def test_pickled_weights(tmp_path: Path, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    (case.model / "model.safetensors").rename(case.model / "pytorch_model.bin")
    assert "convert it once" in refused(arguments(case, tmp_path / "out"), ModelError.exit_code, capsys)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"])
def test_nan_in_a_weight_of_a_later_block(
    name: str, tmp_path: Path, case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found during the run: what was finished stays, so a run with a repaired file of another model is refused."""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[3] = float("nan")

    change_weights(case, spoil)
    message = refused(arguments(case, tmp_path / "out"), ModelError.exit_code, capsys)
    assert f"weight {name!r} has 1 of" in message
    assert "NaN or infinite" in message
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_infinite_weight_outside_the_blocks(
    name: str, tmp_path: Path, case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[0] = float("inf")

    change_weights(case, spoil)
    assert f"weight {name!r} has 1 of" in refused(arguments(case, tmp_path / "out"), ModelError.exit_code, capsys)


def test_activations_that_overflow(tmp_path: Path, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    def grow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1e30
        tensors["model.layers.1.mlp.gate_proj.weight"] *= 1e30

    change_weights(case, grow)
    words = "calibration inputs of 'model.layers.1.mlp.down_proj' hold NaN or Inf: try --dtype float32"
    assert words in refused(arguments(case, tmp_path / "out"), ModelError.exit_code, capsys)
    assert (tmp_path / "out" / ".whit-run" / "journal.jsonl").exists()


def test_text_without_a_tokenizer(tmp_path: Path, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words " * 500)
    assert "tokenizer" in refused(arguments(case, tmp_path / "out", calibration=str(text)), DataError.exit_code, capsys)


def test_vocabulary_mismatch(tmp_path: Path, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"input_ids": torch.full((4, 8), 1000)}, tmp_path / "ids.safetensors")
    words = "gives token id 1000, but the model's vocabulary has 97 entries"
    assert words in refused(
        arguments(case, tmp_path / "out", calibration=str(tmp_path / "ids.safetensors")), DataError.exit_code, capsys
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"a\0b" * 100, "is binary"),
        (b"caf\xe9 " * 100, "is not UTF-8"),
    ],
)
def test_bad_calibration_file(
    content: bytes, words: str, tmp_path: Path, case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    message = refused(
        arguments(case, tmp_path / "out", calibration=str(tmp_path / "text.txt")), DataError.exit_code, capsys
    )
    assert words in message
    assert "text.txt" in message
    assert not (tmp_path / "out").exists()


def test_nan_in_calibration_features(
    case_of: Callable[[str], Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = tiny.inputs("whisper")
    features["input_features"][2, 3, 4] = float("nan")
    save_file(features, tmp_path / "features.safetensors")
    argv = arguments(case_of("whisper"), tmp_path / "out", calibration=str(tmp_path / "features.safetensors"))
    assert "'input_features' in" in refused(argv, DataError.exit_code, capsys)


def test_same_text_for_calibration_and_evaluation(
    tmp_path: Path, case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(case, tmp_path / "out", evaluation=str(case.options.calibration))
    assert "--allow-leak" in refused(argv, DataError.exit_code, capsys)
    assert main([*argv, "--allow-leak"]) == 0
    result = Result.load(tmp_path / "out" / "result.json")
    assert result.compressed is not None
    assert result.compressed.leak


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--bits", "9"), "must be at most 8"),
        (("--bits", "many"), "invalid value for '--bits'"),
        (("--group-sise", "64"), "did you mean '--group-size'"),
        (("--samples", "0"), "samples must be a whole number of at least 1"),
        (("--embedding-bits", "9"), "embedding_bits is 2 to 8, or 16"),
        (("--dtype", "float8"), "dtype is one of"),
        (("--device", "abacus"), "try --device cpu"),
        (("--skip", "model.layer.0.*"), "matches no layer"),
    ],
)
def test_knob_out_of_range_or_unknown(
    extra: tuple[str, ...], words: str, tmp_path: Path, case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(arguments(case, tmp_path / "out", *extra), KnobError.exit_code, capsys)
    assert not (tmp_path / "out").exists()


def test_unknown_method(tmp_path: Path, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    argv = arguments(case, tmp_path / "out", method="gtpq")
    assert "did you mean 'gptq'" in refused(argv, KnobError.exit_code, capsys)


def test_everything_skipped(tmp_path: Path, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    argv = arguments(case, tmp_path / "out", "--skip", "model.layers.*")
    assert "no layer is left to compress" in refused(argv, ModelError.exit_code, capsys)


def test_output_that_holds_something_else(tmp_path: Path, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    assert "already holds thesis.tex" in refused(arguments(case, tmp_path / "out"), OutputError.exit_code, capsys)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


def test_output_inside_a_file(tmp_path: Path, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(arguments(case, tmp_path / "file" / "out"), OutputError.exit_code, capsys)


def test_model_already_compressed(
    finished_run: Callable[..., Finished], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run("llama", "billm")
    again = Case("llama", run.output, run.case.options)
    words = "was compressed by whit already: give the original, uncompressed model"
    assert words in refused(arguments(again, tmp_path / "out"), ModelError.exit_code, capsys)


def test_output_is_the_model_itself(tmp_path: Path, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in case.model.iterdir()}
    assert "already holds" in refused(arguments(case, case.model), OutputError.exit_code, capsys)
    assert {path.name: path.read_bytes() for path in case.model.iterdir()} == before


def test_more_columns_than_tokens_raises_the_damping_and_says_so(tmp_path: Path, case: Case) -> None:
    """One sequence of six tokens cannot determine the second moments of 48 inputs."""
    calibration = tiny.save_inputs("llama", tmp_path / "short.safetensors", sequences=1, length=6)
    options = whit.RunOptions(calibration=str(calibration), evaluate=False, device="cpu")
    result = whit.compress(case.model, "gptq", tmp_path / "out", options=options, bits=4, damping=0.0)
    assert isinstance(result, Result)
    notes = [note for layer in result.layers if layer.block for note in layer.notes]
    assert len(notes) == sum(bool(layer.block) for layer in result.layers)
    assert all(note.startswith("damping raised from 0 to ") for note in notes)
    assert "damping raised from 0" in (tmp_path / "out" / "report.html").read_text()


def test_dead_inputs_are_noted_and_their_weights_are_zero(tmp_path: Path) -> None:
    """OPT's first unit never fires: its bias is far below zero, and ReLU follows."""
    case = make_case("opt", tmp_path, evaluate=False)
    name = "model.decoder.layers.0.fc1.bias"

    def silence(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][5] = -1e4

    change_weights(case, silence)
    result = whit.compress(case.model, "gptq", tmp_path / "out", options=case.options, bits=8)
    assert isinstance(result, Result)
    layer = next(layer for layer in result.layers if layer.name == "model.decoder.layers.0.fc2")
    assert any("inputs never active in calibration: weights set to zero" in note for note in layer.notes)
    weight = whit.load(tmp_path / "out").get_submodule("model.decoder.layers.0.fc2").weight
    assert isinstance(weight, torch.Tensor)
    assert not weight[:, 5].any()
    assert weight[:, :5].any()


@pytest.mark.parametrize("stored", ["lm_head.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("bits", [8, 16])
def test_tied_weight_stored_under_either_name(stored: str, bits: int, tmp_path: Path) -> None:
    case = make_case("llama-tied", tmp_path, evaluate=False, embedding_bits=bits)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors[stored] = tensors.pop("model.embed_tokens.weight")

    change_weights(case, rename)
    result = whit.compress(case.model, "rtn", tmp_path / "out", options=case.options)
    assert isinstance(result, Result)
    model = whit.load(tmp_path / "out")
    assert model.get_output_embeddings() is not None
    names = [name for name in load_file(tmp_path / "out" / "model.safetensors") if "embed" in name or "head" in name]
    assert all(name.startswith("model.embed_tokens.") for name in names)
    model.save_pretrained(tmp_path / "again")
    again, first = tmp_path / "again" / "model.safetensors", tmp_path / "out" / "model.safetensors"
    assert again.read_bytes() == first.read_bytes()


def test_audio_features_follow_the_compute_dtype(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    case = case_of("whisper")
    options = whit.RunOptions(**{**vars(case.options), "dtype": "bfloat16"})
    result = whit.compress(case.model, "gptq", tmp_path / "out", options=options, bits=8)
    assert isinstance(result, Result)
    assert result.compressed is not None
    error = result.compressed.metric("output_error")
    assert error is not None
    assert error.value < 0.01


def test_the_saved_config_points_at_no_code(tmp_path: Path, case: Case) -> None:
    path = case.model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoModelForCausalLM": "novel.Model"}}))
    whit.compress(case.model, "rtn", tmp_path / "out", options=case.options)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
