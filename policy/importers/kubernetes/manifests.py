"""Kubernetes manifests: every object of a set of YAML and JSON files, lists unpacked, with positions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import yaml

from policy.importers.model import Files, Source, SourceRefused
from policy.program import Where

_BASE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class Object:
    """One object. `namespace` is ``default`` where none is written (it means nothing for cluster-scoped kinds)."""

    kind: str
    group: str  # API group without version
    name: str
    namespace: str
    body: dict[str, Any]
    file: str

    def __str__(self) -> str:
        return f"{self.file}: {self.kind} {self.namespace}/{self.name}"


class _Loader(_BASE):  # type: ignore[misc]  # the base is chosen at run time
    """Safe YAML, with dates left as text, and the place of each map and list remembered."""

    file = ""
    source: Source

    def place(self, node: Any, value: Any) -> None:
        mark = node.start_mark
        self.source.mark(value, Where(self.file, mark.line + 1, mark.column + 1))

    def map(self, node: Any) -> Iterator[dict[Any, Any]]:
        value: dict[Any, Any] = {}
        self.place(node, value)
        yield value
        value.update(self.construct_mapping(node))

    def list(self, node: Any) -> Iterator[list[Any]]:
        value: list[Any] = []
        self.place(node, value)
        yield value
        value.extend(self.construct_sequence(node))


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.map)
_Loader.add_constructor("tag:yaml.org,2002:seq", _Loader.list)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _BASE.construct_yaml_str)
MAX_VALUES: Final = 1_000_000  # of one document, aliases expanded
_CORE: Final = frozenset({"List"})


def read_objects(files: Files, source: Source, notes: list[str]) -> list[Object]:
    """Every object in file order. Raises SourceRefused for text that is no YAML or JSON."""
    out: list[Object] = []
    for file, text in files.items():
        for document in _documents(file, text, source):
            out += _objects(document, file, notes)
    return out


def _documents(file: str, text: str, source: Source) -> list[Any]:
    if file.endswith(".json"):
        try:
            return [json.loads(text)]
        except (ValueError, RecursionError) as error:
            raise SourceRefused("syntax", f"not valid JSON: {error}", where=file) from None
    loader = _Loader(text)
    loader.file, loader.source = file, source
    out = []
    try:
        while loader.check_data():
            out.append(loader.get_data())
            if "*" in text and "&" in text:
                _bounded(out[-1], file)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise SourceRefused("syntax", f"not valid YAML: {problem}", where=where) from None
    except (RecursionError, ValueError, TypeError) as error:
        raise SourceRefused("syntax", f"not valid YAML: {error or 'nested too deeply'}", where=file) from None
    finally:
        loader.dispose()
    return out


def _bounded(document: Any, file: str) -> None:
    """Aliases must not multiply a small file beyond reason. Raises SourceRefused."""
    left, count = [document], 0
    while left:
        one = left.pop()
        count += 1
        if count > MAX_VALUES:
            raise SourceRefused("syntax", "its aliases expand to too much", where=file)
        left.extend(one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())


def _objects(
    document: Any, file: str, notes: list[str], kind: str = "", version: str = ""
) -> Iterator[Object]:
    if document is None:
        return
    if not isinstance(document, dict):
        notes.append(f"{file}: a document that is no Kubernetes object is left out")
        return
    kind = document.get("kind") or kind
    version = document.get("apiVersion") or version
    if isinstance(kind, str) and kind.endswith("List") and isinstance(document.get("items"), list):
        item_kind = "" if kind in _CORE else kind.removesuffix("List")
        for item in document["items"]:
            yield from _objects(item, file, notes, item_kind, "" if kind in _CORE else version)
        return
    metadata = document.get("metadata")
    if not isinstance(kind, str) or not kind or not isinstance(metadata, dict):
        notes.append(f"{file}: a document that is no Kubernetes object is left out")
        return
    group = str(version).rpartition("/")[0]
    name, namespace = metadata.get("name", ""), metadata.get("namespace") or "default"
    if not isinstance(name, str) or not isinstance(namespace, str):
        raise SourceRefused("name", f"the name of a {kind} must be a string", where=file)
    yield Object(kind, group, name, namespace, document, file)
