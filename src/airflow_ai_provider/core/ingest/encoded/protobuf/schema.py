"""A registry's Protobuf schema → message classes, made at run time: nothing is generated beforehand.

A schema is ``.proto`` text, or (Confluent's Python client registers it so, and some registries hand it out as it came)
a compiled descriptor in base64.

Invariants: text is compiled by protoc (of grpcio-tools) in a process of its own with a deadline, once per schema; a
schema's types live in a pool of their own, so two schemas may define the same name; imports come from the registry's
references and protoc's own well-known types, never from this machine's files.
"""

from __future__ import annotations

import base64
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from airflow_ai_provider.core.ingest.encoded.wire import SchemaUnusableError
from airflow_ai_provider.errors import MissingExtraError

_MAIN = "schema_of_this_topic.proto"
_DEADLINE_S = 30
_MAX_TEXT = 4 * 1024 * 1024


class ProtoFile:
    """One compiled schema.

    :param text: the ``.proto`` text, or a base64 descriptor.
    :param references: import name → the same of the files it imports, each after those it imports itself.
    :raises SchemaUnusableError: when protoc refuses it, with protoc's words.
    :raises MissingExtraError: when protoc is not installed; a retry does not help.
    """

    def __init__(self, text: str, references: Mapping[str, str]) -> None:
        files = _compiled({**references, _MAIN: text}) or _compile(text, references)
        pool = descriptor_pool.DescriptorPool()
        try:
            for file in files.file:
                pool.AddSerializedFile(file.SerializeToString())
            self._file = pool.FindFileByName(_MAIN)
        except (TypeError, KeyError) as error:
            raise SchemaUnusableError(f"its descriptor cannot be used: {error}") from error
        self._proto = next(file for file in files.file if file.name == _MAIN)

    def at(self, path: Sequence[int]) -> Any:
        """Return the class of the message that an index path names: its place in the file, then within the message.

        :raises SchemaUnusableError: when there is none there.
        """
        messages: Any = self._proto.message_type
        names = [self._proto.package] if self._proto.package else []
        for index in path:
            if not 0 <= index < len(messages):
                shown = "/".join(map(str, path))
                raise SchemaUnusableError(f"it has no message at {shown}", code="broken_protobuf")
            own = [message for message in messages if not message.options.map_entry]
            if index >= len(own) or own[index] is not messages[index]:
                # Python counts the entry types that protoc makes of map fields, Java does not
                raise SchemaUnusableError(
                    f"Confluent's clients do not agree which message {'/'.join(map(str, path))} is, for a map field "
                    "stands before it; send a message that is not nested"
                )
            names.append(messages[index].name)
            messages = messages[index].nested_type
        return self.named(".".join(names))

    def named(self, full_name: str) -> Any:
        """Return the class of a message of this file.

        :raises SchemaUnusableError: when there is none.
        """
        try:
            return message_factory.GetMessageClass(self._file.pool.FindMessageTypeByName(full_name))
        except KeyError:
            raise SchemaUnusableError(f"it has no message {full_name}") from None


def _compiled(texts: Mapping[str, str]) -> descriptor_pb2.FileDescriptorSet | None:
    """Read schemas that are compiled already, all of them; None when one is text."""
    files = descriptor_pb2.FileDescriptorSet()
    added: set[str] = set()
    for name, text in texts.items():
        try:
            file = descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(text, validate=True))
        except (ValueError, DecodeError):
            return None
        file.name = name
        for needed in file.dependency:
            if needed.startswith("google/protobuf/") and needed not in added:
                added.add(needed)
                _add_well_known(files, needed)
        files.file.append(file)
    return files


def _add_well_known(files: descriptor_pb2.FileDescriptorSet, name: str) -> None:
    module = name.removesuffix(".proto").replace("/", ".") + "_pb2"
    try:
        file = importlib.import_module(module).DESCRIPTOR
    except (ImportError, ValueError):
        raise SchemaUnusableError(f"it imports {name}, which nobody knows") from None
    for needed in file.dependencies:
        _add_well_known(files, needed.name)
    files.file.append(descriptor_pb2.FileDescriptorProto.FromString(file.serialized_pb))


def _compile(text: str, references: Mapping[str, str]) -> descriptor_pb2.FileDescriptorSet:
    if importlib.util.find_spec("grpc_tools") is None:
        raise MissingExtraError(
            "Protobuf schemas are compiled by protoc, which is not installed. Run: pip install "
            "'airflow-ai-provider[registry]'",
            name="grpc_tools",
        )
    if len(text) + sum(map(len, references.values())) > _MAX_TEXT:
        raise SchemaUnusableError(f"it is longer than {_MAX_TEXT} characters")
    with tempfile.TemporaryDirectory(prefix="proto-") as folder:
        for name, content in {**references, _MAIN: text}.items():
            _write(Path(folder), name, content)
        found = Path(folder) / "compiled"
        options = [f"-I{folder}", "--include_imports", f"--descriptor_set_out={found}", _MAIN]
        # -P: nothing in the working directory is taken for a module
        command = [sys.executable, "-P", "-m", "grpc_tools.protoc", *options]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
        except subprocess.TimeoutExpired:
            raise SchemaUnusableError(f"protoc did not end within {_DEADLINE_S} s") from None
        if done.returncode != 0 or not found.exists():
            said = " ".join(done.stderr.split())[:300]
            raise SchemaUnusableError(f"protoc refuses it: {said}")
        return descriptor_pb2.FileDescriptorSet.FromString(found.read_bytes())


def _write(folder: Path, name: str, content: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise SchemaUnusableError(f"it imports {name!r}, which is no relative path")
    if path.parts[:2] == ("google", "protobuf"):
        return  # well-known types are protoc's own
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(content, encoding="utf-8")
