"""The search among launches of products: what it tries, keeps and leaves behind."""

import pytest
import torch

from whit.formats.base import Packed
from whit.formats.level_table import LevelTable
from whit.kernels import nvrtc, product_tuning
from whit.kernels.cuda_layout import layout_of
from whit.kernels.cuda_shapes import gemv_shapes
from whit.kernels.cuda_tuned import tuned_shapes, tuning_key


def test_what_tuning_tries_is_compiled_beforehand(hopper, monkeypatch, tmp_path):
    """Side by side, each once; what does not compile is left to be said where it is wanted."""
    monkeypatch.setenv("WHIT_CACHE", str(tmp_path))
    compiled = []

    def compile_some(source, options):
        compiled.append(options)
        if "-DRESIDENT=2" in options:
            raise nvrtc.CompilationError("no room")
        return b"code"

    monkeypatch.setattr(nvrtc, "compile_cubin", compile_some)
    layout = layout_of(LevelTable(2, 128), 4096)
    wanted = product_tuning.sources(layout, 512, 4096, 1, True, 0)
    assert len(wanted) == len(set(wanted)) == len(product_tuning.candidates(layout, 512, 4096, 1, 0))
    nvrtc.compile_together([*wanted, *wanted], 0)
    assert len(compiled) == len(wanted)
    kept = [options for _, options, _ in wanted if "-DRESIDENT=2" not in options]
    assert 0 < len(kept) == len(list((tmp_path / "kernels").glob("*.cubin"))) < len(wanted)
    for tokens in (16, 256):
        assert len(product_tuning.sources(layout, 512, 4096, tokens, True, 0)) >= tokens // 16


def table():
    form = LevelTable(2, 128)
    tensors = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in form.specs(512, 4096).items()}
    return Packed(form, 512, 4096, tensors)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, torch.OutOfMemoryError, nvrtc.CompilationError])
def test_tuning_that_ends_early_leaves_the_launch_as_it_was(hopper, monkeypatch, failure):
    packed = table()
    layout = layout_of(packed.format, 4096)
    monkeypatch.setattr(product_tuning, "usable", lambda x, packed: layout)
    x = torch.empty(1, 4096, device="meta")
    key, before = tuning_key(layout, 512, 4096, 1), gemv_shapes(layout)[3]
    product_tuning.use_shape("No Such GPU", key, before)

    def seconds():
        assert tuned_shapes("No Such GPU")[key] in gemv_shapes(layout, clusters=True)
        raise failure("early")

    with pytest.raises(failure):
        product_tuning.tune(x, packed, seconds)
    assert tuned_shapes("No Such GPU")[key] == before


def test_tuning_passes_over_launches_that_cannot_be_compiled(hopper, monkeypatch):
    packed = table()
    layout = layout_of(packed.format, 4096)
    monkeypatch.setattr(product_tuning, "usable", lambda x, packed: layout)
    wanted, tried = gemv_shapes(layout)[2], []

    def seconds():
        tried.append(tuned_shapes("No Such GPU")[tuning_key(layout, 512, 4096, 1)])
        if len(tried) % 2:
            return 1.0 if tried[-1] == wanted else 2.0
        raise nvrtc.CompilationError("not here")

    assert product_tuning.tune(torch.empty(1, 4096, device="meta"), packed, seconds)[1] == wanted
    assert tried == product_tuning.candidates(layout, 512, 4096, 1, 0)
