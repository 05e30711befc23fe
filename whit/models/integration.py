"""Loading with transformers: registers the `whit` quantiser, so `AutoModelForCausalLM.from_pretrained(DIR)` just works.

The saved config holds `quantization_config`: which modules are packed in which layout, and which heads share the packed
embedding. Before weights are read, those modules of the (meta) model are replaced by packed ones; transformers then
loads the stored tensors by name like any others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from whit.errors import ModelError
from whit.formats.base import Format, format_from_json
from whit.models.layers import layer_kind
from whit.models.packed import (
    PackedEmbedding,
    PackedModule,
    TiedPackedLinear,
    packed_modules,
    replace_module,
    tied_linear,
)

CONFIG_VERSION = 1


@register_quantization_config("whit")
class WhitConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What `config.json` says about the packed modules.

    Attributes:
        formats: distinct layouts as JSON. layers: module name -> index into `formats`.
        tied: head module name -> packed embedding it shares.
        scaled: embedding module name -> constant its rows are multiplied by.
        version: of this description; a newer one is refused with the remedy.
    """

    def __init__(
        self,
        formats: list[dict[str, Any]],
        layers: dict[str, int],
        tied: dict[str, str] | None = None,
        scaled: dict[str, float] | None = None,
        version: int = CONFIG_VERSION,
        **_: Any,
    ) -> None:
        if version > CONFIG_VERSION:
            raise ModelError(
                f"the model was saved by a newer whit (description version {version}): pip install -U whit"
            )
        self.quant_method = "whit"
        self.formats = formats
        self.layers = layers
        self.tied = dict(tied or {})
        self.scaled = dict(scaled or {})
        self.version = version

    @classmethod
    def of(cls, formats: Mapping[str, Format], tied: Mapping[str, str], scaled: Mapping[str, float]) -> WhitConfig:
        """The description of layers in these layouts (by module name), each distinct layout once."""
        distinct: list[dict[str, Any]] = []
        layers: dict[str, int] = {}
        for name, layout in formats.items():
            described = layout.to_json()
            if described not in distinct:
                distinct.append(described)
            layers[name] = distinct.index(described)
        return cls(distinct, layers, dict(tied), dict(scaled))

    def apply(self, model: nn.Module) -> None:
        """Replace the described modules of a model by empty packed ones.

        Raises:
            ModelError: a described module does not exist or holds no compressible matrix.
        """
        for name, index in self.layers.items():
            try:
                module = model.get_submodule(name)
            except AttributeError:
                raise ModelError(f"config.json packs a module {name!r} that {type(model).__name__} lacks") from None
            if isinstance(module, PackedModule):
                continue
            layout = format_from_json(self.formats[index])
            if name in self.scaled and isinstance(module, nn.Embedding):
                # On the meta device the constant cannot be found by trying, so the file says it.
                size = (module.num_embeddings, module.embedding_dim)
                packed: nn.Module = PackedEmbedding(layout, *size, module.weight.dtype, self.scaled[name])
            else:
                kind = layer_kind(module)
                if kind is None:
                    raise ModelError(f"config.json packs {name!r}, but a {type(module).__name__} cannot be packed")
                packed = kind.build(module, layout)
            replace_module(model, name, packed)
        for head, source in self.tied.items():
            shared = model.get_submodule(source)
            if not isinstance(shared, PackedModule):
                raise ModelError(f"config.json ties {head!r} to {source!r}, which is not packed")
            replace_module(model, head, tied_linear(shared, model.get_submodule(head)))
        untie_packed(model)


def untie_packed(model: nn.Module) -> None:
    """Drop packed weights from transformers' list of tied parameters: they no longer exist as parameters."""
    packed = {f"{name}.weight" for name in packed_modules(model)}
    packed |= {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, TiedPackedLinear)}
    for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
        tied = getattr(model, attribute, None)
        if isinstance(tied, dict):
            kept = {key: value for key, value in tied.items() if key not in packed and value not in packed}
            setattr(model, attribute, kept)


@register_quantizer("whit")
class WhitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Connects `WhitConfig` with transformers' loading. Models are compressed by `whit.compress`, not on load."""

    requires_calibration = True
    quantization_config: WhitConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        self.quantization_config.apply(model)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Yes: `save_pretrained` writes the packed tensors back as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed codes have no gradient."""
        return False
