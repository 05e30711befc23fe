"""HTML built from values: text is escaped unless it is already `Html`, so no user string can become markup."""

from __future__ import annotations

from html import escape


class Html(str):
    """Text that is already markup; only `element` and `raw` make it."""

    __slots__ = ()


VOID = frozenset({"meta", "br", "hr", "link"})


def raw(text: str) -> Html:
    """Declare constant text of this package (style sheet, script) to be markup."""
    return Html(text)


def element(name: str, /, *children: str | None, **attributes: str | int | float | bool | None) -> Html:
    """`<name attributes>children</name>`; children and attribute values are escaped.

    Args:
        name: tag.
        children: `Html` is kept as it is, other text is escaped, None is left out.
        attributes: a trailing underscore is dropped (`class_`), other underscores become hyphens (`data_value`);
            True gives a bare attribute, False and None leave it out.
    """
    head = name
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        attribute = key.rstrip("_").replace("_", "-")
        head += f" {attribute}" if value is True else f' {attribute}="{escape(str(value))}"'
    if name in VOID:
        return Html(f"<{head}>")
    return Html(f"<{head}>{join(*children)}</{name}>")


def join(*children: str | None) -> Html:
    """Concatenate children, escaping those that are not markup."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in children if part is not None))
