"""Compressed models in the formats of other tools. A target is one file in this folder with one `@register_target`."""

from whit.export.base import ExportRecord, available_targets
from whit.export.run import export

__all__ = ["ExportRecord", "available_targets", "export"]
