"""The text to train on: its files are found, cut into words, and the words numbered."""

import functools
import hashlib
import itertools
import os
import re
import sysconfig
import unicodedata
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SPACE = re.compile(r"\s")
# So many characters are cut into words at a time, since each word is a Python string meanwhile.
BLOCK = 1 << 20
# A file with a larger share of undecodable characters is not text in UTF-8.
MOST_UNDECODABLE = 0.1
# A word enters the vocabulary if it occurs this often.
MINIMUM_COUNT = 2
# A text is worth training on if it has this many words and different words.
MINIMUM_WORDS, MINIMUM_VOCABULARY = 500, 20
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


@dataclass(frozen=True, eq=False)
class Corpus:
    """Numbered text.

    words: the vocabulary, most frequent first; a word's number is its place here.
    counts: int64 [vocabulary], how often each occurs.
    stream: int32, the numbers of the text's words in order, and -1 between two files.
    """

    words: list[str]
    counts: np.ndarray
    stream: np.ndarray

    def digest(self) -> str:
        """A checksum of all that training sees of the text."""
        checksum = hashlib.sha256("\n".join(self.words).encode())
        checksum.update(np.ascontiguousarray(self.stream, "<i4").data)
        return checksum.hexdigest()


@functools.cache
def word_pattern() -> re.Pattern[str]:
    """A pattern of words: letters of any script with their marks, parted by all else, also digits and _.

    Marks are vowels in many scripts. ``re`` has no name for them, so they are looked up among the characters
    of the first two planes of Unicode. Joiners may stand within words too.
    """
    marks = "".join(c for c in map(chr, range(0x20000)) if unicodedata.category(c).startswith("M"))
    return re.compile(rf"(?:[^\W\d_]+[{marks}\u200c\u200d]*)+")


def default_files() -> list[Path]:
    """The Python source files of the running interpreter's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [path for path in _files_below(root, SKIPPED_FOLDERS) if path.suffix == ".py"]


def texts(paths: Iterable[Path], passed_over: Container[Path] = ()) -> Iterator[str]:
    """The texts of files, and of all files below folders but for ``passed_over``, in sorted order.

    Raises:
        OSError: a path can't be read.
        ValueError: a file named itself is binary; below a folder, binary files are passed over.
    """
    for path in paths:
        if path.is_dir():
            found = (
                read_text(below) for below in _files_below(path.resolve(), set()) if below not in passed_over
            )
            yield from (text for text in found if text is not None)
        else:
            text = read_text(path)
            if text is None:
                raise ValueError(f"{path} is binary: expected text in UTF-8")
            yield text


def _files_below(root: Path, skipped: set[str]) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - skipped)
        for path in (Path(folder, name) for name in sorted(files)):
            if path.is_file():  # Sockets, pipes and broken links are passed over.
                yield path


def read_text(path: Path) -> str | None:
    """The text of a file, or None if it is binary: it holds NUL, or too much that is not UTF-8."""
    data = path.read_bytes()
    if b"\0" in data:
        return None
    text = data.decode("utf-8", "replace")
    if text.count("\N{REPLACEMENT CHARACTER}") > MOST_UNDECODABLE * len(text):
        return None
    return text


def words_of(text: str) -> Iterator[list[str]]:
    """The words of ``text`` in lower case, in blocks."""
    start = 0
    while start < len(text):
        space = SPACE.search(text, start + BLOCK)
        end = space.start() if space else len(text)
        # Characters are composed, so that a word is the same however its letters' marks were written.
        yield word_pattern().findall(unicodedata.normalize("NFC", text[start:end].lower()))
        start = end


def build(parts: Iterable[str], vocabulary: int) -> Corpus:
    """Number the words of texts. Only the ``vocabulary`` most frequent words are kept.

    Raises:
        ValueError: there is too little text.
    """
    # Words are first numbered in the order in which they occur.
    numbers: defaultdict[str, int] = defaultdict(itertools.count().__next__)
    pieces = []
    for text in parts:
        for block in words_of(text):
            pieces.append(np.fromiter(map(numbers.__getitem__, block), np.int32, len(block)))
        pieces.append(np.full(1, -1, np.int32))
    stream = np.concatenate([np.empty(0, np.int32), *pieces])
    found = stream[stream >= 0]
    if found.size < MINIMUM_WORDS:
        raise ValueError(f"the text has {found.size} words: expected at least {MINIMUM_WORDS} to train on")

    counts = np.bincount(found)
    names = list(numbers)
    kept = sorted(np.flatnonzero(counts >= MINIMUM_COUNT), key=lambda i: (-counts[i], names[i]))[:vocabulary]
    if len(kept) < MINIMUM_VOCABULARY:
        raise ValueError(
            f"the text has {len(kept)} different words that occur {MINIMUM_COUNT} times or more and are in "
            f"the vocabulary: expected at least {MINIMUM_VOCABULARY} to train on"
        )
    dropped = -2
    renumbered = np.full(counts.size + 1, dropped, np.int32)
    renumbered[kept] = np.arange(len(kept))
    renumbered[-1] = -1  # The number between files, -1, is itself the index of the last element.
    stream = renumbered[stream]
    return Corpus([names[i] for i in kept], counts[kept], stream[stream != dropped])
