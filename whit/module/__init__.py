"""Compressing a module that the user holds in memory: the parts of the pipeline without files and streams."""
