"""Modules in memory: what is replaced, what is measured, and that the user's own module is left as it was."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import whit
from tests.module.nets import WIDTH, Convolutions, Odd, Residual, images, seeded, vectors
from whit.errors import DataError, KnobError, ModelError
from whit.formats.grouped_integer import GroupedInteger
from whit.methods import Statistic, available_methods
from whit.methods.rtn import RTN
from whit.models.layers import layer_kind
from whit.models.packed import PackedConv2d, PackedEmbedding, PackedLinear, PackedModule, TiedPackedLinear
from whit.pipeline.block import UNREACHED
from whit.pipeline.recipe import Recipe, Step


def cross_entropy(output: Tensor, item: Any) -> Tensor:
    return nn.functional.cross_entropy(output, item[1])


def labelled(inputs: list[Tensor]) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [[item, torch.randint(0, 5, (len(item),), generator=generator)] for item in inputs]


def output_error(original: nn.Module, compressed: nn.Module, inputs: list[Tensor]) -> float:
    with torch.no_grad():
        original.eval(), compressed.eval()
        return float(sum((original(item) - compressed(item)).square().sum() for item in inputs))


@pytest.mark.parametrize("name", sorted(available_methods()))
def test_every_method_runs_on_a_module_of_linear_layers(name: str) -> None:
    module = seeded(Residual)
    before = copy.deepcopy(module.state_dict())
    result = whit.compress(module, name, calibration=labelled(vectors()), loss=cross_entropy)
    assert result.layers and all(
        isinstance(result.module.get_submodule(item.name), PackedModule) for item in result.layers
    )
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert result.stored_bytes < result.original_bytes
    answer = result.module(vectors(1, seed=3)[0])
    assert answer.shape == (32, 5) and bool(torch.isfinite(answer).all())
    assert str(len(result.layers)) in str(result).splitlines()[-1]


@pytest.mark.parametrize("name", sorted(available_methods()))
def test_every_method_runs_on_convolutions(name: str) -> None:
    skip = ("body.0",) if name == "stbllm" else ()  # its 27 columns make no groups of 8
    result = whit.compress(seeded(Convolutions), name, calibration=labelled(images()), loss=cross_entropy, skip=skip)
    assert any(isinstance(part, PackedConv2d) for part in result.module.modules())
    answer = result.module(images(1, seed=3)[0])
    assert answer.shape == (4, 5) and bool(torch.isfinite(answer).all())


def test_stored_bytes_are_those_of_the_tensors() -> None:
    module = seeded(Residual)
    result = whit.compress(module, "rtn", bits=4, group_size=0)
    held = {id(value): value.nbytes for value in result.module.state_dict(keep_vars=True).values()}
    assert result.stored_bytes == sum(held.values())
    assert result.original_bytes == sum(value.nbytes for value in module.state_dict().values())
    assert result.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert result.compressed_bits == pytest.approx(
        sum(layer.stored_bytes for layer in result.layers) * 8 / sum(layer.parameters for layer in result.layers)
    )
    assert [layer.name for layer in result.layers] == ["up", "gate", "down", "head"]
    assert result.untouched["up.bias"] == "a bias, not a matrix"


@pytest.mark.parametrize(("make", "inputs"), [(Residual, vectors), (Convolutions, images)])
def test_feedback_beats_rounding_at_equal_bytes(make: type[nn.Module], inputs: Any) -> None:
    module = seeded(make).eval()
    options = {"bits": 3, "group_size": 0}
    rounded = whit.compress(module, "rtn", **options)
    fed_back = whit.compress(module, "gptq", calibration=inputs(), **options)
    assert fed_back.stored_bytes == rounded.stored_bytes
    held_out = inputs(2, seed=9)
    assert output_error(module, fed_back.module, held_out) < 0.8 * output_error(module, rounded.module, held_out)


def test_layers_are_measured_in_the_original_or_after_those_before_them_are_compressed() -> None:
    module, inputs = seeded(Residual), vectors()
    method = whit.make_method("gptq", {"bits": 2, "group_size": 0})
    after = whit.compress(module, method, calibration=inputs, true_sequential=True)
    at_once = whit.compress(module, method, calibration=inputs)
    first, second = ({layer.name: layer.error for layer in result.layers} for result in (after, at_once))
    assert first["up"] == second["up"] and first["gate"] == second["gate"]  # nothing before them
    assert first["down"] != second["down"] and first["head"] != second["head"]
    with torch.no_grad():
        hidden = [torch.relu(module.up(item)) * module.gate(item) for item in inputs]
    alone = whit.compress(nn.Sequential(module.down), method, calibration=hidden).layers[0]
    assert second["down"] == alone.error
    with torch.no_grad():
        hidden = [torch.relu(after.module.up(item)) * after.module.gate(item) for item in inputs]
    alone = whit.compress(nn.Sequential(module.down), method, calibration=hidden).layers[0]
    assert first["down"] == pytest.approx(alone.error, rel=1e-4)


def test_layers_called_twice_never_or_in_two_places_and_layers_with_one_weight() -> None:
    module = seeded(Odd)
    result = whit.compress(module, "gptq", calibration=vectors(), bits=4, group_size=0)
    notes = {layer.name: layer.notes for layer in result.layers}
    assert set(notes) == {"twice", "never", "here", "first"}
    assert UNREACHED in notes["never"] and UNREACHED not in notes["twice"]
    packed = result.module
    assert packed.here is packed.there and isinstance(packed.there, PackedLinear)
    assert isinstance(packed.second, TiedPackedLinear) and packed.second.source is packed.first
    assert torch.equal(packed.second.bias, module.second.bias)
    assert output_error(module, packed, vectors(1)) < 0.05 * float(module(vectors(1)[0]).detach().square().sum())


def test_statistics_of_a_layer_called_twice_are_those_of_both_calls() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)
            self.other = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.layer(2 * x) + self.other(x)

    class One(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.cat([x, 2 * x], 0))

    module, inputs = seeded(Two), vectors(1)
    options: dict[str, Any] = {"calibration": inputs, "bits": 2, "group_size": 0}
    twice = whit.compress(module, "gptq", **options)
    once = whit.compress(One(module.layer), "gptq", **options)
    alone = whit.compress(nn.Sequential(module.other), "gptq", **options)
    assert {layer.name: layer.error for layer in twice.layers}["layer"] == pytest.approx(once.layers[0].error, rel=1e-5)
    assert twice.layers[1].error == alone.layers[0].error


def test_an_input_changed_in_place_is_another_input() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Linear(WIDTH, WIDTH)
            self.after = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = x + 0
            out = self.before(x)
            return out + self.after(x.relu_())

    module, inputs = seeded(InPlace), vectors(1)
    options: dict[str, Any] = {"bits": 2, "group_size": 0}
    result = whit.compress(module, "gptq", calibration=inputs, **options)
    alone = whit.compress(nn.Sequential(module.after), "gptq", calibration=[inputs[0].relu()], **options)
    assert result.layers[1].error == alone.layers[0].error


def test_convolutions_that_see_one_image_through_different_windows_have_statistics_of_their_own() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Conv2d(3, 8, 3, padding=1)
            self.other = nn.Conv2d(3, 8, 3, padding=1)
            self.strided = nn.Conv2d(3, 8, 3, stride=2)
            self.pixel = nn.Conv2d(3, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(x) + self.other(x) + self.pixel(x) + self.strided(x).mean()

    module, inputs = seeded(Block), images()
    options: dict[str, Any] = {"calibration": inputs, "bits": 3, "group_size": 0}
    for record in whit.compress(module, "gptq", **options).layers:
        alone = whit.compress(nn.Sequential(module.get_submodule(record.name)), "gptq", **options).layers[0]
        assert record.error == alone.error


@dataclass(frozen=True)
class Coarse(GroupedInteger):
    """Rounds its inputs to halves before the product."""

    name: ClassVar[str] = "coarse-in-memory-for-tests"
    changes_inputs: ClassVar[bool] = True

    def linear(self, inputs: Tensor, tensors: Any, rows: int, columns: int, bias: Tensor | None = None) -> Tensor:
        return super().linear((2 * inputs).round() / 2, tensors, rows, columns, bias)


@dataclass(frozen=True)
class CoarseRounding(RTN):
    name: ClassVar[str] = "coarse-rounding-for-tests"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.SAMPLE})

    def format(self, rows: int, columns: int) -> Coarse:
        return Coarse(self.bits, self.group_size, self.symmetric)


@pytest.mark.parametrize("true_sequential", [False, True])
def test_layers_that_round_their_inputs_run_packed_while_later_ones_are_measured(true_sequential: bool) -> None:
    module, inputs = seeded(Odd), vectors()
    result = whit.compress(module, CoarseRounding(8, 0), calibration=inputs, true_sequential=true_sequential)
    packed = result.module
    assert packed.here is packed.there and isinstance(packed.here.format, Coarse)
    upstream = packed if true_sequential else module
    with torch.no_grad():
        hidden = [torch.tanh(upstream.twice(torch.tanh(upstream.twice(item)))) for item in inputs]
        hidden = [torch.tanh(upstream.there(torch.tanh(upstream.here(item)))) for item in hidden]
        sample = torch.cat(hidden)
        exact = sample @ module.first.weight.T
        found = packed.first(sample) - packed.first.bias
    error = {layer.name: layer.error for layer in result.layers}["first"]
    assert error == pytest.approx(float((found - exact).square().sum() / exact.square().sum()), rel=1e-3)


def test_the_encoder_of_torch_calls_its_packed_layers() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = nn.TransformerEncoder(layer, 2).eval()
    inputs = [item.view(4, 8, WIDTH) for item in vectors()]
    result = whit.compress(encoder, "gptq", calibration=inputs, bits=4, group_size=0)
    assert {item.name for item in result.layers} == {f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}
    assert all(UNREACHED not in item.notes for item in result.layers)
    calls: list[str] = []
    result.module.layers[0].linear1.register_forward_hook(lambda *_: calls.append("linear1"))
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[1, 5:] = True
    with torch.no_grad():
        plain = result.module(inputs[0])
        nested = result.module(inputs[0], src_key_padding_mask=mask)
    assert calls == ["linear1", "linear1"]
    torch.testing.assert_close(plain, result.module(inputs[0]), rtol=0, atol=1e-5)  # with gradients: never fused
    slow = result.module(inputs[0], src_key_padding_mask=mask)
    torch.testing.assert_close(nested[~mask], slow[~mask], rtol=0, atol=1e-5)
    result.module.half()  # would crash if the fused layer read the float32 weight
    with torch.no_grad():
        assert result.module(inputs[0].half()).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_stay(dtype: torch.dtype) -> None:
    module = seeded(Residual).to(dtype)
    result = whit.compress(module, "gptq", calibration=[item.to(dtype) for item in vectors()], bits=8, group_size=0)
    assert {value.dtype for value in result.module.parameters()} == {dtype}
    out, exact = result.module(vectors(1)[0].to(dtype)), module(vectors(1)[0].to(dtype))
    assert out.dtype == dtype
    assert float((out - exact).detach().float().square().sum() / exact.detach().float().square().sum()) < 1e-3


@pytest.mark.parametrize("training", [True, False])
def test_mode_buffers_hooks_generator_and_threads_of_state_are_left_as_they_were(training: bool) -> None:
    module = seeded(Convolutions).train(training)
    module.body[1].eval()
    calls: list[str] = []
    handle = module.head.register_forward_hook(lambda *_: calls.append("head"))
    state, fused = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    before = copy.deepcopy(module.state_dict())
    result = whit.compress(module, "gptq", calibration=images(), bits=4, group_size=0)
    assert torch.equal(torch.get_rng_state(), state) and torch.backends.mha.get_fastpath_enabled() is fused
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    for part in (module, result.module):
        assert part.training is training and part.head.training is training and not part.body[1].training
        assert not part.body[0]._forward_hooks
    assert torch.equal(result.module.body[1].running_mean, before["body.1.running_mean"])
    calls.clear()
    module.eval()(images(1)[0])
    result.module.eval()(images(1)[0])
    assert calls == ["head", "head"]
    handle.remove()
    module(images(1)[0])
    assert calls == ["head", "head"]


def test_in_place_changes_the_module_itself_and_its_hooks_can_be_removed() -> None:
    module = seeded(Residual)
    copied = whit.compress(module, "gptq", calibration=vectors(), bits=4, group_size=0)
    calls: list[str] = []
    handle = module.up.register_forward_pre_hook(lambda *_: calls.append("up"))
    result = whit.compress(module, "gptq", calibration=vectors(), bits=4, group_size=0, in_place=True)
    assert result.module is module and isinstance(module.up, PackedLinear)
    calls.clear()
    assert torch.equal(module(vectors(1)[0]), copied.module(vectors(1)[0]))
    assert calls == ["up"]
    handle.remove()
    module(vectors(1)[0])
    assert calls == ["up"]


def test_the_same_call_gives_the_same_bytes() -> None:
    module = seeded(Convolutions)
    module.body[2] = nn.Dropout()  # in evaluation mode: no noise
    first, second = (whit.compress(module, "gptq", calibration=images()).module.state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_noise_in_the_forward_is_the_same_in_every_pass() -> None:
    class Noisy(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.randn_like(x))

    module = Noisy(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    torch.manual_seed(1)
    first = whit.compress(module, "gptq", calibration=vectors())
    torch.manual_seed(2)
    second = whit.compress(module, "gptq", calibration=vectors())
    assert [layer.error for layer in first.layers] == [layer.error for layer in second.layers]


def test_embeddings_wait_for_a_recipe_that_names_them_and_tied_heads_share() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, WIDTH)
            self.mix = nn.Linear(WIDTH, WIDTH)
            self.out = nn.Linear(WIDTH, 50, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(torch.tanh(self.mix(self.embed(ids))))

    module, ids = seeded(Words), [torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0))]
    plain = whit.compress(module, "gptq", calibration=ids)
    assert [layer.name for layer in plain.layers] == ["mix"]
    assert plain.untouched["embed"] == "an embedding that no step names"
    assert plain.untouched["out"] == "shares its weight with 'embed', which is left alone"
    gptq, rtn = whit.make_method("gptq"), whit.make_method("rtn", {"bits": 8})
    both = whit.compress(module, Recipe((Step(gptq), Step(rtn, ("@embedding",)))), calibration=ids)
    assert {layer.name: layer.method["method"] for layer in both.layers} == {"embed": "rtn", "mix": "gptq"}
    assert isinstance(both.module.embed, PackedEmbedding) and isinstance(both.module.out, TiedPackedLinear)
    assert both.stored_bytes < plain.stored_bytes
    assert output_error(plain.module, both.module, ids) < 1e-3 * float(plain.module(ids[0]).detach().square().sum())
    with pytest.raises(KnobError, match="'embed' is an embedding, which has none"):
        whit.compress(module, Recipe((Step(gptq, ("embed",)),)), calibration=ids)
    skipped = whit.compress(module, Recipe((Step(gptq), Step(rtn, ("@embedding",)))), calibration=ids, skip=["out"])
    assert skipped.untouched["embed"] == "shares its weight with 'out', which is skipped"


def test_a_recipe_names_layers_and_ends_of_stacks() -> None:
    module = nn.ModuleDict(
        {"body": nn.Sequential(*(seeded(Residual, seed) for seed in range(3))), "end": nn.Linear(5, 5)}
    )
    module.body[0].head = module.body[1].head = nn.Linear(WIDTH, WIDTH)
    rtn = {bits: whit.make_method("rtn", {"bits": bits, "group_size": 0}) for bits in (2, 4, 8)}
    recipe = Recipe(
        (Step(rtn[4], exclude=("@first", "*.down")), Step(rtn[8], ("@first",), ("*.down",)), Step(rtn[2], ("*.down",)))
    )
    result = whit.compress(module, recipe)
    bits = {layer.name: layer.method["bits"] for layer in result.layers}
    assert bits["body.0.up"] == 8 and bits["body.1.up"] == bits["body.2.up"] == bits["end"] == 4
    assert {bits[f"body.{index}.down"] for index in range(3)} == {2}
    assert {layer.name: layer.block for layer in result.layers}["body.2.gate"] == "body.2"


def test_pruning_then_rounding_and_budgets_by_outliers() -> None:
    wanda = whit.make_method("wanda", {"pattern": "2:4"})
    gptq = whit.make_method("gptq", {"bits": 4, "group_size": 0})
    module = seeded(Residual)
    result = whit.compress(module, Recipe((Step(wanda), Step(gptq))), calibration=vectors())
    for record in result.layers:
        weight = result.module.get_submodule(record.name).weight
        assert bool(((weight.view(len(weight), -1, 4) != 0).sum(-1) <= 2).all())
    owl = whit.compress(module, "wanda", calibration=vectors(), sparsity=0.6, allocation="owl", owl_multiple=2.0)
    kept = {record.name: record.method["sparsity"] for record in owl.layers}
    assert len(set(kept.values())) > 1
    weights = {record.name: record.parameters for record in owl.layers}
    assert sum(kept[name] * weights[name] for name in kept) / sum(weights.values()) == pytest.approx(0.6, abs=0.01)


def test_a_transformers_model_in_memory_is_saved_and_loaded_by_transformers(tmp_path: Any) -> None:
    from tests import tiny

    model = tiny.llama(tied=True).eval()
    batches = [{"input_ids": tiny.inputs("llama")["input_ids"]}]
    result = whit.compress(model, "gptq", calibration=batches)
    assert len(result.layers) == 3 * 7 and "lm_head" not in {layer.name for layer in result.layers}
    result.module.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batches[0]).logits, result.module(**batches[0]).logits)


def test_what_computes_its_weight_or_takes_no_less_room_is_left_alone_with_a_reason() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(2, 2), nn.Conv2d(4, 4, 1, groups=2))
    nn.utils.parametrize.register_parametrization(module[1], "weight", nn.Identity())
    result = whit.compress(module, "rtn", bits=8)
    assert [layer.name for layer in result.layers] == ["0"]
    assert result.untouched["2"] == "would not become smaller"
    assert "in 2 groups" in result.untouched["3"]
    assert any(name.startswith("1.") for name in result.untouched)
    pruned = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    prune.l1_unstructured(pruned[1], "weight", 0.5)
    assert whit.compress(pruned, "rtn", in_place=True).untouched["1"] == "its weight is computed from other parameters"


def gptq(item: Any) -> dict[str, Any]:
    return {"method": "gptq", "calibration": item}


def rtn(**arguments: Any) -> dict[str, Any]:
    return {"method": "rtn", **arguments}


@pytest.mark.parametrize(
    ("module", "arguments", "error", "words"),
    [
        (Residual, {"method": "gptq"}, DataError, r"'gptq' needs inputs .* calibration=\[...\]"),
        (Residual, gptq([]), DataError, "holds no inputs: a generator"),
        (Residual, gptq(torch.ones(3, WIDTH)), DataError, "got a Tensor: put it into a list"),
        (Residual, gptq({"x": 1}), DataError, "got a dict: put it into a list"),
        (Residual, gptq([3]), DataError, "item is a int, which cannot be read"),
        (Residual, gptq([torch.full((2, WIDTH), torch.nan)]), DataError, "item 1 holds NaN"),
        (Residual, gptq([torch.full((2, WIDTH), torch.inf)]), ModelError, "NaN or Inf"),
        (Residual, gptq([torch.ones(2, 3)]), DataError, r"Residual cannot be run on .* item 1 .*forward="),
        (Residual, gptq([(torch.ones(2, WIDTH), 1)]), DataError, r"takes .* a tuple the positional"),
        (Residual, rtn(skip=["nope.*"]), KnobError, r"skip pattern 'nope.\*' matches no layer"),
        (Residual, rtn(skip=["*"]), ModelError, r"Residual has no layer to compress \(up: skipped by '\*'"),
        (Residual, rtn(output="x"), KnobError, "output is for a model by name"),
        (Residual, rtn(options=whit.RunOptions()), KnobError, "options is for a model by name"),
        (Residual, {"method": "rtm"}, KnobError, "did you mean 'rtn'"),
        (Residual, rtn(bit=3), KnobError, "has no knob 'bit'"),
        (lambda: nn.Linear(4, 4), rtn(), ModelError, r"single layer: wrap it as nn.Sequential\(layer\)"),
        (nn.ReLU, rtn(), ModelError, "holds no linear layer and no convolution"),
        (lambda: nn.Linear(4, 4, device="meta"), rtn(), ModelError, "'weight' is on the meta device"),
        (lambda: nn.LazyLinear(4), rtn(), ModelError, "'weight' has no shape yet: run the module once"),
    ],
)
def test_bad_input_is_refused_with_a_remedy(module: Any, arguments: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        whit.compress(module(), **arguments)


def test_weights_that_are_not_finite_and_modules_already_packed_are_refused() -> None:
    module = seeded(Residual)
    with torch.no_grad():
        module.down.weight[3, 4] = torch.nan
    with pytest.raises(ModelError, match=r"weight 'down.weight' has 1 of"):
        whit.compress(module, "rtn")
    packed = whit.compress(seeded(Residual), "rtn").module
    with pytest.raises(ModelError, match=r"packed layers already \('up'\): compress the original"):
        whit.compress(packed, "rtn")


def test_calibration_by_name_is_an_option() -> None:
    with pytest.raises(KnobError, match=r"options=whit.RunOptions\(calibration"):
        whit.compress("some/model", "rtn", calibration=[1])


def test_a_failed_copy_points_to_in_place() -> None:
    module = seeded(Residual)
    module.lock = (item for item in ())  # generators cannot be copied
    with pytest.raises(ModelError, match=r"cannot be copied .*in_place=True"):
        whit.compress(module, "rtn")
    assert whit.compress(module, "rtn", in_place=True).module is module


def test_every_replaced_layer_is_of_a_known_kind() -> None:
    module = seeded(Convolutions)
    result = whit.compress(module, "rtn", bits=4, group_size=0)
    for record in result.layers:
        kind = layer_kind(module.get_submodule(record.name))
        assert kind is not None and kind.shape(module.get_submodule(record.name)) == (record.rows, record.columns)
