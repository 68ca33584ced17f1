"""Progress bars, which are made only if they are shown."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

__all__ = ["bar"]


class _Hidden:
    """What stands in for a bar that is not shown."""

    def update(self, count: int = 1) -> None:
        """Nothing is counted."""

    def close(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> _Hidden:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def bar(shown: bool, **options: Any) -> Any:
    """A bar of tqdm, or what stands in for it.

    tqdm takes locks of the whole process for every bar, and starts a thread, also if the bar is
    disabled. An interrupt at that moment would leave the locks taken for good.

    Args:
        shown: whether it is.
        options: of tqdm.

    Example:
        >>> with bar(False, total=2) as progress:
        ...     progress.update()
    """
    return tqdm(**options) if shown else _Hidden()
