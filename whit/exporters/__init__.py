"""Compressed models in the formats of other tools. A target is one file in this folder with one `@register_target`."""

from whit.exporters.base import available_targets
from whit.exporters.run import export

__all__ = ["available_targets", "export"]
