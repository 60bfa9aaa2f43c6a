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
import hashlib
import json
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from demo_model.prose import READERS, Section
from demo_model.sources import SOURCES, Source, fetch, files_of


def read_file(source: Source, path: Path) -> list[list[Section]]:
    """Every document of one file, sections without a paragraph dropped."""
    documents = []
    for sections in READERS[source.reader](path):
        kept = [(heading, paragraphs) for heading, paragraphs in sections if paragraphs]
        if sum(len(text) for _, paragraphs in kept for text in paragraphs) >= 300:
            documents.append(kept)
    return documents


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
