"""Every family through the whole pipeline: the saved model loads, behaves, holds no float copy; counts are exact."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

import whit
from tests import tiny
from tests.pipeline.conftest import Case, Finished
from whit.evaluation.outputs import run_model
from whit.methods.statistics import relative_output_error
from whit.models.packed import PackedModule, TiedPackedLinear, packed_modules
from whit.models.resolve import resolve_model
from whit.models.skeleton import load_dense
from whit.pipeline.gather import SecondMoment
from whit.report.record import Result

FAMILIES = sorted(tiny.FAMILIES)
AUTO = {
    "albert": transformers.AutoModelForMaskedLM,
    "bert": transformers.AutoModel,
    "whisper": transformers.AutoModelForSpeechSeq2Seq,
}
Run = Callable[..., Finished]


def outputs(model: nn.Module, family: str) -> Tensor:
    """The main output on the evaluation inputs, float32."""
    return run_model(model, tiny.inputs(family, seed=2, sequences=2), "cpu")[1].float()


def relative_error(output: Tensor, reference: Tensor) -> float:
    return float((output - reference).square().sum() / (reference - reference.mean()).square().sum())


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "knobs"), [("gptq", {"bits": 8}), ("rtn", {"bits": 8, "group_size": 32})])
def test_eight_bits_behave_like_the_original(
    family: str, method: str, knobs: dict[str, int], finished_run: Run
) -> None:
    run = finished_run(family, method, **knobs)
    original = load_dense(resolve_model(run.case.model), torch.float32, "cpu")
    assert relative_error(outputs(whit.load(run.output), family), outputs(original, family)) < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_one_bit_costs_more_than_eight_but_is_no_noise(family: str, finished_run: Run) -> None:
    run, fine = finished_run(family, "billm"), finished_run(family, "gptq", bits=8)
    coarse_errors = [layer.error for layer in run.result.layers if layer.block]
    fine_errors = [layer.error for layer in fine.result.layers if layer.block]
    assert max(fine_errors) < min(coarse_errors)
    assert max(coarse_errors) < 0.5
    assert run.result.size.compressed_bits < 0.5 * fine.result.size.compressed_bits


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_the_very_same_model(family: str, finished_run: Run) -> None:
    run = finished_run(family, "billm")
    auto = AUTO.get(family, transformers.AutoModelForCausalLM).from_pretrained(run.output).eval()
    loaded = whit.load(run.output)
    assert type(auto) is type(loaded)
    assert torch.equal(outputs(auto, family), outputs(loaded, family))
    assert set(packed_modules(auto)) == {layer.name for layer in run.result.layers}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_float_copy_of_a_compressed_weight_is_stored(family: str, finished_run: Run) -> None:
    run = finished_run(family, "billm")
    stored = stored_tensors(run.output)
    model = whit.load(run.output)
    assert set(stored) == set(model.state_dict()) - set(getattr(model, "all_tied_weights_keys", {}))
    for layer in run.result.layers:
        mine = {name: tensor for name, tensor in stored.items() if name.rpartition(".")[0] == layer.name}
        packed = {name: tensor for name, tensor in mine.items() if not name.endswith(".bias")}
        assert f"{layer.name}.weight" not in mine
        assert sum(tensor.numel() * tensor.element_size() for tensor in packed.values()) == layer.stored_bytes
        assert not any(tensor.is_floating_point() and tensor.numel() >= layer.parameters for tensor in packed.values())
    dense = sum(parameter.numel() for parameter in model.parameters())
    assert dense == run.result.size.parameters - sum(layer.parameters for layer in run.result.layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_are_bytes_on_disk_over_parameters(family: str, finished_run: Run) -> None:
    run = finished_run(family, "billm")
    size = run.result.size
    original = load_dense(resolve_model(run.case.model), torch.float32, "cpu")
    assert size.parameters == sum(parameter.numel() for parameter in original.parameters())
    weights, config = run.output / "model.safetensors", run.output / "config.json"
    assert size.file_bytes == weights.stat().st_size + config.stat().st_size
    assert size.file_bits == size.file_bytes * 8 / size.parameters
    blocks = {layer.name: layer for layer in run.result.layers if layer.block}
    stored = stored_tensors(run.output)
    packed_bytes = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in stored.items()
        if name.rpartition(".")[0] in blocks and not name.endswith(".bias")
    )
    assert size.compressed_bytes == packed_bytes
    weight_count = sum(original.get_parameter(f"{name}.weight").numel() for name in blocks)
    assert size.compressed_bits == packed_bytes * 8 / weight_count


@pytest.mark.parametrize("family", FAMILIES)
def test_plan_foretells_the_size_of_the_files(family: str, finished_run: Run) -> None:
    run = finished_run(family, "billm")
    assert run.plan.file_bytes == pytest.approx(run.result.size.file_bytes, rel=0.002)
    assert run.plan.compressed_bits == run.result.size.compressed_bits
    assert run.plan.parameters == run.result.size.parameters


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["billm", "gptq"])
def test_save_pretrained_writes_the_same_bytes_again(
    family: str, method: str, finished_run: Run, tmp_path: Path
) -> None:
    run = finished_run(family, method, **({"bits": 8} if method == "gptq" else {}))
    whit.load(run.output).save_pretrained(tmp_path / "again")
    written = sorted(path.name for path in (tmp_path / "again").iterdir())
    assert {"config.json", "model.safetensors"} <= set(written)
    for name in written:
        assert (tmp_path / "again" / name).read_bytes() == (run.output / name).read_bytes(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_what_save_pretrained_wrote_changes_nothing(family: str, finished_run: Run, tmp_path: Path) -> None:
    run = finished_run(family, "billm")
    whit.load(run.output).save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(whit.load(tmp_path / "again"), family), outputs(whit.load(run.output), family))


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "opt", "gemma3", "albert", "whisper"])
def test_tied_embeddings_stay_tied_and_are_stored_once(family: str, finished_run: Run) -> None:
    run = finished_run(family, "billm")
    model = whit.load(run.output)
    heads = [module for module in model.modules() if isinstance(module, TiedPackedLinear)]
    assert len(heads) == 1
    assert heads[0].source is model.get_input_embeddings()
    described = json.loads((run.output / "config.json").read_text())["quantization_config"]
    ((head, source),) = described["tied"].items()
    assert model.get_submodule(source) is heads[0].source
    names = set(stored_tensors(run.output))
    assert not any(name.startswith(head + ".") and name != f"{head}.bias" for name in names)
    assert sum(layer.name in (head, source) for layer in run.result.layers) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_changes_the_computation_not_what_is_stored(family: str, finished_run: Run) -> None:
    run = finished_run(family, "gptq", bits=8)
    stored = stored_tensors(run.output)
    model = whit.load(run.output, dtype=torch.bfloat16)
    for name, module in packed_modules(model).items():
        for key, tensor in module.packed.tensors.items():
            assert tensor.dtype == stored[f"{name}.{key}"].dtype
            assert torch.equal(tensor, stored[f"{name}.{key}"])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert relative_error(outputs(model, family), outputs(whit.load(run.output), family)) < 0.02


def layer_inputs(model: nn.Module, family: str) -> dict[str, Tensor]:
    """H of every packed layer on the calibration inputs, one sequence at a time, as the model is now."""
    moments: dict[str, SecondMoment] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            width = arguments[0].shape[-1]
            moments.setdefault(name, SecondMoment(torch.zeros(width, width))).update(arguments[0].detach().clone())

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, PackedModule) and module.columns != tiny.VOCABULARY
    ]
    samples = tiny.inputs(family)
    for row in range(6):
        batch = {name: tensor[row : row + 1] for name, tensor in samples.items() if name != "labels"}
        with torch.no_grad():
            model(**batch, **({} if family in ("bert", "albert") else {"use_cache": False}))
    for handle in handles:
        handle.remove()
    return {name: moment.moment for name, moment in moments.items()}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "albert"])
def test_true_sequential_layers_see_every_earlier_layer_compressed(
    family: str, case_of: Callable[[str], Case], tmp_path: Path
) -> None:
    """The recorded errors are those on the inputs that the finished model really feeds its layers.

    (In the shared block of ALBERT a layer's inputs depend on the layer itself, so no order can achieve that.)
    """
    case = case_of(family)
    options = dataclasses.replace(case.options, true_sequential=True, evaluate=False)
    result = whit.compress(case.model, "gptq", tmp_path / "out", options=options, bits=2)
    assert isinstance(result, Result)
    model = whit.load(tmp_path / "out")
    original = load_dense(resolve_model(case.model), torch.float32, "cpu")
    moments = layer_inputs(model, family)
    checked = 0
    for layer in result.layers:
        if not layer.block:
            continue
        packed, dense = model.get_submodule(layer.name), original.get_submodule(layer.name)
        assert isinstance(packed, PackedModule)
        weight = (dense.weight.T if family == "gpt2" else dense.weight).detach()
        error = relative_output_error(weight, packed.weight, moments[layer.name])
        assert layer.error == pytest.approx(error, rel=1e-3), layer.name
        checked += 1
    assert checked == len(original_layers(original, result))


def original_layers(original: nn.Module, result: Result) -> list[str]:
    """Layers in blocks that the result must name."""
    blocks = {layer.block for layer in result.layers if layer.block}
    matrices = (nn.Linear, transformers.pytorch_utils.Conv1D)
    return [
        name
        for name, module in original.named_modules()
        if isinstance(module, matrices) and any(name.startswith(block + ".") for block in blocks)
    ]


def test_order_changes_only_layers_after_the_first_group(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    case = case_of("llama")
    errors = []
    for sequential in (False, True):
        options = dataclasses.replace(case.options, true_sequential=sequential, evaluate=False)
        result = whit.compress(case.model, "gptq", tmp_path / str(sequential), options=options, bits=2)
        assert isinstance(result, Result)
        errors.append({layer.name: layer.error for layer in result.layers})
    once, again = errors
    first = [name for name in once if "layers.0.self_attn" in name and "o_proj" not in name]
    assert len(first) == 3
    assert all(once[name] == again[name] for name in first)
    later = "model.layers.0.mlp.down_proj"
    assert once[later] != again[later]


@pytest.mark.parametrize("family", ["llama", "gpt2", "whisper"])
def test_other_dtypes_of_the_original(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny.FAMILIES[family]().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    calibration = tiny.save_inputs(family, tmp_path / "calibration.safetensors")
    options = whit.RunOptions(calibration=str(calibration), evaluate=False, device="cpu")
    result = whit.compress(tmp_path / "model", "rtn", tmp_path / "out", options=options, bits=4)
    assert isinstance(result, Result)
    model = whit.load(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert result.size.original_dense_bytes == 2 * result.size.parameters
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_same_bytes(family: str, finished_run: Run, tmp_path: Path) -> None:
    run = finished_run(family, "billm")
    options = dataclasses.replace(run.case.options, evaluate=False)
    whit.compress(run.case.model, "billm", tmp_path / "out", options=options)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (run.output / name).read_bytes()


def test_preparation_of_inputs_is_kept(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    case = case_of("whisper")
    model = tmp_path / "model"
    shutil.copytree(case.model, model)
    (model / "preprocessor_config.json").write_text('{"feature_size": 8}')
    options = dataclasses.replace(case.options, evaluate=False)
    whit.compress(model, "rtn", tmp_path / "out", options=options, bits=8, group_size=16)
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"feature_size": 8}'
