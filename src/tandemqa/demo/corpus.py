"""The "Ask Python" corpus: the documentation that the running interpreter carries with itself.

Two sources, no file and no network: the docstrings of the standard library (``str.partition``,
``pathlib.Path.glob``), and the sections of the language reference that ``help("try")`` prints
(``topics/try/except-clause``). The same interpreter always gives the same passages in the same order.
"""

from __future__ import annotations

import builtins
import csv
import hashlib
import importlib
import inspect
import io
import json
import re
import subprocess
import sys
import sysconfig
import threading
import types
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tandemqa.data.dataset import Passage

_MODULE_NAMES = """
    builtins abc argparse array ast asyncio atexit base64 bdb binascii bisect bz2 calendar cmath cmd code
    codecs collections collections.abc colorsys compileall concurrent.futures configparser contextlib
    contextvars copy copyreg cProfile csv ctypes ctypes.util dataclasses datetime dbm decimal difflib dis
    doctest email email.header email.headerregistry email.message email.mime.text email.mime.multipart
    email.parser email.policy email.utils enum errno faulthandler fcntl filecmp fileinput fnmatch fractions
    ftplib functools gc getopt getpass gettext glob graphlib grp gzip hashlib heapq hmac html html.parser
    http http.client http.cookiejar http.cookies http.server imaplib importlib importlib.abc
    importlib.machinery importlib.metadata importlib.resources importlib.util inspect io ipaddress itertools
    json keyword linecache locale logging logging.config logging.handlers lzma mailbox marshal math mimetypes
    mmap modulefinder multiprocessing multiprocessing.pool multiprocessing.shared_memory netrc numbers
    operator optparse os os.path pathlib pdb pickle pickletools pkgutil platform plistlib poplib pprint
    profile pstats pty pwd py_compile pyclbr queue quopri random re reprlib resource runpy sched secrets
    select selectors shelve shlex shutil signal smtplib socket socketserver sqlite3 ssl stat statistics
    string struct subprocess symtable sys sysconfig tarfile tempfile textwrap threading time timeit tokenize
    tomllib trace traceback tracemalloc tty types typing unicodedata unittest unittest.mock urllib.error
    urllib.parse urllib.request urllib.robotparser uuid venv warnings wave weakref webbrowser
    wsgiref.simple_server wsgiref.util xml.dom.minidom xml.etree.ElementTree xml.sax xmlrpc.client
    xmlrpc.server zipapp zipfile zipimport zlib zoneinfo
"""
MODULES = tuple(_MODULE_NAMES.split())

# What these functions return has documented methods but no public class: they go by the function's name.
FACTORY_TYPES: dict[str, type] = {
    "csv.reader": type(csv.reader([])),
    "csv.writer": type(csv.writer(io.StringIO())),
    "hashlib.sha256": type(hashlib.sha256()),
    "threading.Lock": type(threading.Lock()),
    "threading.RLock": type(threading.RLock()),
    "zlib.compressobj": type(zlib.compressobj()),
    "zlib.decompressobj": type(zlib.decompressobj()),
}
HIDDEN = {"socket.SocketType"}  # the C half of socket.socket

DOC_WORDS = 150  # a longer docstring is cut
SECTION_WORDS, PART_WORDS = 120, 95  # a longer section is split, into parts of about this size
PARAGRAPH_WORDS = 150  # a longer paragraph is split as well
INDENT_PENALTY = 1500.0  # of a part that begins in the middle of an item: as bad as 39 words too many
MIN_DOC_WORDS, MIN_SECTION_WORDS = 4, 8

_PARAGRAPH_END = re.compile(r"\n(?:[ \t]*\n)+")
_SENTENCE_END = re.compile(r"(?<!\be\.g\.)(?<!\bi\.e\.)(?<=[.!?])\s+(?=[\"'`(*]?[A-Z])")
_SIGNATURE = re.compile(r"[\w.]+\(.*\)(?: ?-> ?[\w. ]{1,30})?")
_CALL = re.compile(r"[\w.]+\([^)]*\) ?(?:-> ?[\w. ]{1,30}(?:[,.:]|--)|->|--|:) *")
_HEADING = re.compile(r"^(?:(\S.*)\n([*=\-^~])\2{2,}|-\[ (Footnotes) \]-)$", re.MULTILINE)
_TABLE = re.compile(r"^ *\+-[-+]+\+\n(?: *[+|].*[+|](?:\n|\Z))+", re.MULTILINE)


def clean_passages() -> list[Passage]:
    """`build_passages` in an interpreter of its own: this one may have imported libraries that add methods of theirs
    to the standard library's classes (transformers does, to `logging.Logger`)."""
    command = [sys.executable, "-P", "-m", "tandemqa.demo.corpus"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return [Passage(*fields) for fields in json.loads(output)]


def build_passages() -> list[Passage]:
    """All passages: the docstrings in alphabetical order, then the sections of the language reference."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # to look at a deprecated name is not to use it
        docstrings = [Passage(e.name, e.name, e.text()) for e in _documented()]
    return docstrings + list(_sections())


def weak_pairs(passages: list[Passage]) -> list[tuple[str, str, str]]:
    """(pseudo-question, passage id, the passage's text without it) for docstrings of summary and body.

    A docstring's first sentence says what the thing is for, much as a question does; its body then has to
    be found from it without the help of the very same words.
    """
    pairs: list[tuple[str, str, str]] = []
    for passage in passages:
        paragraphs = passage.text.split("\n\n")
        signed = len(paragraphs) > 1 and _SIGNATURE.fullmatch(paragraphs[0])
        signature = [paragraphs.pop(0)] if signed else []
        summary, *more = _SENTENCE_END.split(paragraphs[0], maxsplit=1)
        summary = _CALL.sub("", summary, count=1).rstrip(".:")
        body = "\n\n".join(more + paragraphs[1:])
        if (
            not passage.id.startswith("topics/")
            and 4 <= _words(summary) <= 20
            and _words(body) >= 12
            and summary not in body
            and "=" not in summary  # a signature in the place of a sentence
        ):
            pairs.append((summary, passage.id, "\n\n".join([*signature, body])))
    return pairs


@dataclass(frozen=True)
class _Entry:
    """A documented object under one of the names by which it can be reached."""

    name: str
    value: object
    doc: str
    builtin: bool
    alias: bool  # whether the object, or its class, has another name of its own
    depth: int = 0  # how far up the bases of the class the definition stands

    @property
    def last_name(self) -> str:
        return self.name.rpartition(".")[2]

    def by_length(self) -> tuple[bool, int, str]:
        return not self.builtin, len(self.name), self.name

    def by_origin(self) -> tuple[bool, int, bool, int, str]:
        """Order among the names of one object: its own before an alias (OSError before IOError)."""
        return not self.builtin, self.depth, self.alias, len(self.name), self.name

    def text(self) -> str:
        """The docstring under the signature, unless it begins with one itself."""
        signed = re.match(rf"([\w.]+\.)?{self.last_name} ?\(", self.doc)
        return self.doc if signed else "\n\n".join([*_signature(self.last_name, self.value), self.doc])


def _documented() -> list[_Entry]:
    """Every documented public object once, under its best name; equal docstrings under the shortest name."""
    by_object: dict[int, _Entry] = {}
    for entry in sorted(filter(lambda entry: entry.doc, _entries()), key=_Entry.by_origin):
        by_object.setdefault(id(getattr(entry.value, "__func__", entry.value)), entry)
    by_text: dict[str, _Entry] = {}
    for entry in sorted(by_object.values(), key=_Entry.by_length):
        by_text.setdefault(entry.doc, entry)
    return sorted(by_text.values(), key=lambda entry: entry.name)


def _entries() -> Iterator[_Entry]:
    """Every public name of the modules, and of their classes, that has a docstring of its own."""
    public = {name: value for module in MODULES for name, value in _module_members(module)}
    classes = {value for value in public.values() if isinstance(value, type)}
    for name, value in (public | FACTORY_TYPES).items():
        builtin = name in vars(builtins)
        alias = getattr(value, "__name__", None) != name.rpartition(".")[2]
        if name in public:
            yield _Entry(name, public[name], _doc(public[name]), builtin, alias)
        if isinstance(value, type):
            for member, depth, base in _class_members(value):
                # A base that nobody can name lends its methods to the class (argparse._ActionsContainer).
                if not depth or base not in classes:
                    definition = getattr(vars(base)[member], "__func__", vars(base)[member])
                    renamed = alias or getattr(definition, "__name__", member) != member
                    yield _Entry(f"{name}.{member}", definition, _doc(definition), builtin, renamed, depth)


def _class_members(cls: type) -> Iterator[tuple[str, int, type]]:
    """(name, depth of the definition, class of the definition) of the class's public members."""
    seen: set[str] = set()
    for depth, base in enumerate(cls.__mro__[:-1]):
        for name in sorted(vars(base).keys() - seen):
            if not name.startswith("_") and not isinstance(vars(base)[name], type):
                yield name, depth, base
        seen.update(vars(base))


def _module_members(module_name: str) -> Iterator[tuple[str, object]]:
    """(qualified name, object) for what a module exports, or defines if it does not say what it exports."""
    try:
        module = importlib.import_module(module_name)
    except ImportError:  # not on this platform, or not in this version
        return
    exported = getattr(module, "__all__", None)
    for name in sorted(set(exported or dir(module))):
        value = getattr(module, name, None)
        full_name = name if module is builtins else f"{module_name}.{name}"
        if name.startswith("_") or isinstance(value, types.ModuleType) or full_name in HIDDEN:
            continue
        home = getattr(value, "__module__", None) or module_name
        same_package = home.partition(".")[0].lstrip("_") == module_name.partition(".")[0]
        if exported or same_package or module is builtins:  # "same": the C half of ssl is _ssl
            yield full_name, value


def _doc(value: object) -> str:
    """The object's docstring cut to size; "" if it has none, only its type's, or one that code wrote."""
    doc = getattr(value, "__doc__", None)
    if isinstance(value, type) and not doc and isinstance(vars(value).get("__init__"), types.FunctionType):
        doc = vars(value)["__init__"].__doc__
    inherited = doc == type(value).__doc__ and value is not type
    if not isinstance(doc, str) or inherited or len(doc.split()) < MIN_DOC_WORDS:
        return ""
    generated = r"\w+\([^)]*\)( -> .*)?" if isinstance(value, type) else r"Alias for field number \d+"
    if re.fullmatch(generated, doc):
        return ""
    return _cut([" ".join(paragraph.split()) for paragraph in _PARAGRAPH_END.split(inspect.cleandoc(doc))])


def _signature(name: str, value: Any) -> list[str]:
    """["name(parameters)"] without annotations, or [] for what has no signature to inspect."""
    try:
        signature = inspect.signature(value)
    except (AttributeError, TypeError, ValueError):
        return []
    bare = [
        p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else _Default(p.default))
        for p in signature.parameters.values()
    ]
    return [f"{name}{signature.replace(parameters=bare, return_annotation=signature.empty)}"]


class _Default:
    """A default value that prints the same in every process: no address, no path, no virtual environment."""

    def __init__(self, value: object) -> None:
        if isinstance(value, Enum):
            self.shown = str(value)
        elif isinstance(value, str) and (Path(value).is_absolute() or value in sysconfig.get_scheme_names()):
            self.shown = "..."
        elif value is None or isinstance(value, (int, float, str, bytes)) or value == ():
            self.shown = repr(value)
        else:
            self.shown = str(getattr(value, "__name__", "..."))

    def __repr__(self) -> str:
        return self.shown


def _cut(paragraphs: list[str]) -> str:
    """The paragraphs as far as they fit into DOC_WORDS, cut after a sentence."""
    kept: list[str] = []
    room = DOC_WORDS
    for paragraph in paragraphs:
        sentences = _SENTENCE_END.split(paragraph)
        sizes = accumulate(map(_words, sentences))
        fitting = [sentence for sentence, size in zip(sentences, sizes, strict=True) if size <= room]
        kept += [" ".join(fitting)] if fitting else []
        if len(fitting) < len(sentences):
            break
        room -= _words(paragraph)
    return "\n\n".join(kept) or " ".join(paragraphs[0].split()[:DOC_WORDS])


def _sections() -> Iterator[Passage]:
    """The sections of the language reference, each once: topics include one another (try, compound)."""
    seen: set[str] = set()
    for topic in sorted(topics, key=lambda t: (len(topics[t].split()), len(t), t)):  # the most specific first
        text = topics[topic]
        headings = list(_HEADING.finditer(text))
        ids: set[str] = set()
        for number, heading in enumerate(headings):
            end = headings[number + 1].start() if number + 1 < len(headings) else len(text)
            body = text[heading.end() : end]
            key = " ".join(body.split())
            if _words(body) < MIN_SECTION_WORDS or key in seen:
                continue
            seen.add(key)
            title = _readable(heading[1] or heading[3])
            section_id = f"topics/{topic}/{_slug(heading[1] or heading[3])}"
            section_id += "-2" * (section_id in ids)
            ids.add(section_id)
            if number:
                title = f"{_readable(headings[0][1])}: {title}"
            for part, part_text in enumerate(_parts(body), start=1):
                suffix = f"/{part}" if part > 1 else ""
                yield Passage(section_id + suffix, title + (f" ({part})" if part > 1 else ""), part_text)


def _readable(heading: str) -> str:
    return re.sub(r"\*(\w+)\*", r"\1", heading).replace('"', "")


def _slug(heading: str) -> str:
    return re.sub(r"[\W_]+", "-", heading.replace('*"', "-star").lower()).strip("-")


def _parts(body: str) -> list[str]:
    """The section in parts: code stays with its sentence, the first paragraph of an item with its head."""
    units: list[str] = []
    indent = 0
    for paragraph in _PARAGRAPH_END.split(_TABLE.sub(_table_rows, body).strip("\n")):
        previous, indent = indent, len(paragraph) - len(paragraph.lstrip())
        if units and indent > previous:
            units[-1] += f"\n\n{paragraph}"
        elif _words(paragraph) > PARAGRAPH_WORDS and "::=" not in paragraph:
            units += _pack(_SENTENCE_END.split(paragraph), " ")
        else:
            units.append(paragraph)
    return _pack(units, "\n\n") if _words(body) > SECTION_WORDS else ["\n\n".join(units)]


def _pack(units: list[str], joint: str) -> list[str]:
    """Units joined into parts of about PART_WORDS that begin, if possible, with an unindented unit."""
    sizes = [0, *accumulate(map(_words, units))]
    best: list[tuple[float, list[str]]] = [(0.0, [])]  # for every number of units: (cost, parts)
    for end in range(1, len(units) + 1):
        options: list[tuple[float, list[str]]] = []
        for start, (cost, parts) in enumerate(best):
            cost += (sizes[end] - sizes[start] - PART_WORDS) ** 2 + INDENT_PENALTY * units[start].startswith(" ")
            options.append((cost, [*parts, joint.join(units[start:end])]))
        best.append(min(options))
    return best[-1][1]


def _table_rows(table: re.Match[str]) -> str:
    """An ASCII-art table with its rules and bars removed: one paragraph a row."""
    rule, *lines = table[0].splitlines()
    edges = [column for column, char in enumerate(rule) if char == "+"]
    rows: list[list[str]] = [[""] * (len(edges) - 1)]
    for line in lines:
        if re.match(r" *(\+-|\|=)", line):
            rows.append([""] * (len(edges) - 1))
        else:
            cells = [line[left + 1 : right].strip() for left, right in pairwise(edges)]
            rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
    return "".join(" " * edges[0] + "  ".join(filter(None, row)) + "\n\n" for row in rows if any(row))


def _words(text: str) -> int:
    return len(re.findall(r"\w+", text))


if __name__ == "__main__":
    json.dump(build_passages(), sys.stdout)
