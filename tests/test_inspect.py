"""`whit inspect`: what it shows of a compressed directory, and of something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.report.example import example_result
from whit.cli import main
from whit.cli.inspection import kernel_of
from whit.formats.grouped_integer import GroupedInteger
from whit.kernels import explain, linear
from whit.kernels.linear import Preparation
from whit.report.record import LayerRecord, Result
from whit.report.write import write_reports


def inspectable(directory: Path) -> Path:
    """A directory whose record uses a format that exists."""
    result = example_result(1)
    layers = [layer for layer in result.layers if layer.format["format"] == "grouped-integer"]
    write_reports(directory, Result.from_json({**result.to_json(), "layers": [vars(layer) for layer in layers]}))
    described = {"dtype": "float16", "quantization_config": {"quant_method": "whit"}}
    (directory / "config.json").write_text(json.dumps(described), encoding="utf-8")
    return directory


def test_inspect_lists_format_shape_bits_error_and_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = GroupedInteger(8, 64, True)
    kernel = explain(torch.zeros(1, 64), layout.pack(torch.zeros(1, 64), torch.ones(1, 1)))  # depends on the machine
    assert main(["inspect", str(inspectable(tmp_path))]) == 0
    out = capsys.readouterr().out
    for part in (
        "model.embed_tokens",
        "grouped-integer (bits=8,",
        "49152x576",
        "8.375",
        kernel,
        "left alone: 1 weight",
    ):
        assert part in out
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    layer = json.loads(capsys.readouterr().out)["layers"][0]
    assert layer["kernel"] == kernel
    assert layer["stored_bits"] == pytest.approx(8.375)


@pytest.mark.parametrize(
    ("block", "dtype", "said"),
    [
        ("model.layers.0", torch.bfloat16, True),
        ("model.layers.0", torch.float32, False),
        ("", torch.bfloat16, False),
    ],
)
def test_inspect_says_in_which_form_decoding_holds_a_layer_of_a_block(
    block: str, dtype: torch.dtype, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = Preparation("other form", lambda packed, dtype: dtype == torch.bfloat16, list, lambda packed: 3.04)
    monkeypatch.setitem(linear._PREPARATIONS, "grouped-integer", form)
    layer = LayerRecord("name", block, 8, 64, {}, GroupedInteger(8, 64, True).to_json(), 0, 0.0, 0.0, 0.0)
    found = kernel_of(layer, dtype, torch.device("cpu"))
    assert found.endswith("; decoding: other form, 3.0 bits resident") is said


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "holds no result.json"), ("{", "cannot be read"), ('{"layers": []}', "cannot be read")],
)
def test_inspect_of_something_else_is_a_model_error(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "result.json").write_text(content, encoding="utf-8")
    assert main(["inspect", str(tmp_path)]) == 3
    assert message in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "absent")]) == 3
    assert "no directory" in capsys.readouterr().err
