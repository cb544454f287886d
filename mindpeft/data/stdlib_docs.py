"""The data set of the quickstart: which topic a piece of Python's standard library belongs to.

Built at run time from the running Python, so there is nothing to download. A text is the first sentence of a
docstring, its label the topic of the module, after the chapters of the Python library reference.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator

from mindpeft.data.docstrings import extension_docstrings, first_sentence, source_docstrings
from mindpeft.data.readers import Row, Table
from mindpeft.errors import InputError

# topic -> (modules with source, extension modules); a module that a Python version lacks is passed over
TOPICS = {
    "networking": (
        "socket ssl selectors socketserver http urllib ftplib poplib imaplib smtplib ipaddress xmlrpc "
        "wsgiref",
        "_socket _ssl select",
    ),
    "concurrency": (
        "asyncio threading multiprocessing concurrent subprocess queue sched",
        "_thread _asyncio _queue",
    ),
    "internet data": ("email mailbox mimetypes base64 quopri json", "binascii _json"),
    "markup": ("html xml", "pyexpat"),
    "compression": ("gzip bz2 lzma zipfile tarfile _compression", "zlib _bz2 _lzma"),
    "file access": (
        "pathlib posixpath genericpath ntpath fileinput stat filecmp tempfile glob fnmatch linecache shutil",
        "",
    ),
    "persistence": (
        "pickle pickletools copyreg shelve dbm sqlite3 csv configparser tomllib netrc plistlib",
        "marshal _pickle _sqlite3 _csv",
    ),
    "cryptography": ("hashlib hmac secrets", "_hashlib _blake2 _sha3 _sha1 _sha2 _sha256 _sha512 _md5"),
    "numeric": ("numbers _pydecimal fractions random statistics", "math cmath _random"),
    "data types": (
        "datetime _pydatetime zoneinfo calendar _strptime collections heapq bisect weakref",
        "array _collections _datetime _heapq _bisect time",
    ),
    "text processing": ("string re difflib textwrap stringprep codecs", "unicodedata _codecs"),
    "operating system": ("os platform ctypes", "posix resource pwd grp fcntl termios"),
    "logging": ("logging warnings", ""),
    "development tools": (
        "unittest doctest pydoc bdb pdb timeit trace tracemalloc cProfile profile pstats traceback",
        "_tracemalloc",
    ),
    "importing": (
        "importlib pkgutil modulefinder runpy",
        "zipimport _frozen_importlib _frozen_importlib_external",
    ),
}
HELD_OUT = 5  # one docstring in five
FEWEST = 1000  # a complete Python gives about four times as many


def load_stdlib_docs() -> tuple[Table, Table]:
    """Build the data set, the same at every call of one Python version.

    What occurs under two topics is left out, and what several docstrings say counts once. A docstring's hash
    decides on which side it is.

    Returns:
        The rows to train on and the held-out rows, with columns ``text`` and ``label``.

    Raises:
        InputError: this Python comes without the sources of its standard library.
    """
    found = {topic: _distinct_sentences(_docstrings(topic)) for topic in TOPICS}
    owners = Counter(key for sentences in found.values() for key in sentences)
    sides: tuple[list[Row], list[Row]] = ([], [])
    for topic, sentences in found.items():
        for key, (sentence, digest) in sentences.items():
            if owners[key] == 1:
                rows = sides[digest % HELD_OUT == 0]
                rows.append(Row(len(rows) + 1, {"text": sentence, "label": topic}))
    if sum(map(len, sides)) < FEWEST:
        raise InputError("this Python has no sources of its standard library to build the data set from")
    train, test = (Table("standard library docstrings", ("text", "label"), rows) for rows in sides)
    return train, test


def _docstrings(topic: str) -> Iterator[str]:
    with_source, extensions = TOPICS[topic]
    for module in with_source.split():
        yield from source_docstrings(module)
    for module in extensions.split():
        yield from extension_docstrings(module)


def _distinct_sentences(docstrings: Iterator[str]) -> dict[str, tuple[str, int]]:
    """What a sentence says, without case and punctuation -> (sentence, hash of its docstring)."""
    hashed = ((int(hashlib.sha256(text.encode()).hexdigest(), 16), text) for text in docstrings)
    found: dict[str, tuple[str, int]] = {}
    for digest, docstring in sorted(hashed):
        sentence = first_sentence(docstring)
        if sentence is not None:
            found.setdefault(" ".join(re.findall(r"\w+", sentence.lower())), (sentence, digest))
    return found
