"""Files and folders that appear whole or not at all."""

import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tandemqa.errors import TandemError

if TYPE_CHECKING:
    import numpy.typing as npt

NO_ROOM = {errno.ENOSPC: "The disk is full", errno.EDQUOT: "The disk quota is used up"}


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends well, remove it when it fails."""
    partial = _beside(path, "partial")
    try:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            _sync(partial)
            partial.replace(path)
            _sync(path.parent)
    finally:
        with suppress(OSError):  # not there, or in a place that may not be changed
            partial.unlink()


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; it takes the place of `path` when the block ends well.

    A reader finds the old folder or the new one; see `put_in_place`.
    """
    partial = _beside(path, "partial")
    try:
        with explained(path):
            partial.mkdir(parents=True)
            yield partial
            put_in_place(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_in_place(partial: Path, path: Path) -> None:
    """Give the folder `partial` the name `path`, with all that is in it safe on disk; what stands there is removed.

    Where the system can exchange two names, `path` is the old folder or the new one at every moment. Elsewhere there
    is none between two renames, and the old one is called `.NAME.HEX.old`, until `put_back` if the process is killed.
    """
    old = _beside(path, "old")
    for entry in (*partial.rglob("*"), partial):
        _sync(entry)
    try:
        while not _renamed(partial, path):
            shutil.rmtree(old, ignore_errors=True)
            if _exchanged(partial, path):
                partial.rename(_beside(path, "gone"))
                break
            with suppress(FileNotFoundError):
                path.rename(old)
        _sync(path.parent)
    except BaseException:
        with suppress(OSError):  # there was none, or another stands there by now
            old.rename(path)
        raise
    finally:
        if path.exists():
            # Renamed first, so that no part of a folder is ever put back.
            for left in _left(path, "old"):
                with suppress(OSError):  # another process does it
                    left.rename(_beside(path, "gone"))
            for left in _left(path, "gone"):
                shutil.rmtree(left, ignore_errors=True)


def put_back(path: Path) -> None:
    """If a process was killed while it put a folder in the place of another at `path`, give that its name again."""
    for old in [] if path.exists() else _left(path, "old"):
        with suppress(OSError):  # another process put one there, or it may not be done
            old.rename(path)


def _renamed(partial: Path, path: Path) -> bool:
    """Whether `partial` could be renamed to `path`: not where something stands that is no empty folder."""
    try:
        partial.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        return False
    return True


def _exchanged(one: Path, other: Path) -> bool:
    """Whether two folders could exchange their names in one step, as Linux can on most of its file systems."""
    import ctypes

    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _left(path: Path, kind: str) -> list[Path]:
    return list(path.parent.glob(f".{glob.escape(path.name)}.*.{kind}"))


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{kind}")


class NotWrittenError(TandemError):
    """A failure of the system while something was written; `__cause__` is the system's error."""


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """In this block, a failure of the system while `path` is written is a `TandemError`.

    Of blocks inside each other the outermost names its path, which is the one that a user knows.
    """
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, NotWrittenError) else error
        sentence = None if isinstance(cause, TandemError) else why_not_written(cause, path)
        if sentence is None:
            raise
        raise NotWrittenError(sentence) from cause


def why_not_written(error: BaseException | None, path: Path | str) -> str | None:
    """The sentence for a failure of the system while `path` was written; None for any other error."""
    number = _error_number(error)
    if number in NO_ROOM:
        return f"{NO_ROOM[number]}: {path} was not written; free some space and run the command again."
    kept = Path(path).is_relative_to(cache_folder())
    elsewhere = "set TANDEMQA_CACHE to another place" if kept else "choose another place"
    if number in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"No permission to write {path}; {elsewhere} or change its permissions."
    if number is None and not isinstance(error, OSError):
        return None
    what = str(error) if number is None else os.strerror(number)
    return f"{path} could not be written: {what}; {elsewhere}."


def remove_partial(folder: Path) -> None:
    """Remove what processes that were killed have left half-written in `folder`; nobody may be writing there."""
    for path in folder.glob(".*.partial"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_array(path: Path, array: "npt.NDArray[Any]") -> None:
    """Write `array` as `.npy`, whole or not at all."""
    import numpy as np

    with whole_file(path) as partial, partial.open("wb") as file:
        # Python writes, and not numpy, which loses the end of a file without a word where the disk is just full.
        np.save(SimpleNamespace(write=file.write), array)


def save_arrays(path: Path, **arrays: "npt.NDArray[Any]") -> None:
    """Write `arrays` under their names as `.npz`, whole or not at all."""
    import numpy as np

    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or malformed one is a `TandemError` that names the file and the line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TandemError(f"{path} does not exist.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TandemError(f"{path} is not valid JSON ({error}); write it again or remove it.") from error


def fingerprint(*paths: Path) -> str:
    """SHA-256 over the content of the files, in the order given: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def stamp(path: Path) -> tuple[int, ...]:
    """What tells a file from itself after a change; nothing of one that is gone."""
    try:
        about = path.stat()
    except FileNotFoundError:
        return ()
    return about.st_ino, about.st_size, about.st_mtime_ns


def cache_folder() -> Path:
    """Where work is kept between commands: $TANDEMQA_CACHE, else tandemqa/ in the user's cache folder."""
    if own := os.environ.get("TANDEMQA_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandemqa"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _error_number(error: BaseException | None) -> int | None:
    """The system's number of a failure; None if it is not one, or tells none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    # Libraries in Rust (safetensors, tokenizers) and numpy tell it in words only.
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return int(found[1])
    return errno.ENOSPC if isinstance(error, OSError) and "requested and" in str(error) else None
