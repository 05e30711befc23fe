"""What every target shares: outputs that are never overwritten, nothing left behind, errors that say what to do."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import whit
from tests.exporters import models
from whit.cli import main
from whit.errors import ExportError, KnobError, MissingDependencyError, ModelError, OutputError
from whit.exporters import available_targets
from whit.exporters.compressed_tensors import CompressedTensors
from whit.exporters.source import CompressedModel

STORIES = Path(__file__).parents[1] / "assets" / "stories260k"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260k, whose 64 columns are two GGUF blocks (172 columns of down_proj are none and stay dense)."""
    return models.compress(
        STORIES,
        tmp_path_factory.mktemp("made") / "packed",
        bits=4,
        group_size=32,
        symmetric=True,
        skip=("*.down_proj",),
    )


def test_targets_are_found_by_name() -> None:
    assert list(available_targets()) == ["compressed-tensors", "gguf"]
    assert all(cls.summary for cls in available_targets().values())


def test_an_unknown_target_names_the_nearest(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(KnobError, match=r"no export target 'ggml': .* compressed-tensors, gguf; did you mean 'gguf'"):
        whit.export(directory, "ggml", tmp_path / "out")


def test_an_unknown_type_names_the_nearest(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(KnobError, match=r"--prefer is one of TQ1_0, .*, got 'TQ2'; did you mean 'TQ2_0'"):
        whit.export(directory, "gguf", tmp_path / "out", prefer="TQ2")
    with pytest.raises(KnobError, match=r"nothing that compressed-tensors knows, got 'TQ2_0'"):
        whit.export(directory, "compressed-tensors", tmp_path / "out", prefer="TQ2_0")


def test_only_compressed_directories_are_exported(tmp_path: Path) -> None:
    for source in (STORIES, tmp_path / "absent"):
        with pytest.raises(ModelError, match="not a model compressed by whit"):
            whit.export(source, "compressed-tensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_directory_that_lacks_a_tensor_is_refused(directory: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.codes"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors .*'model.layers.2.mlp.up_proj.codes'"):
        whit.export(copy, "compressed-tensors", tmp_path / "out")


@pytest.mark.parametrize("target", sorted(available_targets()))
def test_outputs_are_never_overwritten(target: str, directory: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place, words in ((tmp_path / "full", "already holds thesis.txt"), (tmp_path / "file", "is a file")):
        with pytest.raises(OutputError, match=words):
            whit.export(directory, target, place)
    with pytest.raises(OutputError, match="already holds"):
        whit.export(directory, target, directory)
    assert (tmp_path / "full" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_a_file_is_never_overwritten(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(OutputError, match=r"model.gguf' exists"):
        whit.export(directory, "gguf", tmp_path / "model.gguf")
    with pytest.raises(OutputError, match=r"model.gguf', which is a file"):
        whit.export(directory, "gguf", tmp_path / "model.gguf" / "deep" / "x.gguf")
    assert (tmp_path / "model.gguf").read_text() == "mine"


def test_a_failure_leaves_nothing_behind(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = CompressedTensors.write

    def fails(*arguments: object) -> None:
        write(*arguments)  # type: ignore[arg-type]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CompressedTensors, "write", fails)
    with pytest.raises(OSError, match="No space"):
        whit.export(directory, "compressed-tensors", tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []


def test_an_existing_empty_directory_is_filled(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    whit.export(directory, "compressed-tensors", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert not names & {"result.json", "README.md", "report.html"}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()


def test_the_same_export_gives_the_same_bytes(directory: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        whit.export(directory, "compressed-tensors", tmp_path / name)
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_layers_that_are_neither_linear_nor_embedding(tmp_path: Path) -> None:
    from tests.tiny import save_model

    source = save_model("gpt2", tmp_path / "gpt2")
    directory = models.compress(source, tmp_path / "packed", bits=4, group_size=0, symmetric=True)
    with pytest.raises(ExportError, match=r"'transformer.h.0.attn.c_attn'.*nn.Linear layers, not conv1d; no other"):
        whit.export(directory, "compressed-tensors", tmp_path / "out")
    with pytest.raises(ExportError, match=r"the GGUF of LlamaForCausalLM, .*, not of GPT2LMHeadModel"):
        whit.export(directory, "gguf", tmp_path / "out")


def test_without_the_gguf_package_the_error_says_what_to_install(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(MissingDependencyError, match=r"pip install 'gguf>=0.17'"):
        whit.export(directory, "gguf", tmp_path / "out")


def test_shapes_and_tensors_are_those_of_the_loaded_model(directory: Path) -> None:
    opened, loaded = CompressedModel(directory), whit.load(directory)
    assert opened.ends == {"model.embed_tokens", "lm_head"}
    assert opened.tied == {"lm_head": "model.embed_tokens"}
    for name, layer in opened.layers.items():
        assert opened.packed(layer).unpack().equal(loaded.get_submodule(name).weight), name
    assert {"model.norm.weight", "model.layers.0.mlp.down_proj.weight"} <= set(opened.dense)
    assert not any("q_proj" in name for name in opened.dense)


def test_the_command_shows_what_became_of_the_weights(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(directory), "--to", "compressed-tensors", "-o", str(tmp_path / "a"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["stored"] == {"pack-quantized": 30, "float32": 1}
    assert main(["export", str(directory), "--to", "compressed-tensor", "-o", str(tmp_path / "b")]) == 2
    assert "did you mean 'compressed-tensors'" in capsys.readouterr().err
    assert main(["export", str(directory), "--to", "compressed-tensors", "-o", str(tmp_path / "a")]) == 5
    assert "already holds" in capsys.readouterr().err
