"""One op per format: its plain-torch meaning is oracle and fallback; faster versions stand beside it."""

from whit.kernels.linear import explain, packed_embedding, packed_linear, register_implementation

__all__ = ["explain", "packed_embedding", "packed_linear", "register_implementation"]
