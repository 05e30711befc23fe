"""One op per format: its plain-torch meaning is oracle and fallback; faster versions stand beside it."""

from whit.discovery import import_submodules
from whit.kernels.linear import explain, packed_embedding, packed_linear, register_implementation

import_submodules("whit.kernels")  # a new file registers its implementations

__all__ = ["explain", "packed_embedding", "packed_linear", "register_implementation"]
