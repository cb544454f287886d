"""Docstrings of the running Python's standard library, and the sentence that each begins with.

Source files are parsed, never run; extension modules, which have no source, are imported as the caller names
them. Needs nothing but the standard library.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {"test", "tests", "__pycache__", "_bundled"}
SENTENCE_END = re.compile(r"(?<! e\.g\.)(?<! i\.e\.)(?<=[.!?])\s+(?=[A-Z])")
SIGNATURE = re.compile(r"\W*[\w.]+\([^)]*\)\s*(->[^\n]*|:|--|\n|$)")
NO_PROSE = re.compile(r"->|==|::|>>>|\.\.\.|https?:|[{}<>\\|@]|__\w+__|\w=\w|\s[-=*+/]\s|:$")
WORDS = range(4, 41)


def source_docstrings(module: str) -> Iterator[str]:
    """The docstrings of a module's source file, or of all files of a package; none if there is no source."""
    root = Path(sysconfig.get_path("stdlib"), *module.split("."))
    files = sorted(root.rglob("*.py")) if root.is_dir() else [root.with_suffix(".py")]
    for file in files:
        if file.is_file() and SKIPPED_FOLDERS.isdisjoint(file.relative_to(root.parent).parts):
            yield from _docstrings_of_file(file)


def _docstrings_of_file(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_bytes(), filename=str(file))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def extension_docstrings(module: str) -> Iterator[str]:
    """The docstrings of an extension module, its functions, classes and methods; none if it is absent."""
    if module not in sys.stdlib_module_names:
        return
    try:
        loaded = importlib.import_module(module)
    except ImportError:  # an optional part of Python that this build lacks
        return
    members = [value for value in _members(loaded) if inspect.isroutine(value) or inspect.isclass(value)]
    methods = [value for owner in members if inspect.isclass(owner) for value in _members(owner)]
    for thing in [loaded, *members, *methods]:
        own = inspect.ismodule(thing) or callable(thing) or inspect.isdatadescriptor(thing)
        docstring = inspect.getdoc(thing) if own else None  # a constant's would be that of its type
        if docstring:
            yield docstring


def _members(owner: object) -> list[object]:
    """The attributes that ``owner`` itself holds, by name, without special methods."""
    return [value for name, value in sorted(vars(owner).items()) if not name.startswith("__")]


def first_sentence(docstring: str) -> str | None:
    """The sentence with which a docstring begins: it says what the thing is for.

    Returns None if that is no clean prose: a fragment, a signature without a text, code, a list.
    """
    signature = SIGNATURE.match(docstring)
    text = docstring[signature.end() :].strip() if signature else docstring
    paragraph = re.split(r"\n\s*\n", text, maxsplit=1)[0]
    sentence = SENTENCE_END.split(" ".join(paragraph.split()))[0]
    return sentence if _is_clean(sentence) else None


def _is_clean(sentence: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in sentence)
    return (
        len(sentence.split()) in WORDS
        and sentence[0].isupper()
        and letters / len(sentence) > 0.85
        and NO_PROSE.search(sentence) is None
    )
