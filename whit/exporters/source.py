"""A compressed directory, opened for export: formats and shapes at once, tensors one at a time when asked for."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from whit.errors import ModelError
from whit.formats.base import Format, Packed
from whit.models.architecture import model_class_of
from whit.models.checkpoint import open_checkpoint
from whit.models.integration import WhitConfig
from whit.models.layers import declared_end, layer_kind
from whit.models.loading import require_compressed, saved_dtype
from whit.models.packed import packed_modules
from whit.models.skeleton import skeleton_of
from whit.models.source import SafetensorsSource
from whit.report.figures import describe_fields


@dataclass(frozen=True)
class PackedLayer:
    """Where a packed weight sits and how it is laid out.

    Attributes:
        name: module name.
        kind: of the module it replaced: "linear", "conv1d" or "embedding".
        format, rows, columns: layout and logical shape.
    """

    name: str
    kind: str
    format: Format
    rows: int
    columns: int

    def __str__(self) -> str:
        layout = describe_fields(self.format.to_json(), "format")
        return f"layer {self.name!r}, {layout}, {self.rows} x {self.columns}"


class _LazyTensors(Mapping[str, Tensor]):
    """The stored tensors of one layer, each read from its file when it is asked for."""

    def __init__(self, source: SafetensorsSource, layer: PackedLayer) -> None:
        self._source, self._layer = source, layer

    def __getitem__(self, key: str) -> Tensor:
        return self._source.load(f"{self._layer.name}.{key}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._layer.format.specs(self._layer.rows, self._layer.columns))

    def __len__(self) -> int:
        return len(self._layer.format.specs(self._layer.rows, self._layer.columns))


class CompressedModel:
    """A directory written by `whit.compress`.

    Attributes:
        directory: where it is.
        config: transformers config, without its quantisation.
        dtype: of everything that is stored dense.
        skeleton: the original model on the meta device: its modules before packing.
        layers: packed layers by module name, in the order of the model.
        tied: output head -> packed embedding it shares.

    Raises:
        ModelError: not a directory compressed by whit, or damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        require_compressed(self.directory)
        self.dtype = saved_dtype(self.directory)
        self._source = open_checkpoint(self.directory)
        try:
            config = AutoConfig.from_pretrained(self.directory, local_files_only=True, trust_remote_code=False)
        except ModelError:
            raise
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"config.json of {str(directory)!r} is not accepted ({reason})") from error
        described = config.quantization_config
        quantization = described if isinstance(described, WhitConfig) else WhitConfig(**_without_method(described))
        self.config = copy.deepcopy(config)
        del self.config.quantization_config
        self.skeleton = self._build()
        self.tied = dict(quantization.tied)
        self.layers = self._find_layers(quantization)
        self._check_complete()

    def _build(self) -> nn.Module:
        return skeleton_of(model_class_of(self.config), self.config, self.dtype)

    def _find_layers(self, quantization: WhitConfig) -> dict[str, PackedLayer]:
        packed = self._build()
        quantization.apply(packed)
        out = {}
        for name, module in packed_modules(packed).items():
            kind = layer_kind(self.skeleton.get_submodule(name))
            assert kind is not None  # WhitConfig.apply has refused it otherwise
            out[name] = PackedLayer(name, kind.name, module.format, module.rows, module.columns)
        return out

    def _check_complete(self) -> None:
        wanted = [f"{name}.{key}" for name, layer in self.layers.items() for key in self.tensors(layer)]
        missing = sorted({*wanted, *self._expected_dense()} - set(self._source.names()))
        if missing:
            raise ModelError(
                f"{str(self.directory)!r} lacks {len(missing)} tensors of the model (first: {missing[0]!r}): "
                "copy it again"
            )

    def _expected_dense(self) -> set[str]:
        replaced = {f"{name}.weight" for name in [*self.layers, *self.tied]}
        shared = set(getattr(self.skeleton, "all_tied_weights_keys", None) or {})
        return set(self.skeleton.state_dict()) - replaced - shared

    @cached_property
    def dense(self) -> list[str]:
        """Names of the tensors stored as they are, in the order of the model."""
        owned = {f"{name}.{key}" for name, layer in self.layers.items() for key in self.tensors(layer)}
        names = [name for name in self._source.names() if name not in owned]
        order = {name: position for position, name in enumerate(self.skeleton.state_dict())}
        return sorted(names, key=lambda name: (order.get(name, len(order)), name))

    @cached_property
    def ends(self) -> frozenset[str]:
        """Names of the input embedding and the output head, where the model has them."""
        getters = ("get_input_embeddings", "get_output_embeddings")
        ends = [declared_end(self.skeleton, getter) for getter in getters]
        return frozenset(name for name, item in self.skeleton.named_modules() if any(item is end for end in ends))

    def load(self, name: str) -> Tensor:
        """A dense tensor."""
        return self._source.load(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a dense tensor."""
        return self._source.shape(name)

    def dtype_of(self, name: str) -> torch.dtype:
        """Dtype of a dense tensor."""
        return self._source.dtype(name)

    def tensors(self, layer: PackedLayer) -> Mapping[str, Tensor]:
        """The stored tensors of a packed layer, read on access."""
        return _LazyTensors(self._source, layer)

    def packed(self, layer: PackedLayer) -> Packed:
        """A packed layer with all its tensors."""
        return Packed(layer.format, layer.rows, layer.columns, dict(self.tensors(layer)))


def _without_method(described: Any) -> dict[str, Any]:
    return {key: value for key, value in dict(described).items() if key != "quant_method"}
