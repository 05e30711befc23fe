"""An op's implementation is called directly exactly where nobody could see the op."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from whit.kernels.calling import call, unobserved


def twice(x: Tensor, times: int) -> Tensor:
    return 2 * times * x


double = torch.library.custom_op("whit_tests::double", twice, mutates_args=())


@double.register_fake
def _(x: Tensor, times: int) -> Tensor:
    return torch.empty_like(x)


def refuse(x: Tensor, times: int) -> Tensor:
    raise AssertionError("not to be called here")


def test_a_plain_call_does_without_the_op() -> None:
    x = torch.arange(3.0)
    assert unobserved(x)
    assert torch.equal(call(x, twice, refuse, x, 3), 6 * x)
    with torch.inference_mode():
        assert torch.equal(call(x, twice, refuse, x, 1), 2 * x)


def test_what_looks_at_ops_sees_them() -> None:
    x = torch.arange(3.0)

    def program(y: Tensor) -> Tensor:
        return call(y, refuse if observed else twice, double, y, 3) + 1

    observed = True
    graph = make_fx(program)(x).graph
    assert any("whit_tests.double" in str(node.target) for node in graph.nodes)
    traced = torch.jit.trace(program, (x,), check_trace=False)
    assert "whit_tests::double" in str(traced.graph)
    with FakeTensorMode() as mode:
        assert program(mode.from_tensor(x)).shape == (3,)
    with pytest.raises(AssertionError, match="not to be called"):
        program(x)
    observed = False
    assert torch.equal(program(x), 6 * x + 1)


def test_transforms_of_functions_see_ops() -> None:
    found: list[bool] = []

    def program(y: Tensor) -> Tensor:
        found.append(unobserved(y))
        return 2 * y

    assert torch.equal(torch.vmap(program)(torch.ones(2, 3)), torch.full((2, 3), 2.0))
    assert found == [False]


def test_subclasses_of_tensors_go_through_the_op() -> None:
    assert not unobserved(nn.Parameter(torch.ones(2)))


def test_a_compiled_program_holds_the_op() -> None:
    seen: list[str] = []

    def backend(module: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module

    @torch.compile(backend=backend, fullgraph=True)
    def program(y: Tensor) -> Tensor:
        return call(y, twice, double, y, 3)

    x = torch.arange(3.0)
    assert torch.equal(program(x), 6 * x)
    assert any("double" in name for name in seen)
