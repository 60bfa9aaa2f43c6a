"""The documentation packages of Debian's main section that hold the demo base model's prose, fetched and unpacked."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path


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


def files_of(source: Source, root: Path) -> list[Path]:
    """The files of one source, in an order that does not depend on the file system."""
    found: dict[str, Path] = {}
    for pattern in source.globs:
        for path in root.glob(pattern):
            if path.is_file() and not path.is_symlink() and not SKIPPED_NAMES.search(str(path)):
                found.setdefault(str(path.relative_to(root)), path)
    return [found[key] for key in sorted(found)]
