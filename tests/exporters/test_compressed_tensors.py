"""compressed-tensors folders: the library's own loader and transformers give back the very model that was packed."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor

import whit
from tests.exporters import models
from whit.errors import ExportError
from whit.formats.base import Packed
from whit.formats.grouped_integer import GroupedInteger
from whit.methods.grid import fit_grid

pytest.importorskip("compressed_tensors", reason="the compressed-tensors package is not installed")

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    models.model("llama").save_pretrained(folder)
    return folder


def grouped(bits: int, group_size: int, symmetric: bool) -> Callable[[str, Tensor], Packed]:
    def pack(name: str, weight: Tensor) -> Packed:
        layout = GroupedInteger(bits, group_size, symmetric)
        grids = [fit_grid(part, bits, symmetric) for part in weight.split(group_size or weight.shape[1], 1)]
        parts = zip(grids, weight.split(group_size or weight.shape[1], 1), strict=True)
        codes = torch.cat([grid.encode(part) for grid, part in parts], 1)
        scales, zeros = (torch.cat([getattr(grid, key) for grid in grids], 1) for key in ("scale", "zero"))
        return layout.pack(codes, scales, None if symmetric else zeros)

    return pack


def load(folder: Path, symmetric: bool = True) -> Any:
    """With transformers, as the export says: zero points need dequantize=True."""
    options = {} if symmetric else {"quantization_config": tf.CompressedTensorsConfig(dequantize=True)}
    return tf.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True, **options).eval()


def decompressed(folder: Path, layer: str) -> Tensor:
    """One weight by the library's own compressor, from the files alone."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    described = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(described)
    schemes = list(config.config_groups.values())
    scheme = next(item for item in schemes if item.targets == ["Linear"] or layer in item.targets)
    stored = load_file(folder / "model.safetensors")
    parts = {key.removeprefix(f"{layer}."): value for key, value in stored.items() if key.startswith(f"{layer}.")}
    weight: Tensor = BaseCompressor.get_value_from_registry(scheme.format).decompress(parts, scheme)["weight"]
    return weight


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"), [(4, 64, True), (4, 0, True), (8, 128, True), (4, 64, False), (8, 0, False)]
)
def test_integers_are_the_same_model_to_both_readers(
    bits: int, group_size: int, symmetric: bool, source: Path, tmp_path: Path
) -> None:
    knobs = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    directory = models.compress(source, tmp_path / "packed", **knobs)
    record = whit.export(directory, "compressed-tensors", tmp_path / "out")
    assert record.stored == {"pack-quantized": 14, "float32": 2}
    assert record.bytes_after == sum(
        (tmp_path / "out" / name).stat().st_size for name in ("config.json", "model.safetensors")
    )
    ours = whit.load(directory)
    assert torch.equal(decompressed(tmp_path / "out", LAYER), ours.get_submodule(LAYER).weight)
    theirs = load(tmp_path / "out", symmetric)
    assert torch.equal(models.logits(theirs), models.logits(ours))
    assert any("dequantize=True" in note for note in record.notes) is not symmetric


@pytest.mark.parametrize("rows", [5, 64])
@pytest.mark.parametrize("columns", [33, 40, 96])
@pytest.mark.parametrize("bits", [4, 8])
def test_packing_of_odd_shapes_is_the_librarys(bits: int, rows: int, columns: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    from whit.exporters.schemes import hold, part_specs
    from whit.exporters.source import PackedLayer

    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    zeros = torch.randint(0, 2**bits, (rows, 1), generator=generator)
    packed = GroupedInteger(bits, 0, False).pack(codes, torch.ones(rows, 1), zeros)
    layer = PackedLayer("x", "linear", packed.format, rows, columns)
    _, parts = hold(layer, packed.tensors, torch.float16)
    half = 2 ** (bits - 1)
    expected = {
        "weight_packed": pack_to_int32((codes - half).to(torch.int8), bits),
        "weight_zero_point": pack_to_int32((zeros - half).to(torch.int8), bits, packed_dim=0),
    }
    for name, tensor in expected.items():
        assert torch.equal(parts[name](), tensor), name
    for name, spec in part_specs(layer, torch.float16).items():
        made = parts[name]()
        assert (tuple(made.shape), made.dtype) == (spec.shape, spec.dtype), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.0), (torch.bfloat16, 0.03)])
def test_half_precision_differs_by_its_rounding_alone(dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    models.model("llama-tied", dtype).save_pretrained(tmp_path / "model")
    directory = models.compress(tmp_path / "model", tmp_path / "packed", bits=4, group_size=64, symmetric=True)
    record = whit.export(directory, "compressed-tensors", tmp_path / "out")
    ours, theirs = whit.load(directory), load(tmp_path / "out")
    assert theirs.dtype is dtype
    assert record.stored == {"pack-quantized": 14, str(dtype).removeprefix("torch."): 1}
    expected = ours.get_submodule(LAYER).weight
    found = theirs.get_submodule(LAYER)
    first, second = models.logits(ours), models.logits(theirs)
    assert float((first - second).norm()) <= tolerance * float(first.norm())
    # bfloat16 rounds the scale and the product: two roundings of at most 2**-8 each.
    limit = 2**-11 if dtype is torch.float16 else 1.01 * 2**-7
    assert bool(((found.weight.float() - expected).abs() <= limit * expected.abs() + 1e-7).all())


def test_layers_left_alone_are_ignored_and_embeddings_become_dense(source: Path, tmp_path: Path) -> None:
    directory = models.compress(
        source, tmp_path / "packed", bits=4, group_size=64, symmetric=True, skip=("model.layers.0.*",)
    )
    record = whit.export(directory, "compressed-tensors", tmp_path / "out")
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert described["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert {name.rpartition(".")[0] for name in described["ignore"]} == {
        "", "model.layers.0.mlp", "model.layers.0.self_attn",
    }  # fmt: skip
    assert "lm_head" in described["ignore"]
    assert [note.split()[0] for note in record.notes] == ["model.embed_tokens", "lm_head"]
    assert torch.equal(models.logits(load(tmp_path / "out")), models.logits(whit.load(directory)))


def test_two_schemes_name_their_layers(tmp_path: Path) -> None:
    four, eight = grouped(4, 64, True), grouped(8, 0, True)
    directory = models.save_packed(
        models.model("llama"), tmp_path / "packed", lambda name, w: (eight if "mlp" in name else four)(name, w)
    )
    whit.export(directory, "compressed-tensors", tmp_path / "out")
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted(len(group["targets"]) for group in groups.values()) == [6, 8]
    assert torch.equal(models.logits(load(tmp_path / "out")), models.logits(whit.load(directory)))


def test_projections_that_engines_fuse_must_share_a_scheme(tmp_path: Path) -> None:
    four, eight = grouped(4, 64, True), grouped(8, 64, True)
    directory = models.save_packed(
        models.model("llama"), tmp_path / "packed", lambda name, w: (eight if "v_proj" in name else four)(name, w)
    )
    with pytest.raises(ExportError, match=r"'model.layers.0.self_attn.q_proj'.*fuse it with .*v_proj'.*gguf can"):
        whit.export(directory, "compressed-tensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("pack", "reason"),
    [
        (grouped(3, 64, True), "4 or 8 bits, not 3.*gguf can: --to gguf"),
        (grouped(4, 96, True), "256 columns are not a multiple of 96.*gguf can"),
        (grouped(4, 40, True), "256 columns are not a multiple of 40; no other target can"),
    ],
)
def test_what_it_cannot_hold_is_refused_with_layer_format_and_remedy(
    pack: Callable[[str, Tensor], Packed], reason: str, tmp_path: Path
) -> None:
    directory = models.save_packed(models.model("llama"), tmp_path / "packed", pack)
    with pytest.raises(
        ExportError, match=r"layer 'model.layers.0.self_attn.q_proj', grouped-integer \(bits=.*" + reason
    ):
        whit.export(directory, "compressed-tensors", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed"]


def scaled(system: str, group_size: int) -> Callable[[str, Tensor], Packed]:
    layouts = importlib.import_module("whit.formats.scaled_codes")

    def pack(name: str, weight: Tensor) -> Packed:
        layout = layouts.ScaledCodes(system, group_size)
        whole = weight.abs().amax().reshape(1, 1)
        peak = whole if group_size < 0 else layouts.split_groups(weight.abs(), group_size).amax(-1)
        packed: Packed = layout.pack(weight, peak / layout.numbers.maximum)
        return packed

    return pack


def rounding(system: str, static: bool, weight: Callable[[str, Tensor], Packed]) -> Callable[[str, Tensor], Packed]:
    layouts = importlib.import_module("whit.formats.quantised_inputs")

    def pack(name: str, dense: Tensor) -> Packed:
        inner = weight(name, dense)
        scales = torch.tensor([0.05]) if static else None
        packed: Packed = layouts.QuantisedInputs(inner.format, system, static).pack(inner, scales)
        return packed

    return pack


# Per token, the library divides max|x| by 127.5 where whit and vLLM divide by 127: rounding of the inputs differs.
@pytest.mark.parametrize(
    ("name", "stored", "tolerance"),
    [
        ("int8 weights", "pack-quantized", 0.0),
        ("int4 weights", "pack-quantized", 0.0),
        ("e4m3fn weights", "float-quantized", 0.0),
        ("w8a8", "int-quantized", 0.1),
        ("w8a8 static", "int-quantized", 1e-6),  # ours multiplies integers, theirs float32
        ("w4a8", "int-quantized", 0.1),
        ("fp8", "float-quantized", 0.0),
        ("fp8 static", "float-quantized", 0.0),
    ],
)
def test_eight_bit_schemes_are_the_same_model(name: str, stored: str, tolerance: float, tmp_path: Path) -> None:
    packs = {
        "int8 weights": lambda: scaled("int8", 0),
        "int4 weights": lambda: scaled("int4", 64),
        "e4m3fn weights": lambda: scaled("e4m3fn", 64),
        "w8a8": lambda: rounding("int8", False, scaled("int8", -1)),
        "w8a8 static": lambda: rounding("int8", True, scaled("int8", 0)),
        "w4a8": lambda: rounding("int8", False, grouped(4, 64, True)),
        "fp8": lambda: rounding("e4m3fn", False, scaled("e4m3fn", 0)),
        "fp8 static": lambda: rounding("e4m3fn", True, scaled("e4m3fn", -1)),
    }
    directory = models.save_packed(models.model("llama"), tmp_path / "packed", packs[name]())
    record = whit.export(directory, "compressed-tensors", tmp_path / "out")
    assert record.stored == {stored: 14}
    ours, theirs = whit.load(directory), load(tmp_path / "out")
    first, second = models.logits(ours), models.logits(theirs)
    assert float((first - second).norm()) <= tolerance * float(first.norm())
    assert torch.equal(theirs.get_submodule(LAYER).weight.float(), ours.get_submodule(LAYER).weight)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("e5m2", "int4, int8 or e4m3fn there, not e5m2"),
        ("e4m3 inputs", "rounded to int8 or e4m3fn there, not to e4m3"),
        ("mixed", "both integers or both floats"),
        ("zero points", "no zero points there where inputs are rounded"),
    ],
)
def test_eight_bit_layouts_that_it_does_not_know(name: str, reason: str, tmp_path: Path) -> None:
    packs = {
        "e5m2": lambda: scaled("e5m2", 0),
        "e4m3 inputs": lambda: rounding("e4m3", False, scaled("e4m3", 0)),
        "mixed": lambda: rounding("int8", False, scaled("e4m3fn", 0)),
        "zero points": lambda: rounding("int8", False, grouped(8, 0, False)),
    }
    directory = models.save_packed(models.model("llama"), tmp_path / "packed", packs[name]())
    with pytest.raises(ExportError, match=reason):
        whit.export(directory, "compressed-tensors", tmp_path / "out")


def test_llm_int8_without_outlier_columns_is_w8a8(tmp_path: Path) -> None:
    layouts = pytest.importorskip("whit.formats.outlier_int8", reason="the layout of LLM.int8() is not in this version")

    def pack(outliers: str) -> Callable[[str, Tensor], Packed]:
        def one(name: str, weight: Tensor) -> Packed:
            peak = weight.abs().amax(1)
            tensors = {"codes": (weight / peak[:, None] * 127).round().to(torch.int8), "absmax": peak}
            return Packed(layouts.OutlierInt8(6.0, outliers), *weight.shape, tensors)

        return one

    directory = models.save_packed(models.model("llama"), tmp_path / "packed", pack("none"))
    assert whit.export(directory, "compressed-tensors", tmp_path / "out").stored == {"int-quantized": 14}
    ours, theirs = whit.load(directory), load(tmp_path / "out")
    first, second = models.logits(ours), models.logits(theirs)
    assert float((first - second).norm()) <= 0.1 * float(first.norm())
    assert torch.equal(theirs.get_submodule(LAYER).weight, ours.get_submodule(LAYER).weight)
    other = models.save_packed(models.model("llama"), tmp_path / "other", pack("dynamic"))
    with pytest.raises(ExportError, match="no outlier columns"):
        whit.export(other, "compressed-tensors", tmp_path / "refused")
