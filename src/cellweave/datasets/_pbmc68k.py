from __future__ import annotations

from typing import TYPE_CHECKING

import anndata
import numpy as np
import pandas as pd

from cellweave._keys import OUTPUT_KEYS
from cellweave.data import _recover

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["pbmc68k"]

# columns of the bundled file and their names here; scores and fractions of the original processing are dropped
_OBS = {
    "bulk_labels": "bulk_labels",
    "phase": "phase",
    "louvain": "louvain",
    "n_counts": "total_counts_full",
    "n_genes": "n_genes_full",
}


def pbmc68k() -> AnnData:
    """Raw counts of 700 blood cells that ship with scanpy, so that examples and tests need no download.

    ``scanpy.datasets.pbmc68k_reduced`` keeps only log-normalised values, rounded to three decimals. The counts are
    recovered from them, see :func:`cellweave.pp.recover_counts`; each count is proven to be the only possible one.

    Returns
    -------
    AnnData
        700 cells x 765 genes: ``X`` raw counts (CSR, float32); ``obs["bulk_labels"]`` ten sorted populations,
        ``obs["louvain"]`` and ``obs["phase"]`` of the original analysis, ``obs["total_counts_full"]`` and
        ``obs["n_genes_full"]`` over the whole transcriptome (the 765 genes are a subset, so the row sum is not the
        library size); origin in ``uns["cellweave"]["dataset"]``.

    Raises
    ------
    ValueError
        The values of a cell are not log-normalised integer counts, because scanpy ships another file.

    Examples
    --------
    >>> import cellweave as cw
    >>> cw.datasets.pbmc68k()
    """
    import scanpy as sc

    source = sc.datasets.pbmc68k_reduced()
    recovered = _recover.recover_counts(source.raw.X, cell_names=list(source.obs_names))
    obs = source.obs[list(_OBS)].rename(columns=_OBS)
    obs["total_counts_full"] = np.rint(obs["total_counts_full"]).astype(np.int64)
    adata = anndata.AnnData(recovered.counts, obs=obs, var=pd.DataFrame(index=source.raw.var_names))
    adata.uns[OUTPUT_KEYS.PROVENANCE] = {
        "dataset": {
            "name": "pbmc68k",
            "citation": "Zheng et al. 2017",
            "carrier": "scverse/scanpy",
            "licence": "BSD-3-Clause",
            "note": "counts recovered from the log-normalised values of scanpy.datasets.pbmc68k_reduced",
        }
    }
    return adata
