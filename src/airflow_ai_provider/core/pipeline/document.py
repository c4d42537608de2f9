"""Read a YAML text into plain data, with the line of every key.

Invariants: a key written twice is a fault, not the last one winning; only plain values come out (no tags that build
objects); every fault says its line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

_FAST: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
Location = tuple[str | int, ...]
Fault = tuple[Location, str]


class DocumentError(ValueError):
    """The text is no YAML that can be read; carries ``(line, message)`` of each fault. Never leaves this package."""

    def __init__(self, faults: list[tuple[int, str]]) -> None:
        super().__init__("; ".join(f"line {line}: {text}" for line, text in faults))
        self.faults = faults


@dataclass(frozen=True)
class Document:
    """Plain data, and where each piece of it is written.

    :param data: mappings, lists, texts, numbers, dates, None.
    :param lines: location → line number, from 1.
    """

    data: Any
    lines: Mapping[Location, int]

    def line_of(self, location: Location) -> int:
        """Return the line of a location, or of the nearest thing around it that is written."""
        while location not in self.lines and location:
            location = location[:-1]
        return self.lines.get(location, 1)


def read_document(text: str) -> Document:
    """Read one YAML document.

    :param text: the file's text.
    :raises DocumentError: on text that is no YAML, several documents, a key written twice.
    """
    try:
        return _read(text, _FAST)
    except yaml.YAMLError:
        # libyaml is ten times faster and says less about what is wrong
        return _read(text, yaml.SafeLoader)


def _read(text: str, kind: Any) -> Document:
    try:
        loader = kind(text)
        node = loader.get_single_node()
        lines: dict[Location, int] = {}
        faults: list[tuple[int, str]] = []
        if node is not None:
            _walk(node, (), lines, faults, set())
        if faults:
            raise DocumentError(faults)
        return Document(None if node is None else loader.construct_document(node), lines)
    except yaml.YAMLError as error:
        if kind is _FAST and _FAST is not yaml.SafeLoader:
            raise
        raise _told(text, error) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, DocumentError):
            raise
        raise DocumentError([(1, f"cannot be read: {error}")]) from error


def _told(text: str, error: yaml.YAMLError) -> DocumentError:
    if isinstance(error, yaml.reader.ReaderError):
        line = text[: error.position].count("\n") + 1
        return DocumentError([(line, f"character {error.character!r} may not stand in YAML")])
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        return DocumentError([(mark.line + 1 if mark else 1, _explain(error))])
    return DocumentError([(1, f"cannot be read: {error}")])


def _walk(
    node: yaml.Node, location: Location, lines: dict[Location, int], faults: list[tuple[int, str]], seen: set[int]
) -> None:
    lines.setdefault(location, node.start_mark.line + 1)
    if id(node) in seen:  # an alias: walked where its anchor stands
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*location, index), lines, faults, seen)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in first and name != "<<":
                faults.append((line, f"key {name!r} is written twice, first in line {first[name]}. Keep one of them"))
            first.setdefault(name, line)
            lines[(*location, name)] = line
            _walk(value, (*location, name), lines, faults, seen)


def _explain(error: yaml.MarkedYAMLError) -> str:
    problem = str(error.problem or error.context or "cannot be read")
    if "\\t" in problem or "'\t'" in problem:
        return "a tab stands where only spaces may. Indent with spaces"
    if "expected a single document" in (error.context or ""):
        return "a second document starts here. One file is one pipeline: write the other into a file of its own"
    if "could not determine a constructor" in problem:
        return f"{problem.rpartition(' ')[2]} builds an object. Only plain values are read"
    context = f" ({error.context})" if error.context and error.context != problem else ""
    return f"this is not YAML: {problem}{context}"
