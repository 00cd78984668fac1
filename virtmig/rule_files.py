"""Rules for domain XML and their grammar, read from files: domain/ itself does no input or output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from virtmig.domain.document import MAX_XML_BYTES
from virtmig.domain.rules import Rules, rules_from_texts
from virtmig.errors import RequestError

#: where an administrator puts rules; it need not be there
RULES_FOLDER = Path("/etc/virtmig/rules.d")


def read_rules(paths: Iterable[Path] | None = None) -> Rules:
    """The rules of files and of folders (their *.xml by name), in order; those of RULES_FOLDER when `paths` is None.

    Raises RequestError for what cannot be read, DomainXmlError (file, line, rule) for what does not fit the grammar.
    """
    texts: dict[str, str] = {}
    if paths is None:
        paths = [RULES_FOLDER] if RULES_FOLDER.is_dir() else []
    for path in paths:
        for file in _files(path):
            texts[str(file)] = _read(file)
    return rules_from_texts(texts, grammar()) if texts else Rules()


def grammar() -> str:
    """xml/virtmig-rules.rng, in a checkout or in an installed package."""
    package = Path(__file__).parent
    for folder in (package.parent / "xml", package / "_xml"):
        if (folder / "virtmig-rules.rng").is_file():
            return _read(folder / "virtmig-rules.rng")
    raise RequestError("virtmig-rules.rng is missing", hint="run from a checkout, or install the package anew")


def _files(path: Path) -> Sequence[Path]:
    try:
        return sorted(path.glob("*.xml")) if path.is_dir() else [path]
    except OSError as error:
        raise RequestError(f"cannot list {path}: {error.strerror}") from None


def _read(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_XML_BYTES + 1)
        return raw.decode()
    except OSError as error:
        raise RequestError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"cannot read {file}: byte {error.start} is not UTF-8") from None
