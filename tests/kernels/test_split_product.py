"""A float32 matrix as two bfloat16 ones: products to 16 bits, on a CPU those of float32."""

import pytest
import torch

from whit.kernels.split_product import Panel, SplitFactor, add_product, product, split

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def matrix(rows: int = 40, inner: int = 70, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, inner, generator=generator) * torch.logspace(-6, 6, inner)


def signs(inner: int = 70, columns: int = 30) -> torch.Tensor:
    return torch.randint(-1, 2, (inner, columns), generator=torch.Generator().manual_seed(1)).float()


def test_the_parts_add_up_to_sixteen_bits() -> None:
    parts = split(matrix())
    assert [part.dtype for part in parts] == [torch.bfloat16] * 2
    total = sum(part.double() for part in parts)
    assert float(((total - matrix()) / matrix()).abs().max()) < 2**-16


def test_a_cpu_multiplies_as_ever() -> None:
    a, right = matrix(70, 70), matrix(70, 30, seed=2)
    assert torch.equal(SplitFactor(a).times(signs()), a @ signs())
    assert torch.equal(product(a, right), a @ right)
    start = matrix(70, 30, seed=3)
    target = start.clone()
    SplitFactor(a).subtract(target, right)
    assert torch.equal(target, torch.addmm(start, a, right, alpha=-1))
    target = start[10:50].clone()
    panel = SplitFactor(a).panel(0, 20, 30)
    panel.put(0, right[:20])
    panel.take_off(target, slice(10, 50))
    assert torch.equal(target, torch.addmm(start[10:50], a[:20, 10:50].T, right[:20], alpha=-1))
    places = torch.tensor([3, 60, 7])
    assert torch.equal(SplitFactor(a).part(places).times(signs()[:3]), a[places][:, places] @ signs()[:3])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])])
def test_a_panel_takes_off_what_is_known(device: str) -> None:
    a, right, start = matrix(72, 72).to(device), matrix(72, 32, seed=2).to(device), matrix(72, 32, seed=3).to(device)
    panel = Panel(split(a[8:40]) if device == "cuda" else [a[8:40]], 8, 32)
    panel.put(8, right[:16])
    known = a[8:24].double().T @ right[:16].double()
    bound = a[8:24].double().abs().T @ right[:16].double().abs() + start.abs()
    off = panel.taken_off(start[24:40], slice(24, 40)) - (start - known)[24:40]
    assert float((off.abs() / bound[24:40]).max()) < 2**-15
    panel.put(24, right[16:32])
    known = a[8:40].double().T @ right[:32].double()
    bound = a[8:40].double().abs().T @ right[:32].double().abs() + start.abs()
    target = start.clone()
    panel.take_off(target, slice(None))
    assert float(((target - (start - known)).abs() / bound).max()) < 2**-15
    halves = panel.halves(24, 40)
    if device == "cuda":
        assert halves is not None and torch.equal(halves[0], split(right[16:32])[0]) and halves.shape == (3, 16, 32)
    else:
        assert halves is None


@pytest.mark.gpu
@needs_cuda
def test_tensor_cores_give_the_product_to_sixteen_bits() -> None:
    a, right, start = matrix(72, 72), matrix(72, 32, seed=2), matrix(72, 32, seed=3)
    size = a.abs().double() @ right.abs().double()
    expected = a.double() @ right.double()

    def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
        return float(((found.cpu() - wanted).abs() / size).max())

    factor = SplitFactor(a.cuda())
    assert off(product(a.cuda(), right.cuda()), expected) < 2**-15
    assert off(add_product(torch.zeros(72, 32).cuda(), a.cuda(), right.cuda(), -2.0), -2 * expected) < 2**-14
    target = start.cuda()
    factor.subtract(target, right.cuda())
    assert off(target, start - expected) < 2**-15
    pattern = signs(72, 32)
    bound = a.abs().double() @ pattern.abs().double() + 1e-30
    assert float(((factor.times(pattern.cuda()).cpu() - a.double() @ pattern.double()).abs() / bound).max()) < 2**-8
