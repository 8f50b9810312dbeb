"""The judgements of one split, as they come, in a file of BEIR's."""

from pathlib import Path

from tandemqa.data.formats.ledger import Ledger
from tandemqa.files import whole_file


class Judgements:
    """A `qrels/SPLIT.tsv` being written: each pair of query and passage once, with the highest grade it was given.

    So a passage that is a positive of a query here and a hard negative there is a positive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.positives = 0
        self._grades = Ledger()
        self._raised = False
        self._file = path.open("w", encoding="utf-8", newline="\n")
        self._file.write("query-id\tcorpus-id\tscore\n")

    def __len__(self) -> int:
        return len(self._grades)

    def add(self, query: str, passage: str, grade: int) -> None:
        pair = f"{query}\t{passage}"
        earlier = self._grades.note(pair, grade)
        if earlier is None:
            self._file.write(f"{pair}\t{grade}\n")
            self.positives += grade > 0
        elif grade > earlier:
            self._grades.replace(pair, grade)
            self._raised = True
            self.positives += earlier <= 0 < grade

    def close(self) -> None:
        self._file.close()

    def settle(self) -> None:
        """Bring the grades in the closed file up to those that were raised after their line was written."""
        if not self._raised:
            return
        with (
            whole_file(self.path) as partial,
            self.path.open(encoding="utf-8", newline="\n") as old,
            partial.open("w", encoding="utf-8", newline="\n") as new,
        ):
            new.write(next(old))
            for line in old:
                pair = line.rpartition("\t")[0]
                new.write(f"{pair}\t{self._grades.get(pair)}\n")
