"""Calling an op's implementation without torch's dispatcher where nobody would see the op.

An op of `torch.library` is what `torch.compile`, tracers and modes see of a kernel. Where there are none, going through
it only costs the host time: in torch 2.11 a fifth of a millisecond for an op written in Python (on the host of an
H200), more than most products take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def unobserved(like: Tensor) -> bool:
    """Whether calls with tensors like this one are neither traced nor transformed nor intercepted."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    return type(like) is Tensor and not is_in_torch_dispatch_mode()


def call(like: Tensor, implementation: Callable[..., Tensor], op: Callable[..., Any], *arguments: Any) -> Tensor:
    """What `op` gives for arguments without a derivative, by its implementation if nobody looks at ops.

    Args:
        like: one of the tensors among the arguments.
        implementation: of the op on the device of `like`, which allocates what it returns.
        op: as registered with torch.
    """
    out: Tensor = implementation(*arguments) if unobserved(like) else op(*arguments)
    return out
