"""Fetch and clean the English prose that the demo base model is trained on.

The corpus is made of documentation packages of Debian's main section, so every text in it is under a licence that
meets the Debian Free Software Guidelines. Nothing of it is committed: this script downloads the packages with
``apt-get download``, unpacks them without installing anything, and writes one JSON line per document.

    python tools/demo_corpus.py --work /tmp/demo_model

A document is one page (or one chapter of a novel) as a list of sections, each a heading and its paragraphs. Code
blocks, tables, navigation and indexes are dropped, paragraphs that do not look like English sentences are dropped,
and a paragraph seen before anywhere in the corpus is dropped.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

Section = tuple[str, list[str]]


@dataclass(frozen=True)
class Source:
    """One Debian package: the version the shipped model used, its licence, and the files that hold prose."""

    package: str
    version: str
    licence: str
    globs: tuple[str, ...]
    about: str
    reader: str = "markup"


SOURCES: tuple[Source, ...] = (
    Source("apache2-doc", "2.4.71-1~deb12u1", "Apache-2.0", ("**/manual/en/**/*.html",), "Apache HTTP Server manual"),
    Source("aptitude-doc-en", "0.8.13-5", "GPL-2+", ("**/*.html",), "aptitude user's manual"),
    Source("debian-edu-doc-en", "2.12.23~deb12u1", "GPL-2+, GPL-3+", ("**/*bookworm*.html",), "Debian Edu manual"),
    Source("debian-faq", "11.1", "free permissive notice (SPI)", ("**/*.en.html", "**/*.html"), "Debian GNU/Linux FAQ"),
    Source(
        "debian-handbook", "11.20220922", "GPL-2+ or CC-BY-SA-3.0", ("**/en-US/*.html",), "administrator's handbook"
    ),
    Source("debian-history", "2.28", "GPL-2+", ("**/*.en.html",), "a brief history of Debian"),
    Source("debian-policy", "4.6.2.0", "GPL-2+", ("**/policy.html/*.html",), "Debian Policy Manual"),
    Source("debian-reference-en", "2.100", "GPL-2+", ("**/*.en.html",), "Debian Reference"),
    Source("developers-reference", "12.18", "GPL-2", ("**/*.html",), "Debian Developer's Reference"),
    Source("exim4-doc-html", "4.96-1", "GPL-2+", ("**/*.html",), "Exim mail server manual"),
    Source("freedombox-doc-en", "23.6.2+deb12u2", "CC-BY-SA-4.0", ("**/manual/en/*.html",), "FreedomBox manual"),
    Source("gimp-help-en", "2.10.34-2", "GFDL-NIV-1.2+", ("**/help/en/*.html",), "GIMP user manual"),
    Source("git-doc", "1:2.39.5-0+deb12u3", "GPL-2", ("**/doc/git/html/**/*.html",), "Git manual and guides"),
    Source("gnome-user-docs", "43.0-2", "CC-BY-SA-3.0", ("**/help/C/**/*.page",), "GNOME user documentation"),
    Source("harden-doc", "3.19+nmu1", "GPL-2+", ("**/en-US/*.html",), "Securing Debian Manual"),
    Source("installation-guide-amd64", "20230508+deb12u1", "GPL-2", ("**/en/*.html",), "Debian Installation Guide"),
    Source("kstars-data", "5:3.6.2-2", "GFDL-NIV-1.2+", ("**/en/kstars/*.docbook",), "KStars handbook (astronomy)"),
    Source("libreoffice-help-en-us", "4:7.4.7-1+deb12u14", "MPL-2.0", ("**/en-US/text/**/*.html",), "LibreOffice help"),
    Source(
        "linux-doc-6.1",
        "6.1.192-2",
        "GPL-2",
        tuple(
            f"**/html/{part}/**/*.html" for part in ("admin-guide", "process", "filesystems", "scheduler", "security")
        ),
        "Linux kernel documentation (five parts of it)",
    ),
    Source("live-manual-html", "2:20151217.2", "GPL-3+", ("**/*.en.html", "**/en/**/*.html"), "Debian Live manual"),
    Source(
        "octave-doc",
        "7.3.0-2",
        "GPL-3+ (manual: free permissive notice)",
        ("**/octave.html/*.html",),
        "GNU Octave manual",
    ),
    Source("perl-doc", "5.36.0-7+deb12u4", "GPL-1+ or Artistic", ("**/pod/perl*.pod",), "Perl manual", "pod"),
    Source("postgresql-doc-15", "15.20-0+deb12u1", "PostgreSQL", ("**/html/*.html",), "PostgreSQL manual"),
    Source("python-django-doc", "3:3.2.25-0+deb12u7", "BSD-3-Clause", ("**/html/**/*.html",), "Django documentation"),
    Source("python3.11-doc", "3.11.2-6+deb12u9", "PSF-2.0", ("**/html/**/*.html",), "Python documentation"),
    Source(
        "r-cran-janeaustenr",
        "1.0.0-1",
        "public domain texts (package: MIT)",
        ("**/data/Rdata.rdb",),
        "six novels",
        "rdb",
    ),
    Source(
        "rust-doc",
        "1.63.0+dfsg1-2",
        "MIT or Apache-2.0",
        tuple(
            f"**/html/{part}/**/*.html"
            for part in ("book", "reference", "nomicon", "embedded-book", "edition-guide", "rustc", "rustdoc", "cargo")
        ),
        "the Rust books",
    ),
    Source("sphinx-doc", "5.3.0-4", "BSD-2-Clause", ("**/html/**/*.html",), "Sphinx documentation"),
    Source("sqlite3-doc", "3.40.1-2+deb12u2", "public domain", ("**/*.html",), "SQLite documentation"),
)

# Pages that are lists of links or of symbols, not prose.
SKIPPED_NAMES = re.compile(
    r"genindex|modindex|_modules|_sources|print\.html|whatsnew/changelog|/releases/|perl\d+delta"
)


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


def fetch(sources: tuple[Source, ...], work: Path) -> None:
    """Download and unpack the packages, without installing them; a changed version is said aloud."""
    debs = work / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    for source in sources:
        target = work / "x" / source.package
        found = sorted(debs.glob(f"{source.package}_*.deb"))
        if not found:
            subprocess.run(["apt-get", "download", source.package], cwd=debs, check=True)
            found = sorted(debs.glob(f"{source.package}_*.deb"))
        version = subprocess.run(
            ["dpkg-deb", "-f", str(found[-1]), "Version"], check=True, capture_output=True, text=True
        ).stdout.strip()
        if version != source.version:
            print(f"note: {source.package} is {version} here, the shipped model used {source.version}")
        if not target.is_dir():
            target.mkdir(parents=True)
            subprocess.run(["dpkg", "-x", str(found[-1]), str(target)], check=True)


def read_file(source: Source, path: Path) -> list[list[Section]]:
    """Every document of one file, sections without a paragraph dropped."""
    documents = []
    for sections in READERS[source.reader](path):
        kept = [(heading, paragraphs) for heading, paragraphs in sections if paragraphs]
        if sum(len(text) for _, paragraphs in kept for text in paragraphs) >= 300:
            documents.append(kept)
    return documents


def files_of(source: Source, root: Path) -> list[Path]:
    """The files of one source, in an order that does not depend on the file system."""
    found: dict[str, Path] = {}
    for pattern in source.globs:
        for path in root.glob(pattern):
            if path.is_file() and not path.is_symlink() and not SKIPPED_NAMES.search(str(path)):
                found.setdefault(str(path.relative_to(root)), path)
    return [found[key] for key in sorted(found)]


def build(work: Path, sources: tuple[Source, ...] = SOURCES) -> Path:
    """Write ``corpus.jsonl`` in the work folder and return its path."""
    fetch(sources, work)
    seen: set[bytes] = set()
    out_path = work / "corpus.jsonl"
    with out_path.open("w", encoding="utf-8") as out, ProcessPoolExecutor(2) as pool:
        for source in sources:
            paths = files_of(source, work / "x" / source.package)
            count = size = 0
            for documents in pool.map(read_file, [source] * len(paths), paths, chunksize=8):
                for document in documents:
                    fresh = [(heading, drop_seen(paragraphs, seen)) for heading, paragraphs in document]
                    fresh = [(heading, paragraphs) for heading, paragraphs in fresh if paragraphs]
                    characters = sum(len(text) for _, paragraphs in fresh for text in paragraphs)
                    if characters >= 300:
                        out.write(json.dumps({"package": source.package, "sections": fresh}, ensure_ascii=False) + "\n")
                        count, size = count + 1, size + characters
            print(f"{source.package}: {len(paths)} files, {count} documents, {size / 1e6:.2f} MB of text", flush=True)
    return out_path


def drop_seen(paragraphs: list[str], seen: set[bytes]) -> list[str]:
    """The paragraphs not met before, letters alone compared."""
    fresh = []
    for text in paragraphs:
        key = hashlib.blake2b(re.sub(r"[^a-z]", "", text.lower()).encode(), digest_size=12).digest()
        if key not in seen:
            seen.add(key)
            fresh.append(text)
    return fresh


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="scratch folder for packages and corpus.jsonl")
    print(build(parser.parse_args().work))


if __name__ == "__main__":
    main()
