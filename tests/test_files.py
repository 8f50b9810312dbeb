"""Files and folders appear whole or not at all, whoever else writes them at the same time."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tandemqa import files
from tandemqa.files import put_back, put_in_place, whole_file, whole_folder

WRITERS, TIMES = 4, 25


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def at_once(write: Callable[[str], None]) -> None:
    start = threading.Barrier(WRITERS, timeout=20)

    def run(number: int) -> None:
        for step in range(TIMES):
            start.wait()
            write(f"{number} {step}")

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(run, range(WRITERS)))


def test_a_folder_that_several_write_at_once_is_that_of_one_of_them(tmp_path: Path) -> None:
    def write(content: str) -> None:
        with whole_folder(tmp_path / "folder") as partial:
            for name in ("a", "b"):
                (partial / name).write_text(content)

    at_once(write)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    contents = {path.read_text() for path in (tmp_path / "folder").iterdir()}
    assert len(contents) == 1 and contents.pop().endswith(f" {TIMES - 1}")


def test_a_file_that_several_write_at_once_is_that_of_one_of_them(tmp_path: Path) -> None:
    def write(content: str) -> None:
        with whole_file(tmp_path / "file") as partial:
            partial.write_text(content * 1000)

    at_once(write)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    content = (tmp_path / "file").read_text()
    assert content == content[: len(content) // 1000] * 1000


# Puts `new` in the place of `folder`; its nth step that changes a name is its last, and is done or not. Without
# "exchange" the system can exchange no names.
KILLED = """
import os, signal, sys
from pathlib import Path
from tandemqa import files

here, exchange, left, done = Path(sys.argv[1]), sys.argv[2] == "exchange", int(sys.argv[3]), sys.argv[4] == "done"

def counted(step):
    def take(*paths, **options):
        global left
        left -= 1
        if left == 0 and not done:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return step(*paths, **options)
        finally:
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    return take

os.rename = counted(os.rename)
os.unlink = counted(os.unlink)
files._exchanged = counted(files._exchanged) if exchange else lambda one, other: False
files.put_in_place(here / "new", here / "folder")
"""


def make(folder: Path, content: str) -> None:
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_text(content)


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_a_kill_at_any_step_leaves_the_old_folder_or_the_new(tmp_path: Path, way: str) -> None:
    seen = []
    for step in range(1, 20):
        for moment in ("before", "done"):
            here = tmp_path / f"{step} {moment}"
            here.mkdir()
            make(here / "folder", "old")
            make(here / "new", "new")
            ended = subprocess.run([sys.executable, "-c", KILLED, here, way, str(step), moment], check=False)
            if way == "exchange":
                assert (here / "folder").exists()
            put_back(here / "folder")
            contents = {path.name: path.read_text() for path in (here / "folder").iterdir()}
            assert contents in ({"a": "old", "b": "old"}, {"a": "new", "b": "new"})
            seen.append(contents["a"])
            with whole_folder(here / "folder") as partial:
                (partial / "c").write_text("newest")
            assert [path.name for path in (here / "folder").iterdir()] == ["c"]
            assert {path.name for path in here.iterdir()} <= {"folder", "new"}
        if ended.returncode != -signal.SIGKILL:
            assert ended.returncode == 0
            break
    assert seen == sorted(seen, reverse=True) and {"old", "new"} == set(seen) and len(seen) >= 10


def test_a_folder_that_was_removed_does_not_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for exchanged in (files._exchanged, lambda one, other: False):
        monkeypatch.setattr(files, "_exchanged", exchanged)
        monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # a process killed as soon as it begins to
        make(tmp_path / "folder", "old")
        make(tmp_path / "new", "new")
        put_in_place(tmp_path / "new", tmp_path / "folder")
        monkeypatch.undo()
        for path in (tmp_path / "folder").iterdir():
            path.unlink()
        (tmp_path / "folder").rmdir()
        put_back(tmp_path / "folder")
        assert not (tmp_path / "folder").exists()
