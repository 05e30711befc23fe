"""Config and class of a transformers model: which class a folder asks for, in which dtype, without remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, GenerationConfig

from whit.errors import ModelError


def load_config(directory: Path, fields: dict[str, Any]) -> Any:
    """The transformers config of a folder whose config.json holds `fields`.

    Raises:
        ModelError: the model type is unknown to the installed transformers, or the values do not fit.
    """
    if fields["model_type"] not in transformers.CONFIG_MAPPING:
        if "auto_map" in fields:
            raise ModelError(
                f"{str(directory)!r} is of type {fields['model_type']!r}, which needs Python code from the checkpoint "
                "(auto_map); whit never runs such code: use a model that transformers itself knows"
            )
        raise ModelError(
            f"{str(directory)!r} is of type {fields['model_type']!r}, which transformers {transformers.__version__} "
            "does not know: check config.json, or try pip install -U transformers"
        )
    names = fields.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"'architectures' in config.json is {names!r}: make it a list of class names")
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"config.json of {str(directory)!r} is not accepted ({reason})") from error


def load_generation_config(directory: Path) -> Any:
    """The stored generation config of a folder, or None.

    Raises:
        ModelError: the file is there but cannot be read.
    """
    if not (directory / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"generation_config.json of {str(directory)!r} cannot be read ({reason}): fix it") from error


def model_class_of(config: Any) -> type:
    """The class that `config.architectures` names, else the causal-LM or plain class of the config's type.

    Raises:
        ModelError: transformers has no such class.
    """
    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type):
            return found
        if getattr(config, "auto_map", None):
            raise ModelError(
                f"architecture {name!r} needs Python code from the checkpoint (auto_map); whit never runs such code: "
                "use a model that transformers itself knows"
            )
        raise ModelError(
            f"architecture {name!r} is not in transformers {transformers.__version__}: check 'architectures' in "
            "config.json, or try pip install -U transformers"
        )
    for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            first: type = found[0] if isinstance(found, tuple | list) else found
            return first
    raise ModelError(f"config of type {config.model_type!r} names no architecture: add 'architectures' to config.json")


def config_dtype(config: Any) -> torch.dtype | None:
    """The floating dtype the config names, if any (a text config inside a composite one counts)."""
    for part in (config, config.get_text_config()):
        dtype = getattr(part, "dtype", None)
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype.removeprefix("torch."), None)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= 2:
            return dtype
    return None
