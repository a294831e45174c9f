"""annbatch as the reader of a collection of sharded zarr stores; the order of cells stays ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._rows import Rows, StackedRows
from ._sampler import Buffer

__all__ = ["AnnbatchRows"]


class AnnbatchRows(StackedRows):
    """The cells of an annbatch collection; batches are read by the loader of annbatch, single rows by our own reader.

    annbatch is told which cells to read, buffer by buffer, so that contexts, their order and resuming are those of
    :class:`CellSetSampler`, whoever reads.

    Parameters
    ----------
    parts
        The data sets of the collection, in its order.
    path
        The collection.

    Raises
    ------
    ImportError
        If annbatch is not installed.
    """

    def __init__(self, parts: Sequence[Rows], path: Path) -> None:
        super().__init__(parts, [None] * len(parts))
        self.path = path
        _annbatch()

    def stream(self, buffers: Iterable[Buffer]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_], Any]]:
        """Rows, validity and counts of every batch of ``buffers``."""
        annbatch = _annbatch()
        planned = [buffer.batches for buffer in buffers if buffer.batches]
        loader = annbatch.Loader(batch_sampler=_sampler(planned), return_index=True)
        loader.use_collection(annbatch.DatasetCollection(self.path, mode="r"))
        batches = (batch for group in planned for batch in group)
        for (rows, valid), read in zip(batches, loader, strict=True):
            if not np.array_equal(read["index"], rows):
                raise RuntimeError(
                    f"annbatch returned other cells of `{self.path}` than it was asked for; use `backend='blocks'`."
                )
            yield rows, valid, read["X"]


def _sampler(planned: Sequence[Sequence[tuple[NDArray[np.int64], NDArray[np.bool_]]]]) -> Any:
    """A sampler of annbatch that asks for exactly these batches."""
    from annbatch.abc import Sampler

    class Planned(Sampler):
        batch_size, shuffle = None, None

        def n_batches(self, n_obs: int) -> int:
            return sum(map(len, planned))

        def validate(self, n_obs: int) -> None:
            """Nothing to check: rows come from the registered data."""

        def _sample(self, n_obs: int) -> Iterator[dict[str, Any]]:
            for batches in planned:
                wanted = np.concatenate([rows for rows, _ in batches])
                order = np.argsort(wanted, kind="stable")  # reads in the order of the file
                place = np.empty_like(order)
                place[order] = np.arange(len(order))
                ends = np.cumsum([len(rows) for rows, _ in batches])
                yield {"requests": wanted[order], "splits": np.split(place, ends[:-1])}

    return Planned()


def _annbatch() -> Any:
    try:
        import annbatch
    except ImportError as error:
        raise ImportError(
            "`backend='annbatch'` needs the package annbatch and Python 3.12 or newer: "
            "`pip install 'cellweave[scale]'`; `backend='blocks'` reads the same collection without it."
        ) from error
    return annbatch
