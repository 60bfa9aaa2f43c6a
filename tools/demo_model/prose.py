"""English prose out of the files of packages: HTML, Mallard, DocBook, POD, and the novels of an R database."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

Section = tuple[str, list[str]]
"""A heading and its paragraphs."""


def word_set(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


HEADINGS = {"h1", "h2", "h3", "h4", "title"}
# 'term' is the DocBook name of a definition list's left side, which reads as noise without its table.
BLOCKS = {"p", "li", "dd", "para", "item", "simpara"}
SKIPPED_TAGS = word_set(
    """
    script style pre nav header footer table head code-block programlisting screen literallayout
    synopsis informaltable figure media form button select svg math code info
    """
)
SKIPPED_CLASSES = re.compile(
    r"sphinxsidebar|related|toc|navheader|navfooter|highlight|breadcrumb|sidebar|headerlink|menu|footer|verbatim"
)
# A frame's class says what the page has ("sidebar-visible"), not what the frame is.
FRAMES = {"html", "body", "main", "section"}
VOID_TAGS = word_set(
    """
    area base br col embed hr img input link meta source track wbr
    """
)


class ProseParser(HTMLParser):
    """Collect headings and paragraphs of an HTML, Mallard or DocBook page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.sections: list[Section] = [("", [])]
        self.stack: list[tuple[str, bool]] = []
        self.skipping = 0
        self.text: list[str] = []
        self.heading = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begins a block, or something to drop."""
        if tag in VOID_TAGS:
            self.text.append(" ")
            return
        classes = " ".join(value or "" for key, value in attrs if key in ("class", "id", "role"))
        # Inline code is part of its sentence: only a block of code is dropped.
        dropped = (tag in SKIPPED_TAGS and tag != "code") or (
            tag not in FRAMES and bool(SKIPPED_CLASSES.search(classes))
        )
        self.stack.append((tag, dropped))
        self.skipping += dropped
        if tag in BLOCKS or tag in HEADINGS:
            self.flush()
            self.heading = tag in HEADINGS

    def handle_endtag(self, tag: str) -> None:
        """Ends it, and whatever the page left open in it."""
        if tag not in [name for name, _ in self.stack[-12:]]:
            return
        if tag in BLOCKS or tag in HEADINGS:
            self.flush()
        while self.stack:
            name, dropped = self.stack.pop()
            self.skipping -= dropped
            if name == tag:
                break

    def handle_data(self, data: str) -> None:
        """Adds to the running block."""
        if not self.skipping:
            self.text.append(data)

    def flush(self) -> None:
        """End the running block and keep it where it reads as prose."""
        text = tidy("".join(self.text))
        self.text = []
        if self.heading:
            self.heading = False
            if text:
                self.sections.append((tidy_heading(text), []))
        elif is_prose(text):
            self.sections[-1][1].append(text)


QUOTES = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "\u00a0": " ", "…": "...", "¶": " "}
)
COMMON = word_set(
    """
    the of and to a in is that it as for was with be by on not he his but at are this have or had you if
    """
)
SENTENCE = re.compile(r'^["\'(]?[A-Z].*[.!?:]["\')]?$', re.DOTALL)


def tidy(text: str) -> str:
    """Fold whitespace and typographic quotes, so that one sentence has one spelling in the corpus."""
    return re.sub(r"\s+", " ", text.translate(QUOTES)).replace(" .", ".").replace(" ,", ",").strip()


def tidy_heading(text: str) -> str:
    """Drop a heading's chapter number."""
    return re.sub(r"^(chapter\s+)?[\dA-Z]{0,2}(\.\d+)*\.?\s+(?=\w)", "", text, flags=re.IGNORECASE).strip(" .:#")


def is_prose(text: str) -> bool:
    """Whether a paragraph looks like English sentences rather than symbols, names or another language."""
    if not 40 <= len(text) <= 4000 or not SENTENCE.match(text):
        return False
    plain = sum(1 for char in text if char == " " or (char.isalpha() and char.isascii()))
    words = text.split()
    common = sum(1 for word in words if word.lower().strip(",.;") in COMMON)
    return plain >= 0.9 * len(text) and len(words) >= 7 and common >= 0.15 * len(words)


def read_bytes(path: Path) -> bytes:
    """A file's bytes, unpacked where Debian compressed it."""
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def read_markup(path: Path) -> Iterator[list[Section]]:
    """The one document of an HTML, Mallard or DocBook file."""
    parser = ProseParser()
    parser.feed(read_bytes(path).decode("utf-8", "replace"))
    parser.close()
    parser.flush()
    yield parser.sections


def read_pod(path: Path) -> Iterator[list[Section]]:
    """The one document of a POD file: indented lines are code, ``=head`` lines are headings."""
    sections: list[Section] = [("", [])]
    for block in re.split(r"\n\s*\n", read_bytes(path).decode("utf-8", "replace")):
        if block.startswith("=head"):
            sections.append((tidy_heading(strip_pod(block.split(None, 1)[-1])), []))
        elif not block.startswith((" ", "\t", "=")):
            text = tidy(strip_pod(block))
            if is_prose(text):
                sections[-1][1].append(text)
    yield sections


def strip_pod(text: str) -> str:
    """Take POD's inline marks away, innermost first."""
    for _ in range(3):
        text = re.sub(r"\b[A-Z]<+\s?(?:([^<>|]*)\|)?([^<>]*?)\s?>+", lambda m: m.group(1) or m.group(2), text)
    return text


def read_rdb(path: Path) -> Iterator[list[Section]]:
    """The novels of an R lazy-load database, one document per chapter.

    Each object in the file is a zlib stream behind a four-byte length; a novel in it is a vector of strings, each
    stored as a flags word of type 9 (CHARSXP), a length, and its bytes: one printed line of the book.
    """
    data = path.read_bytes()
    for start in (match.start() for match in re.finditer(rb"\x78[\x01\x5e\x9c\xda]", data)):
        try:
            raw = zlib.decompressobj().decompress(data[start:])
        except zlib.error:
            continue
        lines = []
        for match in re.finditer(rb"\x00\x04\x00\x09(\x00\x00\x00.)", raw, re.DOTALL):
            length = match.group(1)[3]
            lines.append(raw[match.end() : match.end() + length].decode("utf-8", "replace"))
        if len(lines) > 1000:
            yield from chapters(lines)


def chapters(lines: list[str]) -> Iterator[list[Section]]:
    """Split a novel's printed lines into chapters of paragraphs."""
    for chapter in re.split(r"\n\s*(?:chapter|volume)\s+[ivxlc\d]+\.?[^\n]*\n", "\n".join(lines), flags=re.IGNORECASE):
        paragraphs = [tidy(part.replace("_", "")) for part in re.split(r"\n\s*\n", chapter)]
        kept = [text for text in paragraphs if len(text) >= 20 and text[-1] in ".!?\"':;-,"]
        if len(kept) > 2:
            yield [("", kept)]


READERS = {"markup": read_markup, "pod": read_pod, "rdb": read_rdb}
