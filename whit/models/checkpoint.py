"""A folder in transformers format: its config.json and its safetensors files, checked before use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from whit.errors import ModelError
from whit.models.source import SafetensorsSource

_INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OTHER_FRAMEWORKS = (".h5", ".msgpack", ".onnx")
PICKLED_REMEDY = (
    "if you trust the file, convert it once with transformers: "
    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW) (or the class that config.json names)"
)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ModelError: unreadable, not JSON, or not an object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{str(path)!r} is not JSON ({error}): fix it or download it again") from error
    if not isinstance(fields, dict):
        raise ModelError(f"{str(path)!r} holds a {type(fields).__name__}, not a JSON object: download it again")
    return fields


def read_config_json(directory: Path) -> dict[str, Any]:
    """The fields of config.json, with a model_type and without a quantisation.

    Raises:
        ModelError: no config.json, no model_type, or the model is compressed already.
    """
    path = directory / "config.json"
    if not path.exists():
        raise ModelError(_without_config(directory))
    fields = read_json_object(path)
    if not isinstance(fields.get("model_type"), str) or not fields["model_type"]:
        raise ModelError(f"{str(path)!r} has no 'model_type', so its architecture is unknown: add it")
    quantization = fields.get("quantization_config") or fields.get("compression_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        by = "whit already" if method == "whit" else f"another quantiser ({method!r})"
        raise ModelError(f"{str(directory)!r} was compressed by {by}: give the original, uncompressed model")
    return fields


def _without_config(directory: Path) -> str:
    try:
        names = sorted(item.name for item in directory.iterdir())
    except OSError as error:
        return f"cannot read {str(directory)!r}: {error.strerror or error}"
    models = [name for name in names if (directory / name / "config.json").is_file()]
    files = [name for name in names if name.endswith(".gguf")]
    hints = [str(directory / name) for name in (*models, *files)]
    hint = f"; did you mean {hints[0]!r}?" if hints else ": give the folder that save_pretrained wrote"
    return f"{str(directory)!r} has no config.json{hint}"


def open_checkpoint(directory: Path) -> SafetensorsSource:
    """The weights of a folder: model.safetensors, an index with its shards, or the only safetensors file.

    Raises:
        ModelError: no safetensors files, pickled weights, an index that names absent shards or tensors, or a damaged
            file.
    """
    if (directory / "model.safetensors").is_file():
        return SafetensorsSource([directory / "model.safetensors"])
    if (directory / _INDEX).is_file():
        return _sharded(directory)
    names = sorted(item.name for item in directory.iterdir() if item.is_file())
    found = [name for name in names if name.endswith(".safetensors")]
    if len(found) == 1:
        return SafetensorsSource([directory / found[0]])
    if found:
        raise ModelError(
            f"{str(directory)!r} holds {len(found)} safetensors files ({found[0]}, ...) but no {_INDEX}: "
            "download the index as well"
        )
    for kind, endings in (("pickled", _PICKLED), ("non-PyTorch", _OTHER_FRAMEWORKS)):
        weights = [name for name in names if name.endswith(endings)]
        if weights:
            raise ModelError(
                f"{str(directory)!r} holds only {kind} weights ({weights[0]}), not read by whit: {PICKLED_REMEDY}"
            )
    raise ModelError(f"{str(directory)!r} holds no weights (*.safetensors): download them as well")


def _sharded(directory: Path) -> SafetensorsSource:
    index = directory / _INDEX
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{str(index)!r} has no 'weight_map': download it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ModelError(f"{str(index)!r} places tensor {name!r} in {shard!r}, which is not a file of the folder")
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (directory / shard).is_file()]
    if absent:
        raise ModelError(
            f"{str(index)!r} names {len(absent)} of {len(shards)} shards that are not there (first: {absent[0]!r}): "
            "download them as well"
        )
    source = SafetensorsSource([directory / shard for shard in shards])
    stored = set(source.names())
    for name, shard in sorted(weight_map.items()):
        if name not in stored or source.file_of(name).name != shard:
            raise ModelError(
                f"{str(index)!r} says that {shard!r} holds tensor {name!r}, but it does not: download both again"
            )
    return source
