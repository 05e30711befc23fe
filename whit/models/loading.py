"""Loading a compressed directory: through transformers, by the class its config names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer

import whit.models.integration  # noqa: F401 - registers the quantiser
from whit.errors import ModelError


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
    if not is_compressed(path):
        raise ModelError(
            f"{str(directory)!r} is not a model compressed by whit (make one with: whit compress MODEL -o DIR)"
        )
    try:
        config = AutoConfig.from_pretrained(path)
        model_class: Any = getattr(transformers, config.architectures[0])
        model: nn.Module = model_class.from_pretrained(path, dtype=dtype or "auto")
    except ModelError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{str(directory)!r} cannot be loaded: {reason}") from error
    return model.to(device).eval() if device is not None else model.eval()


def load_tokenizer(directory: str | Path) -> Any:
    """The tokenizer saved beside a model, or None."""
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception:
        return None
