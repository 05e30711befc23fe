"""A device to choose launches for, where there is none."""

import pytest
import torch

from whit.kernels import cuda_ops, product_tuning
from whit.kernels.cuda_tuned import tuned_shapes


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache, of found launch shapes too."""
    monkeypatch.delenv("WHIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned_shapes.cache_clear()
    yield
    tuned_shapes.cache_clear()


@pytest.fixture
def hopper(own_cache, monkeypatch):
    """What `cuda_ops` asks of a device."""
    for module in (cuda_ops, product_tuning):
        monkeypatch.setattr(module, "device_limits", lambda index: ("No Such GPU", 132, 232448))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    cuda_ops.choice.cache_clear()
    yield
    cuda_ops.choice.cache_clear()
