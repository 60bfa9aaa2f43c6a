"""Text of strangers, before it is logged, stored, sent or shown: in errors, log lines, notes and reports."""

from __future__ import annotations

import msgspec


def printable(text: str, most: int, *, lines: bool = False) -> str:
    """`text` in at most `most` characters, all of them visible and encodable.

    Control characters, line ends, half surrogates, marks that turn the direction of writing and whatever else is not
    printable come as Python writes them: `\\x00`, `\\n`, `\\ud800`, `\\u202e`. lines: line ends and tabs stay.
    """
    if not text.isprintable():
        kept = "\n\t" if lines else ""
        text = "".join(c if c.isprintable() or c in kept else _escaped(c) for c in text[: most + 1])
    return text if len(text) <= most else text[: max(most - 3, 0)] + "..."


def make_printable(struct: msgspec.Struct, **most: int) -> None:
    """For __post_init__: the named fields of `struct` made printable, each in at most so many characters."""
    for name, characters in most.items():
        msgspec.structs.force_setattr(struct, name, printable(getattr(struct, name), characters))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
