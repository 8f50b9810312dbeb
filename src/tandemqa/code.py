"""Which code made a result: results that are kept are keyed by it."""

import hashlib
from functools import cache
from pathlib import Path

import tandemqa


@cache
def code_version(*places: str) -> str:
    """Sixteen hexadecimal digits that identify the source code in these files and folders of the package."""
    package = Path(tandemqa.__file__).parent
    digest = hashlib.sha256()
    for place in places:
        path = package / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
