"""HTML that cannot be injected into: every string is escaped unless it was made here."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable

_VOID = {"meta", "br", "img"}


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Content = str | Iterable["Content"] | None


def clean(text: str) -> str:
    """Control characters and halves of surrogate pairs, which a page may not hold, become U+FFFD."""
    bad = (unicodedata.category(sign) in ("Cc", "Cs") and sign not in "\n\t" for sign in text)
    return "".join("\ufffd" if wrong else sign for sign, wrong in zip(text, bad, strict=True))


def join(content: Content) -> Html:
    """Strings escaped, Html as it is, lists in order, None as nothing."""
    if content is None:
        return Html("")
    if isinstance(content, Html):
        return content
    if isinstance(content, str):
        return Html(html.escape(clean(content.replace("\r\n", "\n")), quote=True))
    return Html("".join(map(join, content)))


def tag(name: str, /, *content: Content, **attributes: str | bool | None) -> Html:
    """<name attributes>content</name>: `cls` is class, `_` in a name `-`; True a bare attribute, None no."""
    written = ""
    for key, value in attributes.items():
        key = "class" if key == "cls" else key.replace("_", "-")
        if value is True:
            written += f" {key}"
        elif value not in (None, False):
            written += f' {key}="{join(value)}"'
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(content)}</{name}>")
