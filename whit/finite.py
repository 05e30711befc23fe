"""Whether all values of a tensor are numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; true of integers.

    The sum decides: one pass over the values that writes nothing; looking at each takes a CPU a dozen times as long.
    Only where the sum is no number, or too large for one, are the values looked at.
    """
    if not tensor.is_floating_point():
        return True
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return bool(torch.isfinite(tensor.sum(dtype=wide))) or bool(torch.isfinite(tensor.to(wide)).all())
