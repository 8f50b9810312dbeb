"""Files and folders appear whole or not at all, whoever else writes them at the same time."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tandemqa.files import whole_file, whole_folder

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
