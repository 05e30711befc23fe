"""Triton sources: imported only where Triton is installed, by the modules beside this folder."""
