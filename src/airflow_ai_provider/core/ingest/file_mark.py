"""What a file system says of a file without reading it, by which a file that did not change is known again.

Invariants: of two contents that one path had, the marks differ; where a file system cannot promise that, the mark is
empty, and the file is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

_SETTLED_NS = 2_000_000_000
"""A file that changed less than that ago may change again within one tick of its file system's clock."""
_VERSIONS = ("ETag", "etag", "VersionId", "version_id", "generation", "content_md5", "md5Hash")
"""What S3, Google and Azure say of an object that is another one after each writing of other bytes."""


def mark_on_disk(path: str, now_ns: int) -> str:
    """Return size, times of change and inode of a file on this machine; empty while it is too fresh.

    The inode's own time of change (ctime) is part of it: no program can set it back, as ``cp -p`` and ``rsync`` set the
    other one.

    :param now_ns: the clock, in nanoseconds since 1970.
    """
    try:
        found = os.stat(path)
    except OSError:
        return ""  # reading it says more
    if now_ns - max(found.st_mtime_ns, found.st_ctime_ns) < _SETTLED_NS:
        return ""
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"


def mark_in_store(detail: Mapping[str, Any]) -> str:
    """Return size and version of an object, as its store lists it; empty when it tells no version.

    :param detail: what fsspec lists of it.
    """
    versions = [f"{name}={detail[name]}" for name in _VERSIONS if detail.get(name)]
    return " ".join([str(detail.get("size")), *versions]) if versions else ""
