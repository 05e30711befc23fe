"""Surveys divide a budget among blocks; interrupted passes continue and end with the same bytes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import whit
from tests.pipeline.conftest import Case, Finished, Recorder
from tests.pipeline.needy import Budgeted, Hopeless, Sensitive
from tests.pipeline.test_resume import assert_same_files
from whit.errors import ModelError
from whit.methods.base import Method
from whit.methods.chain import PruneThenQuantise
from whit.methods.pruner_zero import PrunerZero
from whit.methods.rtn import RTN
from whit.methods.wanda import Wanda
from whit.models.resolve import resolve_model
from whit.models.skeleton import load_dense
from whit.pipeline import gradients
from whit.pipeline.gradient_store import GradientStore
from whit.pipeline.journal import WORK_FOLDER
from whit.pipeline.recipe import Recipe, Step
from whit.report.record import Result

What = Method | Recipe


def compress(case: Case, what: What, output: Path, listener: whit.Listener | None = None, **changes: Any) -> Result:
    options = dataclasses.replace(case.options, **{"evaluate": False, **changes})
    result = whit.compress(case.model, what, output, options=options, listener=listener)
    assert isinstance(result, Result)
    return result


def bits_by_block(result: Result) -> dict[str, set[int]]:
    out: dict[str, set[int]] = {}
    for layer in result.layers:
        if layer.block:
            out.setdefault(layer.block, set()).add(layer.format["bits"])
    return out


def scores_by_hand(case: Case) -> list[float]:
    """sum over layers and weights of W_ij^2 / N sum x_j^2 on the dense model's inputs, block by block."""
    model = load_dense(resolve_model(case.model), torch.float32, "cpu")
    assert case.options.calibration is not None
    ids = load_file(case.options.calibration)["input_ids"]
    scores = []
    for layer in model.model.layers:  # type: ignore[union-attr]
        total, handles = [0.0], []
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):

                def hook(
                    module: torch.nn.Linear, arguments: tuple[torch.Tensor, ...], total: list[float] = total
                ) -> None:
                    squares = arguments[0].square().sum((0, 1)) / len(ids)
                    total[0] += float((module.weight.square() @ squares).sum())

                handles.append(module.register_forward_pre_hook(hook))  # type: ignore[arg-type]
        with torch.no_grad():
            model(input_ids=ids)
        for handle in handles:
            handle.remove()
        scores.append(total[0])
    return scores


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_budget_is_divided_by_what_the_dense_blocks_show(
    batch_size: int, case_of: Callable[[str], Case], tmp_path: Path
) -> None:
    case = case_of("llama")
    listener = Recorder()
    result = compress(case, Budgeted(), tmp_path / "out", listener, batch_size=batch_size)
    expected = scores_by_hand(case)
    (entry,) = result.run["allocation"]
    assert entry["method"] == Budgeted().to_json()
    blocks = entry["blocks"]
    assert list(blocks) == [f"model.layers.{index}" for index in range(3)]
    assert [item["score"] for item in blocks.values()] == pytest.approx(expected, rel=1e-4)
    order = sorted(range(3), key=lambda index: expected[index])
    bits = dict(zip(order, (3, 4, 5), strict=True))
    assert bits_by_block(result) == {f"model.layers.{index}": {bits[index]} for index in range(3)}
    for index, item in enumerate(blocks.values()):
        assert item["method"] == Budgeted(bits[index]).to_json()
        assert item["parameters"] == sum(
            layer.parameters for layer in result.layers if layer.block.endswith(str(index))
        )
    assert all(layer.method["bits"] in bits_by_block(result)[layer.block] for layer in result.layers if layer.block)
    assert [name for name, _ in listener.phases].count("survey") == 1
    assert json.loads((tmp_path / "out" / "result.json").read_text())["run"]["allocation"] == [entry]
    assert "divided the budget of budgeted among 3 blocks" in (tmp_path / "out" / "README.md").read_text()


def test_the_saved_model_loads_and_its_sizes_are_those_of_the_files(
    case_of: Callable[[str], Case], tmp_path: Path
) -> None:
    result = compress(case_of("gpt2"), Budgeted(), tmp_path / "out", evaluate=True)
    files = [tmp_path / "out" / name for name in ("model.safetensors", "config.json")]
    assert result.size.file_bytes == sum(path.stat().st_size for path in files)
    assert sorted(bits for found in bits_by_block(result).values() for bits in found) == [3, 5]
    model = whit.load(tmp_path / "out")
    for layer in result.layers:
        assert model.get_submodule(layer.name).format.to_json() == layer.format  # type: ignore[union-attr]
    assert result.compressed is not None
    perplexity = result.compressed.metric("perplexity")
    assert perplexity is not None
    assert 1 < perplexity.value < 200
    plan = whit.compress(
        case_of("gpt2").model, Budgeted(), tmp_path / "plan", options=case_of("gpt2").options, dry_run=True
    )
    assert isinstance(plan, whit.Plan)
    assert [note for note in plan.notes if "budget" in note and "among the blocks" in note]


def test_pruning_by_outliers_keeps_the_budget(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    case = case_of("llama")
    method = PruneThenQuantise(Wanda(pattern="4:8", allocation="owl", owl_multiple=2.0, owl_span=0.3), RTN(bits=4))
    result = compress(case, method, tmp_path / "out")
    kept: dict[str, int] = {}
    model = whit.load(tmp_path / "out")
    for layer in result.layers:
        if layer.block:
            n, m = map(int, layer.method["pruner"]["pattern"].split(":"))
            assert m == 8
            weight = model.get_submodule(layer.name).weight
            assert isinstance(weight, torch.Tensor)
            assert int(torch.count_nonzero(weight)) <= layer.parameters * n // m
            kept[layer.block] = kept.get(layer.block, 0) + layer.parameters * n // m
    assert len(set(kept.values())) > 1
    assert sum(kept.values()) <= sum(layer.parameters for layer in result.layers if layer.block) // 2
    (entry,) = result.run["allocation"]
    assert entry["method"] == method.to_json()


def test_pruner_zero_ranks_by_the_gradients_of_the_dense_model(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    case = case_of("llama")
    result = compress(case, PrunerZero(sparsity=0.5), tmp_path / "out")
    original = load_dense(resolve_model(case.model), torch.float32, "cpu")
    assert case.options.calibration is not None
    ids = load_file(case.options.calibration)["input_ids"]
    names = [layer.name for layer in result.layers if layer.block]
    sums = {name: torch.zeros_like(original.get_parameter(f"{name}.weight")) for name in names}
    for row in ids:
        original.zero_grad()
        original(input_ids=row[None], labels=row[None]).loss.backward()
        for name, total in sums.items():
            gradient = original.get_parameter(f"{name}.weight").grad
            assert gradient is not None
            total += gradient.square()
    model = whit.load(tmp_path / "out")
    agree = total_weights = 0
    for name in names:
        weight = original.get_parameter(f"{name}.weight").detach()
        gradient = sums[name].sqrt()
        score = weight.square() * (gradient - gradient.min()) / (gradient.max() - gradient.min())
        expected = torch.ones_like(score, dtype=torch.bool)
        expected.scatter_(1, score.argsort(dim=1, stable=True)[:, : score.shape[1] // 2], False)
        saved = model.get_submodule(name).weight
        assert isinstance(saved, torch.Tensor)
        agree += int(((saved != 0) == expected).sum())
        total_weights += expected.numel()
    assert agree / total_weights > 0.9995  # ties of rounding aside


@pytest.mark.parametrize("family", ["whisper", "albert"])
def test_blocks_of_all_stacks_share_one_budget(family: str, case_of: Callable[[str], Case], tmp_path: Path) -> None:
    result = compress(
        case_of(family), Budgeted(by="gradients") if family == "whisper" else Budgeted(), tmp_path / "out"
    )
    (entry,) = result.run["allocation"]
    assert set(entry["blocks"]) == set(bits_by_block(result))
    assert len(entry["blocks"]) == (4 if family == "whisper" else 1)


def test_gradients_come_before_a_survey_that_asks_for_them(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    listener = Recorder()
    result = compress(case_of("llama"), Budgeted(by="gradients"), tmp_path / "out", listener)
    names = [name for name, _ in listener.phases]
    assert names.index("gradients") < names.index("survey") < names.index("embeddings")
    scores = [item["score"] for item in result.run["allocation"][0]["blocks"].values()]
    other = compress(case_of("llama"), Budgeted(), tmp_path / "inputs").run["allocation"][0]["blocks"]
    assert all(score > 0 for score in scores)
    assert scores != [item["score"] for item in other.values()]


def test_each_step_of_a_recipe_divides_its_own_budget(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    recipe = Recipe(
        (
            Step(Budgeted(4), ("*self_attn*",)),
            Step(Sensitive(6), ("*.down_proj",)),
            Step(Budgeted(6), ("*.gate_proj", "*.up_proj"), ("@first",)),
        )
    )
    result = compress(case_of("llama"), recipe, tmp_path / "out")
    first, second = result.run["allocation"]
    assert (first["method"]["bits"], second["method"]["bits"]) == (4, 6)
    assert len(first["blocks"]) == 3
    assert list(second["blocks"]) == ["model.layers.1", "model.layers.2"]
    found = {layer.name: layer.format["bits"] for layer in result.layers if layer.block}
    assert {bits for name, bits in found.items() if "self_attn" in name} == {3, 4, 5}
    assert {bits for name, bits in found.items() if "up_proj" in name} == {5, 7}
    assert {bits for name, bits in found.items() if "down_proj" in name} == {6}


def test_a_method_that_treats_blocks_alike_is_not_surveyed(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    listener = Recorder()
    result = compress(case_of("llama"), Budgeted(by="nothing"), tmp_path / "out", listener)
    assert "allocation" not in result.run
    assert "survey" not in [name for name, _ in listener.phases]
    assert bits_by_block(result) == {f"model.layers.{index}": {4} for index in range(3)}


def test_a_survey_without_a_number_is_refused(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"method 'budgeted' found nan for block 'model.layers.0'.*another rule"):
        compress(case_of("llama"), Hopeless(), tmp_path / "out")


class Interrupter(Recorder):
    """Raises KeyboardInterrupt at step number `last` of a phase."""

    def __init__(self, phase: str, last: int) -> None:
        super().__init__()
        self._phase = phase
        self._left = last

    def step(self, description: str) -> None:
        super().step(description)
        if self.phases[-1][0] == self._phase:
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt


def interrupt(case: Case, what: What, output: Path, phase: str, step: int) -> list[str]:
    listener = Interrupter(phase, step)
    with pytest.raises(KeyboardInterrupt):
        compress(case, what, output, listener)
    return listener.steps


def uninterrupted(case: Case, what: What, output: Path) -> Finished:
    recorder = Recorder()
    result = compress(case, what, output, recorder)
    return Finished(case, output, recorder.plans[0], result)


BOTH = Recipe((Step(Sensitive(4), exclude=("*attn*",)), Step(Budgeted(4, "gradients"), ("*attn*",))))


@pytest.fixture(scope="module", params=["llama", "whisper"])
def whole(
    request: pytest.FixtureRequest, case_of: Callable[[str], Case], tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    return uninterrupted(case_of(request.param), BOTH, tmp_path_factory.mktemp("whole") / "out")


@pytest.mark.parametrize(
    ("phase", "step"), [("gradients", 1), ("gradients", 4), ("gradients", 5), ("survey", 1), ("survey", 2)]
)
def test_an_interrupted_pass_continues_to_the_same_bytes(
    phase: str, step: int, whole: Finished, tmp_path: Path
) -> None:
    interrupt(whole.case, BOTH, tmp_path / "out", phase, step)
    listener = Recorder()
    result = compress(whole.case, BOTH, tmp_path / "out", listener)
    assert_same_files(tmp_path / "out", whole)
    assert result.run["allocation"] == whole.result.run["allocation"]
    if phase == "survey":
        assert "gradients" not in [name for name, _ in listener.phases]


def test_finished_blocks_of_the_backward_pass_are_not_run_again(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    case = case_of("llama")
    steps = interrupt(case, Sensitive(), tmp_path / "out", "gradients", 5)
    assert steps[3:] == ["backward model.layers.2", "backward model.layers.1"]
    listener = Recorder()
    compress(case, Sensitive(), tmp_path / "out", listener)
    assert [step for step in listener.steps if "ward" in step] == ["forward model.layers.0", "backward model.layers.0"]
    assert listener.phases[0] == ("gradients", 2)


def test_interrupted_between_chunks(
    case_of: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many sequences fit into memory before and after, the bytes are the same."""
    case = case_of("gpt2")
    whole = uninterrupted(case, Sensitive(), tmp_path / "whole")
    monkeypatch.setattr(gradients, "available_bytes", lambda _: 90_000)
    steps = interrupt(case, Sensitive(), tmp_path / "out", "gradients", 7)
    assert steps.count("backward transformer.h.0") == 1
    assert steps[-1] == "backward transformer.h.1"
    monkeypatch.undo()
    listener = Recorder()
    compress(case, Sensitive(), tmp_path / "out", listener)
    assert_same_files(tmp_path / "out", whole)
    backward = [step for step in listener.steps if step.startswith("backward")]
    assert backward == ["backward transformer.h.0", "backward transformer.h.1", "backward transformer.h.0"]


def test_a_whole_model_pass_continues_after_its_last_snapshot(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    case = case_of("whisper")
    interrupt(case, Sensitive(), tmp_path / "out", "gradients", 4)
    listener = Recorder()
    compress(case, Sensitive(), tmp_path / "out", listener)
    assert [step for step in listener.steps if step.startswith("sequence")] == [
        f"sequence {number}/6" for number in (4, 5, 6)
    ]


def test_a_surveyed_block_is_not_surveyed_again(
    case_of: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("llama")
    interrupt(case, Budgeted(), tmp_path / "out", "survey", 2)
    seen: list[int] = []
    original = Budgeted.survey

    def survey(self: Budgeted, weights: Any, statistics: Any) -> float:
        seen.append(len(weights))
        return original(self, weights, statistics)

    monkeypatch.setattr(Budgeted, "survey", survey)
    compress(case, Budgeted(), tmp_path / "out")
    assert seen == [7]


@pytest.mark.parametrize("hurt", ["shard", "line", "torn"])
def test_damage_to_a_pass_costs_only_time(hurt: str, case_of: Callable[[str], Case], tmp_path: Path) -> None:
    case = case_of("llama")
    whole = uninterrupted(case, Budgeted(by="gradients"), tmp_path / "whole")
    interrupt(case, Budgeted(by="gradients"), tmp_path / "out", "gradients", 5)
    folder = tmp_path / "out" / WORK_FOLDER
    if hurt == "shard":
        shard = sorted(folder.glob("gradients-*.safetensors"))[0]
        shard.write_bytes(shard.read_bytes()[:-4] + b"oops")
    elif hurt == "line":
        (folder / "gradients.jsonl").write_text('{"start": 0}\n')
    else:
        content = (folder / "gradients.jsonl").read_bytes()
        (folder / "gradients.jsonl").write_bytes(content[:-9])
    listener = Recorder()
    compress(case, Budgeted(by="gradients"), tmp_path / "out", listener)
    assert_same_files(tmp_path / "out", whole)
    assert any("gradients are computed again" in note for note in listener.notes)


def test_the_working_folder_holds_each_blocks_sums_once(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    case = case_of("llama")
    listener = Interrupter("calibration", 1)
    with pytest.raises(KeyboardInterrupt):
        compress(case, Sensitive(), tmp_path / "out", listener)
    folder = tmp_path / "out" / WORK_FOLDER
    stored = list(folder.glob("gradients-*.safetensors"))
    assert len(stored) == 3
    store = GradientStore(folder)
    assert store.complete(6)
    assert not store.complete(7)
    assert {name.split(".")[-1] for name in store.gradients("model.layers.1")} == {
        *(f"{part}_proj" for part in "qkvo"), "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert store.gradients("model.layers.9") == {}


def test_later_stops_of_the_run_make_no_pass_again(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    case = case_of("llama")
    whole = uninterrupted(case, BOTH, tmp_path / "whole")

    class Stop(Recorder):
        def block(self, index: int, total: int, name: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(case, BOTH, tmp_path / "out", Stop())
    listener = Recorder()
    compress(case, BOTH, tmp_path / "out", listener)
    assert not {"gradients", "survey"} & {name for name, _ in listener.phases}
    assert_same_files(tmp_path / "out", whole)


def test_a_step_that_was_being_written_is_taken_up(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    case = case_of("llama")
    whole = uninterrupted(case, Sensitive(), tmp_path / "whole")
    interrupt(case, Sensitive(), tmp_path / "out", "gradients", 4)
    folder = tmp_path / "out" / WORK_FOLDER
    with (folder / "gradients.jsonl").open("ab") as file:
        file.write(b'{"start": 0, "end": 6, "blo')
    (folder / "gradients-00009.safetensors").write_bytes(b"half")
    listener = Recorder()
    compress(case, Sensitive(), tmp_path / "out", listener)
    assert listener.notes == []
    assert [step for step in listener.steps if step.startswith("backward")] == [
        "backward model.layers.1",
        "backward model.layers.0",
    ]
    assert_same_files(tmp_path / "out", whole)
