"""Which numbers a model gets, and that they are right where they are known in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from whit.data.inputs import ModelInputs
from whit.errors import ModelError
from whit.evaluation.measure import evaluate_model
from whit.evaluation.outputs import is_causal
from whit.report.record import EvaluationRecord, MetricRecord

FIELDS = {"dtype": "float32"}
PROTOCOL = {
    "tokenizer": "0a1b2c3d", "corpus": "text@01234567", "window": 6, "stride": 6, "bos": "none", "tokens": 0
}  # fmt: skip


class Bigram(nn.Module):
    """log p(next | current) is a table: the smallest causal language model."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.dropout(self.table[input_ids])}


def data_of(batches: list[dict[str, Tensor]]) -> ModelInputs:
    provenance = {"name": "text", "protocol": dict(PROTOCOL)}
    return ModelInputs(batches, sum(batch[next(iter(batch))].numel() for batch in batches), provenance, False)


def windows(count: int, length: int = 6, vocabulary: int = 5) -> ModelInputs:
    ids = torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(7))
    return data_of([{"input_ids": row[None]} for row in ids])


def rows_of(inputs: dict[str, Tensor]) -> ModelInputs:
    count = next(iter(inputs.values())).shape[0]
    return data_of([{name: item[row : row + 1] for name, item in inputs.items()} for row in range(count)])


def measure(model: nn.Module, data: ModelInputs, original: nn.Module | None = None) -> Any:
    return evaluate_model(model, data, original=original, device="cpu", protocol_fields=FIELDS)


def metric(record: EvaluationRecord | None, name: str) -> MetricRecord:
    assert record is not None
    found = record.metric(name)
    assert found is not None, [item.name for item in record.metrics]
    return found


def perturbed(family: str, seed: int = 3, size: float = 0.02) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    original = tiny.FAMILIES[family]()
    torch.manual_seed(0)
    changed = tiny.FAMILIES[family]()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return original, changed


def test_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    record, none = measure(Bigram(torch.zeros(5, 5)), windows(4))
    found = metric(record, "perplexity")
    assert none is None
    assert found.value == pytest.approx(5.0, rel=1e-6) == found.low == found.high


def test_perplexity_of_a_known_table() -> None:
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    data = windows(7)
    nll = [
        -float(table.double().log_softmax(-1)[before, after])
        for batch in data.batches
        for before, after in zip(batch["input_ids"][0, :-1], batch["input_ids"][0, 1:], strict=True)
    ]
    found = metric(measure(Bigram(table), data)[0], "perplexity")
    assert len(nll) == 7 * 5
    assert found.value == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-6)
    assert found.low < found.value < found.high


def test_nothing_crosses_a_window_border() -> None:
    # Tokens alternate inside a window and always repeat across the border: only a shift inside gives certainty.
    certain = torch.tensor([[-50.0, 50.0], [50.0, -50.0]])
    alternating = data_of([{"input_ids": torch.tensor([[0, 1, 0, 1]])}, {"input_ids": torch.tensor([[1, 0, 1, 0]])}])
    assert metric(measure(Bigram(certain), alternating)[0], "perplexity").value == pytest.approx(1.0)


def test_a_model_is_at_no_distance_from_itself() -> None:
    original, _ = perturbed("llama")
    data = windows(3, length=12, vocabulary=tiny.VOCABULARY)
    after, before = measure(original, data, original)
    assert metric(after, "kl_divergence").value == 0.0
    assert metric(after, "top1_agreement").value == 1.0
    assert metric(after, "perplexity") == metric(before, "perplexity")


def test_divergence_and_both_perplexities_come_from_one_pass() -> None:
    first, second = (torch.randn(5, 5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    data = windows(6)
    after, before = measure(Bigram(second), data, Bigram(first))
    alone = measure(Bigram(first), data)[0]
    assert metric(before, "perplexity") == metric(alone, "perplexity")
    p, q = first.double().softmax(-1), second.double().softmax(-1)
    rows = (p * (p / q).log()).sum(-1)
    expected = torch.cat([rows[batch["input_ids"][0, :-1]] for batch in data.batches]).mean()
    assert metric(after, "kl_divergence").value == pytest.approx(float(expected), rel=1e-5)


def test_protocol_id_holds_every_field_and_counts_the_scored_tokens() -> None:
    found = metric(measure(Bigram(torch.zeros(5, 5)), windows(4))[0], "perplexity")
    assert found.protocol == (
        "perplexity/1;tokenizer=0a1b2c3d;corpus=text@01234567;window=6;stride=6;bos=none;tokens=20;dtype=float32"
    )


def test_evaluation_is_deterministic_without_dropout_and_leaves_the_mode_alone() -> None:
    model = Bigram(torch.randn(5, 5, generator=torch.Generator().manual_seed(1))).train()
    first, second = (measure(model, windows(5))[0].metrics for _ in range(2))
    assert first == second
    assert model.training and model.dropout.training


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_causality_is_found_by_structure(family: str) -> None:
    torch.manual_seed(0)
    model = tiny.FAMILIES[family]().eval()
    batch = {name: item[:1] for name, item in tiny.inputs(family).items()}
    assert is_causal(model, batch, "cpu") == (family not in ("bert", "albert", "whisper"))


class RoundsByTheCall(torch.nn.Module):
    """Logits of each token alone, but rounded in steps of the largest value of the whole call."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(9, 9, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        values = self.table[input_ids]
        step = values.abs().max() / 8
        return (values / step).round() * step


def test_a_model_that_rounds_by_the_whole_call_is_causal_all_the_same() -> None:
    model = RoundsByTheCall()
    loudest = int(model.table.abs().amax(1).argmax())
    ids = torch.tensor([[(loudest + 1) % 9, (loudest + 2) % 9, loudest]])
    other = ids.clone()
    other[0, -1] = ids[0, 0]
    assert not torch.equal(model(ids)[0, :2], model(other)[0, :2])
    assert is_causal(model, {"input_ids": ids}, "cpu")


@pytest.mark.parametrize("family", ["gpt2", "opt", "neox", "gemma3"])
def test_causal_families_get_perplexity(family: str) -> None:
    original, changed = perturbed(family)
    after, before = measure(changed, rows_of(tiny.inputs(family)), original)
    assert {item.name for item in after.metrics} == {"perplexity", "kl_divergence", "top1_agreement"}
    assert [item.name for item in before.metrics] == ["perplexity"]
    assert metric(after, "kl_divergence").value > 0


def test_encoder_gets_output_error_and_similarity_of_pooled_states() -> None:
    original, changed = perturbed("bert")
    inputs = tiny.inputs("bert")
    after, before = measure(changed, rows_of(inputs), original)
    with torch.no_grad():
        f, g = (model.eval()(**inputs).last_hidden_state.double() for model in (original, changed))
    assert metric(after, "output_error").value == pytest.approx(float((f - g).square().sum() / f.square().sum()))
    cosine = torch.cosine_similarity(f.mean(1), g.mean(1)).mean()
    assert metric(after, "cosine_similarity").value == pytest.approx(float(cosine))
    assert metric(after, "cosine_similarity").better == "higher"
    assert before.metrics == []


def test_padding_is_left_out_of_pooled_states() -> None:
    original, changed = perturbed("bert")
    inputs = tiny.inputs("bert", sequences=2)
    mask = torch.ones_like(inputs["input_ids"])
    mask[:, 10:] = 0
    after, _ = measure(changed, rows_of(inputs | {"attention_mask": mask}), original)
    with torch.no_grad():
        f, g = (model.eval()(**inputs, attention_mask=mask).last_hidden_state for model in (original, changed))
    cosine = torch.cosine_similarity(f[:, :10].double().mean(1), g[:, :10].double().mean(1)).mean()
    assert metric(after, "cosine_similarity").value == pytest.approx(float(cosine))


def test_masked_language_model_gets_agreement_and_no_perplexity() -> None:
    original, changed = perturbed("albert")
    after, _ = measure(changed, rows_of(tiny.inputs("albert")), original)
    assert {item.name for item in after.metrics} == {"output_error", "kl_divergence", "top1_agreement"}


@pytest.mark.parametrize("given", [True, False])
def test_encoder_decoder_gets_the_perplexity_of_its_labels(given: bool) -> None:
    original, changed = perturbed("whisper")
    inputs = tiny.inputs("whisper")
    inputs["labels"][:, -5:] = -100
    if not given:
        del inputs["decoder_input_ids"]
    after, before = measure(changed, rows_of(inputs), original)
    with torch.no_grad():
        f, g = (model.eval()(**inputs).logits.double() for model in (original, changed))
    expected = nn.functional.cross_entropy(f.flatten(0, 1), inputs["labels"].flatten()).exp()
    scored = inputs["labels"] != -100
    error = float((f - g)[scored].square().sum() / f[scored].square().sum())
    assert metric(before, "perplexity").value == pytest.approx(float(expected), rel=1e-5)
    assert "tokens=114" in metric(before, "perplexity").protocol
    assert metric(after, "output_error").value == pytest.approx(error, rel=1e-5)


def test_image_model_that_answers_with_a_plain_tensor() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))

    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, pixel_values: Tensor) -> Tensor:
            out: Tensor = self.inner(pixel_values)
            return out

    data = data_of([{"pixel_values": torch.randn(1, 3, 2, 2)} for _ in range(3)])
    after, _ = measure(Images(), data, Images())
    assert [(item.name, item.value) for item in after.metrics] == [("output_error", 0.0)]


def test_not_a_number_is_an_error_with_a_remedy() -> None:
    table = torch.zeros(5, 5)
    table[2, 2] = float("nan")
    with pytest.raises(ModelError, match="logits of Bigram hold NaN or Inf: try --dtype float32"):
        measure(Bigram(table), windows(4))


def test_masked_vocabulary_entries_are_no_error() -> None:
    table = torch.zeros(5, 6)
    table[:, 5] = float("-inf")
    after, _ = measure(Bigram(table), windows(4), Bigram(table.clone()))
    assert metric(after, "perplexity").value == pytest.approx(5.0, rel=1e-6)
    assert metric(after, "kl_divergence").value == 0.0


def test_inputs_of_another_kind_are_named() -> None:
    with pytest.raises(ModelError, match="Bigram does not take the inputs pixel_values"):
        measure(Bigram(torch.zeros(5, 5)), data_of([{"pixel_values": torch.zeros(1, 3)}]))


def test_perplexity_beyond_the_range_of_a_float_is_infinite() -> None:
    hopeless = torch.full((5, 5), -1e4)
    hopeless[:, 4] = 0
    ids = torch.tensor([[0, 1, 2, 3]])
    assert metric(measure(Bigram(hopeless), data_of([{"input_ids": ids}]))[0], "perplexity").value == math.inf
