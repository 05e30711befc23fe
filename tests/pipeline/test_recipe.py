"""Recipes: which layer gets which method, from a value or a file, and what a recipe must not say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import whit
from tests.pipeline.conftest import Case
from whit.cli import main
from whit.errors import KnobError
from whit.methods.gptq import GPTQ
from whit.methods.kmeans import KMeans
from whit.methods.rtn import RTN
from whit.pipeline.events import Plan
from whit.pipeline.recipe import Recipe, Step, as_recipe, read_recipe, recipe_from_json

MIXED = Recipe(
    (
        Step(GPTQ(bits=4, group_size=16), exclude=("@first", "*.down_proj")),
        Step(RTN(bits=8, group_size=16), ("@first",), ("*.down_proj",)),
        Step(KMeans(bits=2), ("*.down_proj",)),
        Step(RTN(bits=6, group_size=16), ("lm_head",)),
    )
)
TOML = """
[[step]]
method = "gptq"
bits = 4
group_size = 16
exclude = ["@first", "*.down_proj"]

[[step]]
method = "rtn"
bits = 8
group-size = 16
layers = "@first"
exclude = ["*.down_proj"]

[[step]]
method = "kmeans"
bits = 2
layers = ["*.down_proj"]

[[step]]
method = "rtn"
bits = 6
group_size = 16
layers = ["lm_head"]
"""


def plan_of(case: Case, recipe: Recipe, output: Path) -> Plan:
    plan = whit.compress(case.model, recipe, output, options=case.options, dry_run=True)
    assert isinstance(plan, Plan)
    return plan


def test_toml_json_and_python_say_the_same(tmp_path: Path) -> None:
    toml = tmp_path / "recipe.toml"
    toml.write_text(TOML)
    assert read_recipe(toml) == MIXED
    MIXED.save(tmp_path / "recipe.json")
    assert read_recipe(tmp_path / "recipe.json") == MIXED
    assert recipe_from_json(json.loads(json.dumps(MIXED.to_json()))) == MIXED
    assert MIXED.label == "gptq+rtn+kmeans"


def test_one_method_for_all_blocks_is_that_method() -> None:
    assert as_recipe("gptq", {"bits": 3}).to_json() == GPTQ(bits=3).to_json()
    assert as_recipe(GPTQ(), {}).plain == GPTQ()
    assert Recipe((Step(GPTQ(), ("@first",)),)).plain is None


def test_layers_get_what_the_recipe_says(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    case = case_of("llama")
    result = whit.compress(case.model, MIXED, tmp_path / "out", options=case.options)
    assert isinstance(result, whit.Result)
    for layer in result.layers:
        if layer.name == "lm_head":
            expected: whit.Method = RTN(bits=6, group_size=16)
        elif layer.name.endswith("down_proj"):
            expected = KMeans(bits=2)
        elif layer.block:
            expected = RTN(bits=8, group_size=16) if ".0." in layer.name else GPTQ(bits=4, group_size=16)
        else:
            continue
        assert layer.method == expected.to_json(), layer.name
    assert result.run["method"] == MIXED.to_json()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(9).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, whit.load(tmp_path / "out")(input_ids=ids).logits)
    # The recipe beside the result makes the same bytes again.
    again = read_recipe(tmp_path / "out" / "recipe.json")
    whit.compress(case.model, again, tmp_path / "again", options=case.options)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_layers_that_no_step_names_stay_as_they_are(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    plan = plan_of(case_of("llama"), Recipe((Step(GPTQ(), ("@last",)),)), tmp_path / "out")
    assert {layer.block for layer in plan.layers if layer.block} == {"model.layers.2"}
    assert plan.untouched["model.layers.0.mlp.up_proj"] == "named by no step of the recipe"


def test_a_tied_head_is_its_embedding(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    recipe = Recipe((Step(GPTQ()), Step(RTN(bits=5, group_size=16), ("@head",))))
    plan = plan_of(case_of("llama-tied"), recipe, tmp_path / "out")
    [packed] = [layer for layer in plan.layers if not layer.block]
    assert packed.name == "model.embed_tokens"
    assert "bits=5" in packed.format


def test_a_recipe_may_name_the_ends_alone(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    case = case_of("llama-tied")
    recipe = Recipe((Step(RTN(bits=4, group_size=16), ("@embedding",)),))
    plan = plan_of(case, recipe, tmp_path / "plan")
    assert [layer.name for layer in plan.layers] == ["model.embed_tokens"]
    assert plan.compressed_bits == plan.layers[0].stored_bytes * 8 / (plan.layers[0].rows * plan.layers[0].columns)
    result = whit.compress(case.model, recipe, tmp_path / "out", options=case.options)
    assert isinstance(result, whit.Result)
    assert [layer.name for layer in result.layers] == ["model.embed_tokens"]
    assert result.size.compressed_bits == plan.compressed_bits
    assert "named by no step" in result.untouched["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ((Step(GPTQ()), Step(RTN(), ("*.q_proj",))), "more than one step of the recipe (gptq and rtn)"),
        ((Step(GPTQ(), ("model.layers.7.*",)),), "'model.layers.7.*' names no layer"),
        ((Step(GPTQ(), exclude=("@blocks",)),), "takes all of them away"),
        ((Step(GPTQ()), Step(GPTQ(), ("lm_head",))), "needs calibration inputs, but 'lm_head'"),
    ],
)
def test_recipes_that_cannot_be_meant(
    case_of: Callable[[str], Case], tmp_path: Path, steps: tuple[Step, ...], words: str
) -> None:
    with pytest.raises(KnobError) as error:
        plan_of(case_of("llama"), Recipe(steps), tmp_path / "out")
    assert words in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no steps"),
        ("[[step]]\nbits = 4", "step 1 of recipe 'bad.toml' has no 'method'"),
        ('[[step]]\nmethod = "gtpq"', "unknown method 'gtpq'; did you mean 'gptq'"),
        ('[[step]]\nmethod = "gptq"\nbit = 4', "has no knob 'bit'; did you mean 'bits'"),
        ('[[step]]\nmethod = "gptq"\nbits = 40', "must be at most 8, got 40"),
        ('[[step]]\nmethod = "gptq"\nlayers = ["@frist"]', "unknown word '@frist' in layers"),
        ('[[step]]\nmethod = "gptq"\nlayer = "x"', "unknown key 'layer'; did you mean 'layers'"),
        ('[[step]]\nmethod = "gptq"\nlayers = []', "names no layer"),
        ('[[step]]\nmethod = "gptq"\nlayers = 3', "got 3"),
        ('stage = 3\n[[step]]\nmethod = "gptq"', "unknown key 'stage'"),
        ("[[step", "is no valid TOML"),
    ],
)
def test_files_that_are_no_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_text(text)
    assert main(["compress", "nowhere", "--recipe", "bad.toml"]) == KnobError.exit_code
    message = capsys.readouterr().err
    assert words in message.replace("\n", " ")


def test_a_recipe_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "nowhere", "--recipe", "gone.toml"]) == KnobError.exit_code
    assert "'gone.toml' cannot be read" in capsys.readouterr().err


def test_a_recipe_beside_a_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.toml").write_text(TOML)
    argv = ["compress", "nowhere", "--recipe", str(tmp_path / "r.toml")]
    assert main([*argv, "-m", "rtn"]) == KnobError.exit_code
    assert "exclude each other" in capsys.readouterr().err
    assert main([*argv, "--bits", "4"]) != 0
    assert "--bits" in capsys.readouterr().err


def test_knobs_beside_a_value() -> None:
    with pytest.raises(KnobError, match="beside a method value"):
        as_recipe(MIXED, {"bits": 3})
