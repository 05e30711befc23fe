"""Reading GGUF files: config and tokenizer through transformers, weights tensor by tensor through the gguf package.

GGUF names and layouts differ from transformers' in a few ways per architecture, kept here as data:

- `llama` files store the rows of the query and key projections in interleaved rotary order (pairs 2i, 2i+1);
  transformers rotates halves (pairs i, i + d/2), so the rows of each head are put back.
- `gemma3` files store the weights of norms as 1 + w, transformers stores w.

File layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from whit.errors import MissingDependencyError, ModelError, nearest
from whit.models.source import describe, hash_file, hash_lines

_MAGIC = b"GGUF"

Transform = Callable[[Tensor, Any], Tensor]


def unpermute_rotary(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from interleaved rotary order (pairs 2i, 2i+1) to half-split order (pairs i, i + d/2).

    Args:
        weight: (heads * d, ...), d even.
        heads: number of heads in the rows.

    Returns:
        The same rows reordered, contiguous.
    """
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()


def _query(weight: Tensor, config: Any) -> Tensor:
    return unpermute_rotary(weight, config.num_attention_heads)


def _key(weight: Tensor, config: Any) -> Tensor:
    return unpermute_rotary(weight, config.num_key_value_heads)


def _minus_one(weight: Tensor, config: Any) -> Tensor:
    return weight - 1.0


_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ATTENTION = {f"attn_{letter}": f"self_attn.{letter}_proj" for letter in "qkv"} | {"attn_output": "self_attn.o_proj"}
_GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class GGUFArchitecture:
    """How the tensors of one GGUF architecture become those of a transformers model.

    Attributes:
        block: "blk.N." parts -> "model.layers.N." parts (weights and biases alike).
        dtype: in which the architecture is known to compute well and untouched tensors are saved.
        transforms: name part (in a block or outside) -> what to do with the dequantised tensor.
    """

    block: Mapping[str, str]
    dtype: torch.dtype
    transforms: Mapping[str, Transform]

    def name(self, stored: str) -> str | None:
        """Model name of a stored tensor, or None if the architecture has no such tensor."""
        if stored in _OUTER:
            return _OUTER[stored]
        head, _, rest = stored.partition(".")
        index, _, rest = rest.partition(".")
        part, _, kind = rest.partition(".")
        if head != "blk" or not index.isdigit() or part not in self.block or kind not in ("weight", "bias"):
            return None
        return f"model.layers.{index}.{self.block[part]}.{kind}"

    def transform(self, stored: str, value: Tensor, config: Any) -> Tensor:
        """Apply the transform of a stored tensor, if it has one."""
        part = stored.split(".")[-2]
        return self.transforms[part](value, config) if part in self.transforms else value


# float16 keeps 11 significant bits of a scale (float16) times an integer; bfloat16 would keep 8. The families whose
# activations are known to overflow float16 are saved in bfloat16.
ARCHITECTURES: dict[str, GGUFArchitecture] = {
    "llama": GGUFArchitecture(_NORMS | _ATTENTION | _GATED, torch.float16, {"attn_q": _query, "attn_k": _key}),
    "qwen2": GGUFArchitecture(_NORMS | _ATTENTION | _GATED, torch.bfloat16, {}),
    "qwen3": GGUFArchitecture(_NORMS | _HEAD_NORMS | _ATTENTION | _GATED, torch.bfloat16, {}),
    "gemma3": GGUFArchitecture(
        _SANDWICH_NORMS | _HEAD_NORMS | _ATTENTION | _GATED,
        torch.bfloat16,
        dict.fromkeys((*_SANDWICH_NORMS, *_HEAD_NORMS, "output_norm"), _minus_one),
    ),
}

# Tensors that carry no weights of the model: factors already contained in the config's rotary parameters.
_DERIVED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF file, opened: config, weights, tokenizer loader, dtype for what is saved uncompressed, remarks."""

    config: Any
    source: GGUFSource
    load_tokenizer: Callable[[], Any]
    dtype: torch.dtype
    notes: tuple[str, ...]


class GGUFSource:
    """Tensors of a GGUF file under transformers names, dequantised to float32 one at a time."""

    def __init__(self, path: Path, tensors: Mapping[str, Any], architecture: GGUFArchitecture, config: Any) -> None:
        self._path = path
        self._tensors = dict(tensors)  # model name -> gguf.ReaderTensor, whose data is a view of the file
        self._architecture = architecture
        self._config = config
        self._fingerprint: str | None = None

    @property
    def stored_bytes(self) -> int:
        """Bytes of the file."""
        return self._path.stat().st_size

    def names(self) -> list[str]:
        """Every model name, sorted."""
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor (GGUF lists dimensions innermost first)."""
        return tuple(int(size) for size in reversed(self._tensor(name).shape))

    def dtype(self, name: str) -> torch.dtype:
        """float32: what dequantisation yields."""
        self._tensor(name)
        return torch.float32

    def load(self, name: str) -> Tensor:
        """Dequantise one tensor."""
        import gguf

        tensor = self._tensor(name)
        values = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        value = torch.from_numpy(values).reshape(self.shape(name))
        return self._architecture.transform(tensor.name, value, self._config)

    def quantization(self, name: str) -> str:
        """Name of the stored type, for example "Q4_1"."""
        return str(self._tensor(name).tensor_type.name)

    def fingerprint(self) -> str:
        """sha256 over names, shapes, dtypes and the file."""
        if self._fingerprint is None:
            self._fingerprint = hash_lines([*describe(self), hash_file(self._path)])
        return self._fingerprint

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise ModelError(f"{self._path.name!r} has no tensor {name!r}{nearest(name, self._tensors)}")
        return self._tensors[name]


def is_gguf(path: Path) -> bool:
    """Whether a file should be read as GGUF: by its name, or by its first four bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == _MAGIC
    except OSError as error:
        raise ModelError(f"cannot read {str(path)!r}: {error.strerror or error}") from error


def open_gguf(path: Path) -> GGUFModel:
    """Open a GGUF file without reading its weights.

    Raises:
        MissingDependencyError: the gguf package is not installed.
        ModelError: not GGUF, truncated, of an architecture whit does not know, or with tensors it does not know.
    """
    reader = _read(path)
    name = _architecture_name(reader, path)
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{str(path)!r} has GGUF architecture {name!r}; whit reads {', '.join(ARCHITECTURES)}"
            f"{nearest(name, ARCHITECTURES)} (or give the model's transformers folder)"
        )
    architecture = ARCHITECTURES[name]
    tensors: dict[str, Any] = {}
    notes = []
    for tensor in reader.tensors:
        if tensor.name in _DERIVED:
            notes.append(f"{tensor.name} of the GGUF file is not used: rotary scaling is taken from its metadata")
            continue
        model_name = architecture.name(tensor.name)
        if model_name is None:
            raise ModelError(f"{str(path)!r} has a tensor {tensor.name!r} that architecture {name!r} should not have")
        tensors[model_name] = tensor
    config = _quietly(lambda: AutoConfig.from_pretrained(path.parent, gguf_file=path.name), path, "config")
    config.tie_word_embeddings = "lm_head.weight" not in tensors
    config.dtype = architecture.dtype
    if not config.architectures and type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        config.architectures = [transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]

    def load_tokenizer() -> Any:
        return _quietly(lambda: AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name), path, "tokenizer")

    quantised = sorted({str(tensor.tensor_type.name) for tensor in reader.tensors} - {"F32", "F16", "BF16"})
    if quantised:
        notes.append(
            f"the file's weights are already quantised ({', '.join(quantised)}): figures are against the dequantised "
            "model, and a format that contains the same grid reproduces it without error"
        )
    source = GGUFSource(path, tensors, architecture, config)
    return GGUFModel(config, source, load_tokenizer, architecture.dtype, tuple(notes))


def _read(path: Path) -> Any:
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(f"reading {path.name!r} needs the gguf package: pip install 'gguf>=0.17'")
    import gguf

    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    if magic != _MAGIC:
        raise ModelError(f"{str(path)!r} is not a GGUF file (it starts with {magic!r}, not {_MAGIC!r})")
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:
        raise ModelError(
            f"{str(path)!r} is a damaged or incomplete GGUF file ({type(error).__name__}: {error}): download it again"
        ) from error
    size = path.stat().st_size
    for tensor in reader.tensors:
        if int(tensor.data_offset) + int(tensor.n_bytes) > size:
            raise ModelError(f"{str(path)!r} is incomplete: tensor {tensor.name!r} ends past its {size:,} bytes")
    return reader


def _architecture_name(reader: Any, path: Path) -> str:
    field = reader.fields.get("general.architecture")
    if field is None:
        raise ModelError(f"{str(path)!r} does not say its architecture (general.architecture): download it again")
    return str(field.contents())


def _quietly(load: Callable[[], Any], path: Path, what: str) -> Any:
    """Run a transformers GGUF loader without its progress bars."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return load()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"the {what} in {str(path)!r} cannot be read ({reason})") from error
    finally:
        logger.setLevel(level)
