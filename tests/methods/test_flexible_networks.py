"""Whole networks, trained here in a second: choosing by the layer's output, and what outliers do to a single system."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from whit.methods import LayerStatistics, Method, make_method
from whit.models.layers import layer_kind
from whit.models.packed import PackedLinear, replace_module

PAPER = {"group_size": -1, "input_scale": "tensor", "reserve_top": True}
FIVE = ("int8", "e3m4", "e4m3", "e2m5", "e5m2")


class Convolution(nn.Module):
    """3 x 3, as the product of patches and filters that it is: (batch, channels, height, width)."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        self.product = nn.Linear(channels * 9, filters)

    def forward(self, x: Tensor) -> Tensor:
        patches = nn.functional.unfold(x, 3, padding=1).transpose(1, 2)
        return self.product(patches).transpose(1, 2).reshape(len(x), -1, *x.shape[2:])


class ResidualNet(nn.Module):
    """Two residual blocks of two convolutions between a stem and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Convolution(1, 12)
        self.layers = nn.ModuleList([Convolution(12, 12) for _ in range(4)])
        self.head = nn.Linear(12 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for first, second in ((0, 1), (2, 3)):
            x = (x + self.layers[second](self.layers[first](x).relu())).relu()
        return self.head(nn.functional.avg_pool2d(x, 2).flatten(1))


class Transformer(nn.Module):
    """Rows of an image as tokens, one block of attention and a feed-forward pair."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.place = nn.Parameter(torch.randn(8, 32) * 0.1)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.norms = nn.ModuleList([nn.LayerNorm(32) for _ in range(3)])
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.squeeze(1)) + self.place
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, -1)
        x = x + self.out(torch.softmax(q @ k.transpose(1, 2) / 32**0.5, -1) @ v)
        x = x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))
        return self.head(self.norms[2](x).mean(1))


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ten smooth 8 x 8 patterns under shifts and noise, and which each image shows."""
    patterns = torch.randn(10, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    patterns = nn.functional.interpolate(patterns, size=8, mode="bilinear")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (count,), generator=generator)
    shifts = torch.randint(-1, 2, (count,), generator=generator)
    shifted = torch.stack([patterns[label].roll(int(shift), 2) for label, shift in zip(labels, shifts, strict=True)])
    return shifted + 0.4 * torch.randn(count, 1, 8, 8, generator=generator), labels


def trained(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = kind()
    data, labels = images(1000, 1)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(80):
        part = torch.arange(step * 40, step * 40 + 40) % 1000
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(data[part]), labels[part]).backward()
        optimiser.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    return {"convolutions": trained(ResidualNet), "transformer": trained(Transformer)}


def with_outliers(model: nn.Module) -> nn.Module:
    """One weight of each matrix sixty standard deviations large: another network, which is then the one to keep."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            flat = module.weight.data.view(-1)
            flat[len(flat) // 2] = 60 * flat.std()
    return model


def with_uneven_channels(model: nn.Module) -> nn.Module:
    """The same function, with the hidden channels of each residual block scaled apart, as folded batch norms do."""
    model = copy.deepcopy(model)
    for first, second in ((0, 1), (2, 3)):
        factors = torch.logspace(-0.75, 0.75, 12)
        before, after = model.layers[first].product, model.layers[second].product
        before.weight.data *= factors.unsqueeze(1)
        before.bias.data *= factors
        after.weight.data /= factors.repeat_interleave(9)
    return model


def compressed(model: nn.Module, method: Method, data: Tensor) -> tuple[nn.Module, dict[str, PackedLinear]]:
    """Every linear layer packed, from the inputs it has in the original."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inputs: dict[str, Tensor] = {}

    def watch(name: str):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs[name] = arguments[0].reshape(-1, arguments[0].shape[-1])

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    model(data)
    for handle in handles:
        handle.remove()
    model = copy.deepcopy(model)
    packed: dict[str, PackedLinear] = {}
    for name in names:
        module, sample = model.get_submodule(name), inputs[name]
        statistics = LayerStatistics(
            sample.shape[1],
            len(sample),
            absolute_maximum=sample.abs().amax(0),
            sample=sample[:: len(sample) // 800 + 1],
        )
        result = method.compress(module.weight.data, statistics).packed
        running = layer_kind(module).build(module, result.format)
        running.set_packed(result)
        running.bias = module.bias
        replace_module(model, name, running)
        packed[name] = running
    return model, packed


def accuracy(model: nn.Module) -> float:
    data, labels = images(500, 2)
    return float((model(data).argmax(1) == labels).float().mean())


@pytest.mark.parametrize("kind", ["convolutions", "transformer"])
def test_choosing_is_as_good_as_the_best_single_system(networks, kind: str) -> None:  # type: ignore[no-untyped-def]
    model, data = networks[kind], images(64, 3)[0]
    assert accuracy(model) > 0.9
    single = [
        accuracy(compressed(model, make_method("flexible", {**PAPER, "formats": name}), data)[0]) for name in FIVE
    ]
    mixed, _ = compressed(model, make_method("flexible", PAPER), data)
    assert accuracy(mixed) >= max(single) - 0.002


@pytest.mark.parametrize("kind", ["convolutions", "transformer"])
def test_outliers_break_int8_and_not_the_choice(networks, kind: str) -> None:  # type: ignore[no-untyped-def]
    model, data = with_outliers(networks[kind]), images(64, 3)[0]
    test = images(200, 4)[0]
    expected = model(test)
    errors = {}
    for name, formats in (("int8", "int8"), ("mixed", "")):
        output = compressed(model, make_method("flexible", {**PAPER, "formats": formats}), data)[0](test)
        errors[name] = float((output - expected).square().mean() / expected.square().mean())
    assert errors["mixed"] < 0.25 * errors["int8"]


def test_output_and_tensor_choose_differently_and_output_is_no_worse(networks) -> None:  # type: ignore[no-untyped-def]
    model, data, test = with_uneven_channels(networks["convolutions"]), images(100, 3)[0], images(200, 4)[0]
    expected = model(test)
    torch.testing.assert_close(expected, networks["convolutions"](test), rtol=1e-3, atol=1e-3)
    chosen, errors = {}, {}
    for score in ("output", "tensor", "resolution"):
        small, packed = compressed(model, make_method("flexible", {**PAPER, "score": score}), data)
        chosen[score] = {name: (layer.format.system, layer.format.weight.system) for name, layer in packed.items()}
        errors[score] = float((small(test) - expected).square().mean())
    assert any(chosen["output"][name] != chosen["tensor"][name] for name in chosen["output"])
    assert errors["output"] <= errors["tensor"]
    # A layer's output error is that of its loud channels, which the next layer may not care for; spacing is relative.
    assert errors["resolution"] < errors["output"]
