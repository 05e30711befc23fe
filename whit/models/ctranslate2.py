"""Reading a Whisper model in CTranslate2's format under the names of `WhisperForConditionalGeneration`.

model.bin, little-endian (CTranslate2, python/ctranslate2/specs/model_spec.py, binary version 6): u32 version, string
spec (u16 length with the final NUL), u32 revision, u32 count; per variable: name, u8 rank, u32 dimensions, u8 type,
u32 bytes, data; then u32 aliases as pairs of names. Self-attention stores query, key and value as one matrix,
cross-attention key and value; transformers' key projections have no bias (it would not change the softmax).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, WhisperConfig

from whit.errors import ModelError
from whit.models.checkpoint import read_json_object
from whit.models.one_file import OneFileSource
from whit.models.source import read_bytes

_DTYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16}
_KINDS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}

# CTranslate2 part -> transformers parts, which share the rows equally.
_LAYER = {
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
_OUTER = {"conv1": "conv1", "conv2": "conv2", "layer_norm": "layer_norm", "embeddings": "embed_tokens"}


@dataclass(frozen=True)
class Variable:
    """One stored variable: dtype, shape, first byte, bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    bytes: int


@dataclass(frozen=True)
class _Slice:
    """Part `index` of `count` equal row ranges of a variable."""

    variable: str
    index: int
    count: int


@dataclass(frozen=True)
class WhisperModel:
    """A CTranslate2 Whisper folder, opened."""

    config: Any
    source: CTranslate2Source
    load_tokenizer: Callable[[], Any]
    generation_config: Any


def read_variables(path: Path) -> dict[str, Variable]:
    """The variables of a model.bin by name.

    Raises:
        ModelError: not this format, or truncated.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (version,) = _unpack(file, "<I")
            spec = _string(file)
            if version != 6 or spec != "WhisperSpec":
                raise ModelError(
                    f"{str(path)!r} is CTranslate2 version {version} spec {spec!r}; whit reads version 6 'WhisperSpec'"
                )
            _, count = _unpack(file, "<II")
            variables = {}
            for _ in range(count):
                name = _string(file)
                (rank,) = _unpack(file, "<B")
                shape = _unpack(file, f"<{rank}I")
                kind, length = _unpack(file, "<BI")
                variables[name] = Variable(_DTYPES[kind], shape, file.tell(), length)
                if file.tell() + length > size:
                    raise EOFError
                file.seek(length, 1)
    except (EOFError, KeyError, UnicodeDecodeError) as error:
        raise ModelError(f"{str(path)!r} is a damaged or incomplete CTranslate2 file: download it again") from error
    return variables


def _unpack(file: BinaryIO, layout: str) -> tuple[int, ...]:
    raw = file.read(struct.calcsize(layout))
    if len(raw) < struct.calcsize(layout):
        raise EOFError
    return struct.unpack(layout, raw)


def _string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "<H")
    return file.read(length).rstrip(b"\0").decode()


class CTranslate2Source(OneFileSource[_Slice]):
    """Tensors of a Whisper model.bin under transformers names."""

    def __init__(self, path: Path, variables: dict[str, Variable]) -> None:
        super().__init__(path, dict(_whisper_names(variables)))
        self._variables = variables

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        part = self.entry(name)
        rows, *rest = self._variables[part.variable].shape
        return (rows // part.count, *rest)

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor."""
        return self._variables[self.entry(name).variable].dtype

    def load(self, name: str) -> Tensor:
        """Read one tensor."""
        part = self.entry(name)
        variable = self._variables[part.variable]
        length = variable.bytes // part.count
        raw = read_bytes(self.path, variable.start + part.index * length, length)
        return raw.view(variable.dtype).reshape(self.shape(name))


def _whisper_names(variables: dict[str, Variable]) -> Iterator[tuple[str, _Slice]]:
    for stored, variable in variables.items():
        side, _, rest = stored.partition("/")
        part, _, kind = rest.rpartition("/")
        layer = re.fullmatch(r"layer_(\d+)/(.+)", part)
        if stored.endswith("position_encodings/encodings"):
            yield f"model.{side}.embed_positions.weight", _Slice(stored, 0, 1)
        elif layer is not None and layer[2] in _LAYER and kind in _KINDS and variable.shape:
            targets = _LAYER[layer[2]]
            for index, target in enumerate(targets):
                if not (target.endswith("k_proj") and kind == "bias"):
                    name = f"model.{side}.layers.{layer[1]}.{target}.{_KINDS[kind]}"
                    yield name, _Slice(stored, index, len(targets))
        elif part in _OUTER and kind in _KINDS:
            yield f"model.{side}.{_OUTER[part]}.{_KINDS[kind]}", _Slice(stored, 0, 1)


def open_whisper(path: Path) -> WhisperModel:
    """Open a CTranslate2 Whisper folder by its model.bin; config from the shapes, tokens from tokenizer.json.

    Raises:
        ModelError: the file or its neighbours (config.json, tokenizer.json) are damaged or absent.
    """
    variables = read_variables(path)
    settings = read_json_object(path.parent / "config.json")
    added = read_json_object(path.parent / "tokenizer.json").get("added_tokens", [])
    tokens = {item["content"]: item["id"] for item in added}
    try:
        config = _config(path, variables, tokens)
        generation = _generation_config(settings, tokens, config)
    except KeyError as error:
        raise ModelError(f"{str(path.parent)!r} lacks {error} of a Whisper model: download it again") from error
    tokenizer_file = path.parent / "tokenizer.json"

    def load_tokenizer() -> Any:
        end = "<|endoftext|>"
        return PreTrainedTokenizerFast(
            tokenizer_file=str(tokenizer_file), bos_token=end, eos_token=end, pad_token=end, unk_token=end
        )

    return WhisperModel(config, CTranslate2Source(path, variables), load_tokenizer, generation)


def _config(path: Path, variables: dict[str, Variable], tokens: dict[str, int]) -> Any:
    def layers(side: str) -> int:
        return sum(bool(re.fullmatch(rf"{side}/layer_\d+/ffn/linear_0/weight", name)) for name in variables)

    def number(name: str) -> int:
        variable = variables[name]
        return int(read_bytes(path, variable.start, variable.bytes).view(variable.dtype)[0])

    vocabulary, width = variables["decoder/embeddings/weight"].shape
    end = tokens["<|endoftext|>"]
    return WhisperConfig(
        architectures=["WhisperForConditionalGeneration"],
        vocab_size=vocabulary,
        d_model=width,
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        encoder_layers=layers("encoder"),
        decoder_layers=layers("decoder"),
        encoder_attention_heads=number("encoder/num_heads"),
        decoder_attention_heads=number("decoder/num_heads"),
        encoder_ffn_dim=variables["encoder/layer_0/ffn/linear_0/weight"].shape[0],
        decoder_ffn_dim=variables["decoder/layer_0/ffn/linear_0/weight"].shape[0],
        max_source_positions=variables["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=variables["decoder/position_encodings/encodings"].shape[0],
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=tokens["<|startoftranscript|>"],
        dtype=variables["decoder/embeddings/weight"].dtype,
    )


def _generation_config(settings: dict[str, Any], tokens: dict[str, int], config: Any) -> Any:
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        no_timestamps_token_id=tokens["<|notimestamps|>"],
        # English-only models were trained with the end token 50256, multilingual ones have one token more before it.
        is_multilingual=config.eos_token_id != 50256,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"],
        max_length=config.max_target_positions,
        return_timestamps=False,
    )
