"""The gradient pass gives what plain autograd gives, and refuses models and gradients it cannot use."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, LlamaForCausalLM

import whit
from tests import tiny
from tests.pipeline.conftest import Case, Recorder, make_case
from tests.pipeline.needy import Sensitive
from whit.errors import ModelError
from whit.models.resolve import resolve_model
from whit.models.skeleton import load_dense
from whit.pipeline import gradients
from whit.pipeline.assign import AssignedLayer
from whit.pipeline.compress import merge_batches
from whit.pipeline.gradient_store import GradientStore
from whit.pipeline.gradient_task import GradientTask, gradient_layers, single_sequences
from whit.pipeline.gradients import gather_gradients
from whit.pipeline.prepare import Job, prepare
from whit.pipeline.stage import Batch, Stage
from whit.pipeline.way import find_way

Sums = dict[str, Tensor]


def task_of(case: Case, folder: Path, batch_size: int = 1) -> GradientTask:
    job: Job = prepare(case.model, Sensitive(), folder / "out", case.options)
    stage = Stage(job.skeleton, job.reference.source, job.stacks, torch.float32, job.device)
    batches = merge_batches(job.calibration.batches, batch_size)
    folder.mkdir(exist_ok=True)
    return GradientTask(
        stage, single_sequences(batches), gradient_layers(job.assignment), GradientStore(folder), Recorder()
    )


def found_by(task: GradientTask) -> Sums:
    gather_gradients(task)
    return {name: value for block in task.layers for name, value in task.store.gradients(block).items()}


def loss_by_hand(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of one sequence: of given labels, of tokens in place (masked), or of next tokens."""
    labels = batch.get("labels")
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[0]
    if labels is not None:
        return functional.cross_entropy(logits, labels[0])
    ids = batch["input_ids"][0]
    if "MaskedLM" in type(model).__name__:
        return functional.cross_entropy(logits, ids)
    return functional.cross_entropy(logits[:-1], ids[1:])


def plain(case: Case, layers: list[AssignedLayer]) -> Sums:
    """The definition, with the whole model and autograd."""
    model = load_dense(resolve_model(case.model), torch.float32, "cpu")
    sums: Sums = {}
    assert case.options.calibration is not None
    data = load_file(case.options.calibration)
    for batch in single_sequences([data]):
        model.zero_grad()
        loss_by_hand(model, batch).backward()  # type: ignore[no-untyped-call]
        for layer in layers:
            weight = model.get_submodule(layer.name).weight
            assert isinstance(weight, nn.Parameter)
            assert weight.grad is not None
            square = layer.kind.matrix(weight.grad).square()
            sums[layer.name] = sums[layer.name] + square if layer.name in sums else square
    return {name: value.sqrt() for name, value in sums.items()}


def save_masked_bert(folder: Path) -> Case:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    BertForMaskedLM(config).save_pretrained(folder / "model")
    calibration = tiny.save_inputs("bert", folder / "calibration.safetensors")
    options = whit.RunOptions(calibration=str(calibration), evaluate=False, device="cpu")
    return Case("bert", folder / "model", options)


@pytest.fixture(scope="module")
def get_case(case_of: Callable[[str], Case], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    masked = save_masked_bert(tmp_path_factory.mktemp("masked"))
    return lambda family: masked if family == "bert" else case_of(family)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_gradients_are_those_of_plain_autograd(family: str, get_case: Callable[[str], Case], tmp_path: Path) -> None:
    case = get_case(family)
    task = task_of(case, tmp_path / "work")
    found = found_by(task)
    layers = [layer for inside in task.layers.values() for layer in inside.values()]
    expected = plain(case, layers)
    assert set(found) == set(expected) == {layer.name for layer in layers}
    for layer in layers:
        assert found[layer.name].shape == (layer.rows, layer.columns)
        assert found[layer.name].dtype == torch.float32
        torch.testing.assert_close(found[layer.name], expected[layer.name], rtol=2e-4, atol=1e-7)
    assert all(parameter.is_meta for parameter in task.stage.model.parameters())


def test_only_an_encoder_with_its_decoder_needs_the_whole_model(
    get_case: Callable[[str], Case], tmp_path: Path
) -> None:
    ways = {}
    for family in sorted(tiny.FAMILIES):
        task = task_of(get_case(family), tmp_path / family)
        with task.stage.outside():
            ways[family] = find_way(task.stage, task.stage.cast(task.sequences[0]))
    assert [family for family, way in ways.items() if way is None] == ["whisper"]
    albert = ways["albert"]
    assert albert is not None
    assert [len(span) for _, span in albert.spans] == [3]  # one block, called three times


@pytest.mark.parametrize("family", ["llama", "whisper"])
def test_squares_are_those_of_single_sequences(family: str, get_case: Callable[[str], Case], tmp_path: Path) -> None:
    case = get_case(family)
    one, many = (found_by(task_of(case, tmp_path / str(size), size)) for size in (1, 4))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_chunks_change_nothing(
    get_case: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = task_of(get_case("gpt2"), tmp_path / "whole")
    expected = found_by(whole)
    monkeypatch.setattr(gradients, "available_bytes", lambda _: 60_000)
    task = task_of(get_case("gpt2"), tmp_path / "chunks")
    found = found_by(task)
    assert isinstance(task.listener, Recorder)
    assert isinstance(whole.listener, Recorder)
    assert len(task.listener.steps) > len(whole.listener.steps) == 4
    assert task.listener.phases == [("gradients", len(task.listener.steps))]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_padding_is_not_scored(tmp_path: Path) -> None:
    case = make_case("llama", tmp_path)
    ids = tiny.inputs("llama", sequences=2)["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, -6:] = 0
    save_file({"input_ids": ids, "attention_mask": mask}, tmp_path / "padded.safetensors")
    save_file({"input_ids": ids[:, :-6].contiguous()}, tmp_path / "cut.safetensors")
    padded, cut = (
        found_by(
            task_of(
                dataclasses.replace(
                    case, options=dataclasses.replace(case.options, calibration=str(tmp_path / f"{name}.safetensors"))
                ),
                tmp_path / name,
            )
        )
        for name in ("padded", "cut")
    )
    for name in cut:
        torch.testing.assert_close(padded[name], cut[name], rtol=1e-4, atol=1e-8)


class Weigher(Recorder):
    """Bytes of float tensors of two dimensions (weights, gradients, sums) alive at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[int] = []

    def step(self, description: str) -> None:
        super().step(description)
        gc.collect()
        tensors = [
            item
            for item in gc.get_objects()
            if type(item) in (Tensor, nn.Parameter)
            and not item.is_meta
            and item.dim() == 2
            and item.is_floating_point()
        ]
        storages = {item.untyped_storage().data_ptr(): item.nbytes for item in tensors}
        self.alive.append(sum(storages.values()))


def test_no_more_is_held_than_one_blocks_gradients(tmp_path: Path) -> None:
    peaks = []
    for layers in (2, 8):
        folder = tmp_path / str(layers)
        torch.manual_seed(0)
        tiny.llama(layers=layers).save_pretrained(folder / "model")
        calibration = tiny.save_inputs("llama", folder / "calibration.safetensors", sequences=2)
        case = Case(
            "llama", folder / "model", whit.RunOptions(calibration=str(calibration), evaluate=False, device="cpu")
        )
        weigher = Weigher()
        task = dataclasses.replace(task_of(case, folder / "work"), listener=weigher)
        gather_gradients(task)
        assert len(weigher.alive) == 2 * layers
        peaks.append(max(weigher.alive))
        del task
    block = 4 * sum(parameter.numel() for parameter in tiny.llama(layers=1).model.layers[0].parameters())  # type: ignore[union-attr]
    assert peaks[1] - peaks[0] < block  # six more blocks


def test_layers_get_the_gradients_of_the_dense_model(get_case: Callable[[str], Case], tmp_path: Path) -> None:
    """Through the whole run: the saved model is what the method makes of plain autograd's gradients."""
    case = get_case("llama")
    options = dataclasses.replace(case.options, evaluate=False, batch_size=4, true_sequential=True)
    listener = Recorder()
    result = whit.compress(case.model, Sensitive(8), tmp_path / "out", options=options, listener=listener)
    assert isinstance(result, whit.Result)
    assert "passes" in result.timings
    names = [name for name, _ in listener.phases]
    assert names.index("gradients") < names.index("embeddings")
    assert names.count("gradients") == 1
    original = load_dense(resolve_model(case.model), torch.float32, "cpu")
    task = task_of(case, tmp_path / "work")
    layers = [layer for inside in task.layers.values() for layer in inside.values()]
    expected = plain(case, layers)
    model = whit.load(tmp_path / "out")
    agree, total = 0, 0
    for layer in layers:
        weight = original.get_parameter(f"{layer.name}.weight")
        score = weight.abs() * expected[layer.name]
        removed = torch.zeros_like(score, dtype=torch.bool)
        removed.scatter_(1, score.argsort(dim=1)[:, : layer.columns // 2], True)
        saved = model.get_submodule(layer.name).weight
        assert isinstance(saved, Tensor)
        agree += int((saved[removed].abs() < 0.01 * weight.abs().max()).sum())
        total += int(removed.sum())
    assert agree / total > 0.999


def test_runs_without_such_methods_make_no_pass(get_case: Callable[[str], Case], tmp_path: Path) -> None:
    case = get_case("llama")
    listener = Recorder()
    options = dataclasses.replace(case.options, evaluate=False)
    result = whit.compress(case.model, "gptq", tmp_path / "out", options=options, listener=listener)
    assert isinstance(result, whit.Result)
    assert not {"gradients", "survey"} & {name for name, _ in listener.phases}
    assert "allocation" not in result.run
    assert "passes" not in result.timings


def test_half_precision_runs_take_gradients_in_float32(get_case: Callable[[str], Case], tmp_path: Path) -> None:
    case = get_case("llama")
    options = dataclasses.replace(case.options, evaluate=False, dtype="bfloat16")
    result = whit.compress(case.model, Sensitive(8), tmp_path / "out", options=options)
    assert isinstance(result, whit.Result)
    full = whit.compress(
        case.model, Sensitive(8), tmp_path / "full", options=dataclasses.replace(options, dtype="float32")
    )
    assert isinstance(full, whit.Result)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "full" / "model.safetensors"
    ).read_bytes()


def test_a_model_without_a_loss_is_refused_before_any_work(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    case = case_of("bert")
    with pytest.raises(
        ModelError, match=r"BertModel computes no loss, so it has no gradient: choose a method that .*gptq.*rtn"
    ) as caught:
        whit.compress(case.model, Sensitive(), tmp_path / "out", options=case.options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_labels_that_do_not_follow_from_the_inputs(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=56, num_hidden_layers=1, num_attention_heads=4
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    calibration = tiny.save_inputs("bert", tmp_path / "calibration.safetensors")
    options = whit.RunOptions(calibration=str(calibration), evaluate=False, device="cpu")
    with pytest.raises(
        ModelError, match=r"does not follow from the calibration inputs \(input_ids\): give them labels"
    ):
        whit.compress(tmp_path / "model", Sensitive(), tmp_path / "out", options=options)
    data = tiny.inputs("bert")
    save_file({**data, "labels": torch.arange(6) % 2}, tmp_path / "labelled.safetensors")
    labelled = dataclasses.replace(options, calibration=str(tmp_path / "labelled.safetensors"))
    assert isinstance(whit.compress(tmp_path / "model", Sensitive(), tmp_path / "out", options=labelled), whit.Result)


def spoil(case: Case, folder: Path, change: Callable[[LlamaForCausalLM], None]) -> Case:
    model = LlamaForCausalLM.from_pretrained(case.model)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    return dataclasses.replace(case, model=folder)


def test_a_gradient_that_is_zero_throughout_is_refused(get_case: Callable[[str], Case], tmp_path: Path) -> None:
    def silence(model: LlamaForCausalLM) -> None:
        model.model.layers[1].mlp.down_proj.weight.zero_()

    case = spoil(get_case("llama"), tmp_path / "model", silence)
    with pytest.raises(ModelError, match=r"'model.layers.1.mlp.(gate|up)_proj' is zero for every calibration sequence"):
        whit.compress(case.model, Sensitive(), tmp_path / "out", options=case.options)


def test_a_loss_that_overflows_is_refused(get_case: Callable[[str], Case], tmp_path: Path) -> None:
    def shout(model: LlamaForCausalLM) -> None:
        model.lm_head.weight.mul_(1e38)

    case = spoil(get_case("llama"), tmp_path / "model", shout)
    with pytest.raises(ModelError, match=r"the loss of a calibration sequence is (nan|inf): .* no gradients \(.*rtn"):
        whit.compress(case.model, Sensitive(), tmp_path / "out", options=case.options)


def test_a_gradient_that_overflows_is_refused(get_case: Callable[[str], Case], tmp_path: Path) -> None:
    def shout(model: LlamaForCausalLM) -> None:
        model.lm_head.weight.mul_(1e24)

    case = spoil(get_case("llama"), tmp_path / "model", shout)
    with pytest.raises(ModelError, match=r"respect to 'model.layers.2.*' is NaN or Inf: check the model's weights"):
        whit.compress(case.model, Sensitive(), tmp_path / "out", options=case.options)


def test_a_sequence_of_one_token_has_no_loss(tmp_path: Path) -> None:
    case = make_case("llama", tmp_path)
    save_file({"input_ids": torch.tensor([[5], [6]])}, tmp_path / "short.safetensors")
    options = dataclasses.replace(case.options, calibration=str(tmp_path / "short.safetensors"))
    with pytest.raises(ModelError, match=r"is nan: give sequences of at least two tokens"):
        whit.compress(case.model, Sensitive(), tmp_path / "out", options=options)
