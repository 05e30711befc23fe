import json
import re

import pytest
import torch

from tests.methods.layers import layer
from whit.errors import KnobError
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.sparse_nm import SparseNM
from whit.methods import (
    LayerStatistics,
    Statistic,
    available_methods,
    make_method,
    method_from_json,
    relative_output_error,
)
from whit.methods.chain import PruneThenQuantise
from whit.methods.gptq import GPTQ
from whit.methods.kmeans import KMeans
from whit.methods.magnitude import Magnitude
from whit.methods.rtn import RTN
from whit.methods.sparsegpt import SparseGPT
from whit.methods.wanda import Wanda

CHAINS = [
    PruneThenQuantise(Wanda(pattern="2:4"), RTN(bits=4, group_size=32)),
    PruneThenQuantise(Wanda(pattern="2:4"), GPTQ(bits=4, group_size=32)),
    PruneThenQuantise(Wanda(pattern="2:4"), GPTQ(bits=3, group_size=0, act_order=True, symmetric=True)),
    PruneThenQuantise(SparseGPT(comparison="row"), GPTQ(bits=2, group_size=10, clip_steps=3)),
    PruneThenQuantise(Magnitude(sparsity=0.3, comparison="row"), GPTQ(bits=1, symmetric=True)),
]


@pytest.mark.parametrize("chain", CHAINS)
def test_kept_weights_are_quantised_and_the_rest_is_zero(chain):
    weight, statistics = layer()
    packed = chain.compress(weight, statistics).packed
    pruned = chain.pruner.prune(weight, statistics)
    unpacked = packed.unpack()
    assert packed.format == chain.format(48, 192)
    assert packed.stored_bytes() == chain.format(48, 192).bytes(48, 192)
    assert not unpacked[~pruned.kept].any()
    values = chain.quantiser.compress_kept(pruned.weight, pruned.kept, statistics).packed
    assert torch.equal(unpacked[pruned.kept], values.unpack().flatten())


@pytest.mark.parametrize("chain", CHAINS)
def test_json_brings_the_chain_back(chain):
    assert method_from_json(json.loads(json.dumps(chain.to_json()))) == chain
    assert chain.to_json()["pruner"]["method"] == chain.pruner.name


def test_the_format_is_the_index_of_one_and_the_values_of_the_other():
    chain = PruneThenQuantise(Wanda(pattern="2:4"), GPTQ(bits=4, group_size=32))
    assert chain.format(48, 192) == SparseNM(2, 4, GroupedInteger(4, 32, False))
    assert chain.format(48, 192).bytes(48, 192) == 48 * (16 + 48 + 2 * 3) + 48 * 3 // 2


def test_the_notes_tell_the_error_after_each_step():
    weight, statistics = layer()
    chain = CHAINS[1]
    notes = chain.compress(weight, statistics).notes
    found = re.fullmatch(r"relative error (\S+) after wanda, (\S+) after gptq", notes[-1])
    pruned = chain.pruner.prune(weight, statistics).weight
    moment = statistics.second_moment
    assert float(found[1]) == pytest.approx(relative_output_error(weight, pruned, moment), rel=1e-3)
    both = relative_output_error(weight, chain.compress(weight, statistics).packed.unpack(), moment)
    assert float(found[2]) == pytest.approx(both, rel=1e-3)
    sampled = LayerStatistics(192, 1024, square_sums=statistics.input_square_sums(), sample=statistics.sample)
    assert CHAINS[0].compress(weight, sampled).notes == CHAINS[0].compress(weight, statistics).notes
    blind = PruneThenQuantise(Magnitude(pattern="2:4"), RTN()).compress(weight, LayerStatistics(192)).notes
    lost = relative_output_error(weight, Magnitude(pattern="2:4").prune(weight, statistics).weight, None)
    assert blind[-1].startswith(f"relative error {lost:.4g} after magnitude")


def test_feedback_beats_rounding_after_the_same_pruning():
    for seed in range(2):
        weight, statistics = layer(seed=seed)
        pruned = SparseGPT(pattern="2:4").prune(weight, statistics)
        errors = {}
        for method in (
            RTN(bits=3, group_size=32),
            GPTQ(bits=3, group_size=32),
            GPTQ(bits=3, group_size=32, act_order=True),
        ):
            values = method.compress_kept(pruned.weight, pruned.kept, statistics).packed
            out = torch.zeros_like(weight)
            out[pruned.kept] = values.unpack().flatten()
            errors[method] = relative_output_error(pruned.weight, out, statistics.second_moment)
        rounded, *fed_back = errors.values()
        assert max(fed_back) < 0.5 * rounded


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [0, 10, 32])
def test_uncorrelated_inputs_make_gptq_round_the_kept_weights_to_nearest(act_order, group):
    weight, _ = layer()
    statistics = LayerStatistics(192, 1, torch.eye(192))
    pruned = Wanda(pattern="2:4").prune(weight, statistics)
    options = {"bits": 3, "group_size": group}
    gptq = GPTQ(**options, act_order=act_order).compress_kept(pruned.weight, pruned.kept, statistics).packed
    rtn = RTN(**options).compress_kept(pruned.weight, pruned.kept, statistics).packed
    assert gptq.format == rtn.format
    assert all(torch.equal(gptq.tensors[name], tensor) for name, tensor in rtn.tensors.items())


def test_a_mask_that_keeps_everything_makes_it_plain_gptq_with_grids_fitted_beforehand():
    weight, statistics = layer()
    kept = torch.ones_like(weight, dtype=torch.bool)
    method = GPTQ(bits=3, group_size=48, act_order=True)
    whole, masked = method.compress(weight, statistics), method.compress_kept(weight, kept, statistics)
    assert torch.equal(whole.packed.unpack(), masked.packed.unpack())


def test_gptq_after_pruning_is_its_slow_definition():
    weight, statistics = layer(rows=6, columns=40)
    pruned = Wanda(pattern="2:4").prune(weight, statistics)
    method = GPTQ(bits=3, group_size=10)
    found = method.compress_kept(pruned.weight, pruned.kept, statistics).packed.unpack()
    moment = statistics.second_moment.double()
    hessian = moment + 0.01 * moment.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    grids = RTN(bits=3, group_size=10).compress_kept(pruned.weight, pruned.kept, statistics).packed
    scales = grids.tensors["scales"].double()
    whole = grids.format.unpack(
        {**grids.tensors, "codes": torch.zeros_like(grids.tensors["codes"])}, 6, 20
    )  # -scale * zero at every kept place
    values, seen = pruned.weight.double().clone(), torch.zeros(6, dtype=torch.long)
    expected = torch.zeros(6, 20, dtype=torch.float64)
    for j in range(40):
        inverse = torch.linalg.inv(hessian[j:, j:])
        for row in range(6):
            rounded = 0.0
            if pruned.kept[row, j]:
                place = int(seen[row])
                scale, low = scales[row, place // 10], whole[row, place].double()
                code = torch.round((values[row, j] - low) / scale).clamp(0, 7)
                rounded = expected[row, place] = code * scale + low
                seen[row] += 1
            values[row, j:] -= (values[row, j] - rounded) / inverse[0, 0] * inverse[0]
    # The implementation works in float32: a code next to a tie may fall the other way and change those after it.
    assert torch.isclose(found.double(), expected, rtol=1e-3, atol=1e-6).float().mean() > 0.9


def test_what_is_needed_is_what_either_needs():
    assert CHAINS[0].required() == {Statistic.SQUARE_SUMS}
    assert CHAINS[1].required() == {Statistic.SECOND_MOMENT}
    assert PruneThenQuantise(make_method("pruner-zero", {"pattern": "2:4"}), GPTQ()).required() == {
        Statistic.GRADIENT,
        Statistic.SECOND_MOMENT,
    }


def test_it_is_not_offered_by_name():
    assert PruneThenQuantise.name not in available_methods()
    with pytest.raises(KnobError, match="unknown method 'prune-then-quantise'"):
        make_method("prune-then-quantise")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 4}, "a method is described by its name and knobs"),
        ({"method": "prune-then-quantise"}, "is made of pruner, quantiser, got nothing"),
        (
            {"method": "prune-then-quantise", "pruner": {"method": "rtn"}, "quantiser": {"method": "rtn"}},
            "'pruner' of method 'prune-then-quantise' is of type Pruner, got RTN",
        ),
        ({"method": "prune-then-quantise", "pruner": "wanda", "quantiser": "rtn"}, "is of type Pruner, got 'wanda'"),
        (
            {"method": "prune-then-quantise", "pruner": {"method": "wandaa"}, "quantiser": {"method": "rtn"}},
            "unknown method 'wandaa'; did you mean 'wanda'",
        ),
    ],
)
def test_json_that_means_no_method_is_refused(fields, message):
    with pytest.raises(KnobError, match=message):
        method_from_json(fields)


def test_methods_that_do_not_go_together_are_refused_with_the_reason():
    with pytest.raises(
        KnobError, match=r"'kmeans' cannot follow a pruning step \(methods that can: flexible, gptq, rtn"
    ):
        PruneThenQuantise(Wanda(), KMeans())
    with pytest.raises(KnobError, match="give the pruning a pattern, or comparison='row'"):
        PruneThenQuantise(Magnitude(), RTN())
    with pytest.raises(KnobError, match="cannot follow a pruning step"):
        PruneThenQuantise(Wanda(), Wanda())
    with pytest.raises(KnobError, match="'kmeans' cannot follow a pruning step"):
        KMeans().compress_kept(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), LayerStatistics(2))
