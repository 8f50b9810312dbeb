"""Progress bars with a rate and the remaining time, on standard error."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

from tandemqa import processes

T = TypeVar("T")

# tqdm's own form, but with a rate that is always per second.
FORM = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"


def bar(what: str, total: int, unit: str, initial: int = 0) -> "tqdm[Any]":
    """A bar to be moved by hand: `with bar("encode", 1000, "passage") as b: b.update(32)`.

    `initial` were done before, and do not count for the rate.
    """
    hidden = not processes.is_main()
    return tqdm(
        total=total,
        initial=initial,
        desc=what,
        unit=f" {unit}",
        bar_format=FORM if total else None,
        dynamic_ncols=True,
        mininterval=0.5,
        disable=hidden,
    )


def track(items: Iterable[T], what: str, total: int, unit: str) -> Iterator[T]:
    """Iterate with a bar that moves by one per item."""
    with bar(what, total, unit) as progress:
        for item in items:
            yield item
            progress.update(1)
