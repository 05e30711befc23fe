"""Loading a compressed directory: through transformers, by the class its config names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig

import whit.models.integration  # noqa: F401 - registers the quantiser
from whit.errors import ModelError
from whit.models.tokenizer import folder_loader

#: A saved directory is complete: nothing is fetched, and no code in it is run.
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def is_compressed(path: str | Path) -> bool:
    """Whether a directory holds a model compressed by whit."""
    config = Path(path) / "config.json"
    if not config.is_file():
        return False
    try:
        described = json.loads(config.read_text(encoding="utf-8")).get("quantization_config") or {}
    except (ValueError, AttributeError):
        return False
    return bool(described.get("quant_method") == "whit")


def load_directory(
    directory: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> nn.Module:
    """Load a model compressed by whit, ready for inference.

    Args:
        dtype: of everything that is not packed, and of the computation; default: as saved.
        device: default CPU.

    Raises:
        ModelError: not a directory compressed by whit, or its files are damaged.
    """
    path = Path(directory)
    require_compressed(path)
    try:
        config = AutoConfig.from_pretrained(path, **_LOCAL)
        model_class: Any = getattr(transformers, config.architectures[0])
        model, info = model_class.from_pretrained(path, dtype=dtype or "auto", output_loading_info=True, **_LOCAL)
    except ModelError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{str(directory)!r} cannot be loaded: {reason}") from error
    missing = sorted(info["missing_keys"])
    if missing:  # transformers only warns, and the layer would compute with whatever was in memory
        raise ModelError(
            f"{str(directory)!r} lacks {len(missing)} tensors of the model (first: {missing[0]!r}): copy it again"
        )
    loaded: nn.Module = model if device is None else model.to(device)
    return loaded.eval()


def saved_dtype(directory: str | Path) -> torch.dtype:
    """The dtype of what a compressed model holds uncompressed: that of the model it came from (float32 if not said).

    Raises:
        ModelError: not a directory compressed by whit.
    """
    require_compressed(Path(directory))
    fields = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    dtype = getattr(torch, str(fields.get("dtype")), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def require_compressed(path: Path) -> None:
    """Refuse what is not a directory compressed by whit.

    Raises:
        ModelError: says how to make one.
    """
    if not is_compressed(path):
        raise ModelError(f"{str(path)!r} is not a model compressed by whit (make one with: whit compress MODEL -o DIR)")


def load_tokenizer(directory: str | Path) -> Any:
    """The tokenizer saved beside a model, or None if there is none.

    Raises:
        ModelError: its files are damaged.
    """
    return folder_loader(Path(directory))()
