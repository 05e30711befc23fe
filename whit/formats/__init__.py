"""Number systems and packed layouts, one file each: pack, unpack, stored bytes. They know no algorithm."""

from whit.formats.base import Format, Packed, TensorSpec, format_from_json, register_format

__all__ = ["Format", "Packed", "TensorSpec", "format_from_json", "register_format"]
