"""Reading GGUF files: config from the metadata, weights tensor by tensor, tokenizer through transformers.

Where names and layouts differ from transformers' is said by `gguf_architectures.py`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from whit.errors import MissingDependencyError, ModelError, nearest
from whit.models.gguf_architectures import ARCHITECTURES, CONFIG_KEYS, TOKEN_KEYS, GGUFArchitecture
from whit.models.gguf_header import MAGIC, GGUFTensor, read_gguf_header
from whit.models.gguf_values import values_of
from whit.models.one_file import OneFileSource
from whit.models.source import read_bytes


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF file, opened: config, weights, tokenizer loader, dtype for what is saved uncompressed, remarks."""

    config: Any
    source: GGUFSource
    load_tokenizer: Callable[[], Any]
    dtype: torch.dtype
    notes: tuple[str, ...]


class GGUFSource(OneFileSource[GGUFTensor]):
    """Tensors of a GGUF file under transformers names, dequantised to float32 one at a time."""

    def __init__(
        self, path: Path, tensors: Mapping[str, GGUFTensor], architecture: GGUFArchitecture, config: Any
    ) -> None:
        super().__init__(path, tensors)
        self._architecture = architecture
        self._config = config

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """float32: what dequantisation yields."""
        self.entry(name)
        return torch.float32

    def load(self, name: str) -> Tensor:
        """Dequantise one tensor."""
        tensor = self.entry(name)
        content = read_bytes(self.path, tensor.start, stored_size(tensor))
        value = values_of(type_name(tensor), content, math.prod(tensor.shape[:-1])).reshape(tensor.shape)
        transform = self._architecture.transform(tensor.name)
        return value if transform is None else transform.read(value, self._config)

    def quantization(self, name: str) -> str:
        """Name of the stored type, for example "Q4_1"."""
        return type_name(self.entry(name))


def type_name(tensor: GGUFTensor) -> str:
    """Name of a tensor's stored type.

    Raises:
        ModelError: the installed gguf package does not know the type.
    """
    import gguf

    try:
        return str(gguf.GGMLQuantizationType(tensor.type_number).name)
    except ValueError:
        raise ModelError(
            f"tensor {tensor.name!r} has GGUF type {tensor.type_number}, unknown to gguf: pip install -U gguf"
        ) from None


def stored_size(tensor: GGUFTensor) -> int:
    """Bytes of a tensor in the file.

    Raises:
        ModelError: its rows are not a whole number of quantisation blocks.
    """
    import gguf

    type_name(tensor)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.type_number)]
    if tensor.shape[-1] % block:
        raise ModelError(f"tensor {tensor.name!r} of shape {tensor.shape} is not made of blocks of {block}")
    return int(math.prod(tensor.shape) // block * size)


def is_gguf(path: Path) -> bool:
    """Whether a file should be read as GGUF: by its name, or by its first four bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError as error:
        raise ModelError(f"cannot read {str(path)!r}: {error.strerror or error}") from error


def open_gguf(path: Path) -> GGUFModel:
    """Open a GGUF file without reading its weights.

    Raises:
        MissingDependencyError: the gguf package is not installed.
        ModelError: not GGUF, truncated, of an architecture whit does not know, or with tensors it does not know.
    """
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(f"reading {path.name!r} needs the gguf package: pip install 'gguf>=0.17'")
    header = read_gguf_header(path)
    name = str(header.metadata.get("general.architecture"))
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{str(path)!r} has GGUF architecture {name!r}; whit reads {', '.join(ARCHITECTURES)}"
            f"{nearest(name, ARCHITECTURES)} (or give the model's transformers folder)"
        )
    architecture = ARCHITECTURES[name]
    size = path.stat().st_size
    tensors: dict[str, GGUFTensor] = {}
    for tensor in header.tensors:
        model_name = architecture.name(tensor.name)
        if model_name is None:
            raise ModelError(
                f"{str(path)!r} has a tensor {tensor.name!r} that whit does not know in architecture {name!r}: "
                "give the model's transformers folder"
            )
        if tensor.start + stored_size(tensor) > size:
            raise ModelError(
                f"{str(path)!r} is incomplete: tensor {tensor.name!r} ends at byte "
                f"{tensor.start + stored_size(tensor):,} of {size:,}: download it again"
            )
        tensors[model_name] = tensor
    config = _config(path, name, header.metadata, tensors)
    source = GGUFSource(path, tensors, architecture, config)
    return GGUFModel(config, source, _tokenizer_loader(path, config), architecture.dtype, _notes(header.tensors))


def _config(path: Path, name: str, metadata: Mapping[str, Any], tensors: Mapping[str, GGUFTensor]) -> Any:
    architecture = ARCHITECTURES[name]
    scaling = metadata.get(f"{name}.rope.scaling.type", "none")
    if scaling != "none":
        raise ModelError(
            f"{str(path)!r} scales rotary positions ({scaling!r}), which whit does not read from GGUF: "
            "give the model's transformers folder"
        )
    if "model.embed_tokens.weight" not in tensors:
        raise ModelError(f"{str(path)!r} has no tensor 'token_embd.weight': download it again")
    fields = dict(architecture.defaults)
    for key, target in (*CONFIG_KEYS, *architecture.config):
        value = metadata.get(f"{name}.{key}")
        if value is not None:
            fields[target] = _shortest(value) if isinstance(value, float) else value
    for key, target in TOKEN_KEYS.items():
        if f"tokenizer.ggml.{key}_token_id" in metadata:
            fields[target] = metadata[f"tokenizer.ggml.{key}_token_id"]
    try:
        return AutoConfig.for_model(
            architecture.model_type,
            architectures=[architecture.model_class],
            vocab_size=tensors["model.embed_tokens.weight"].shape[0],
            tie_word_embeddings="lm_head.weight" not in tensors,
            dtype=architecture.dtype,
            **fields,
        )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"the metadata of {str(path)!r} makes no {architecture.model_type} config ({reason})"
        ) from error


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: metadata holds 1e-05 as 9.99999974e-06."""
    return float(str(np.float32(value)))


def _notes(tensors: list[GGUFTensor]) -> tuple[str, ...]:
    quantised = sorted({type_name(tensor) for tensor in tensors} - {"F32", "F16", "BF16"})
    if not quantised:
        return ()
    return (
        f"the file's weights are already quantised ({', '.join(quantised)}): figures are against the dequantised "
        "model, and a format that contains the same grid would reproduce it without error",
    )


def _tokenizer_loader(path: Path, config: Any) -> Callable[[], Any]:
    # AutoTokenizer reads the file for seconds to learn that such a kind of model has no tokenizer class of its own.
    own = TOKENIZER_MAPPING_NAMES.get(config.model_type)
    loader: Any = PreTrainedTokenizerFast if own is None else AutoTokenizer

    @lru_cache(maxsize=1)
    def read() -> Any:  # seconds of work for some, and asked for at both ends of a run
        logger = logging.getLogger("transformers")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # transformers shows progress bars of its own
                return loader.from_pretrained(
                    path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
                )
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"the tokenizer in {str(path)!r} cannot be read ({reason})") from error
        finally:
            logger.setLevel(level)

    def load() -> Any:
        return copy.deepcopy(read())  # a tokenizer remembers how it was last used, and that would be saved with it

    return load
