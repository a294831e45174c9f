"""One function per assembled data set."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeAlias

from ._load import documented, load_study

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "bmmc_cytof",
    "datlinger_jurkat",
    "debarcoding",
    "gbm_panobinostat",
    "kang_ctrl_8donors",
    "kang_ifnb",
    "levine32",
    "multicenter_cytof",
    "norman_mcfaline",
    "onek1k",
    "papalexi",
    "pbmc10k_citeseq",
    "pbmc_multistudy",
    "sim_grn_perturb",
    "worm_embryo_neurons",
]

PathLike: TypeAlias = str | os.PathLike[str]


@documented("pbmc_multistudy")
def pbmc_multistudy(path: PathLike | None = None) -> AnnData:
    """Peripheral blood of eleven studies: integration over chemistries and depths, label transfer.

    ``obs["batch"]`` has 12 values. Use ``cell_type_l1`` as label and ``label_conf >= 0.5``: most labels are derived, and
    CD4 and CD8 T cells cannot be told apart in all of them.
    """
    return load_study("pbmc_multistudy", path)


@documented("kang_ctrl_8donors")
def kang_ctrl_8donors(path: PathLike | None = None) -> AnnData:
    """Unstimulated blood cells of eight donors with the cell types of the authors: a mild donor effect.

    Shares its cells with the controls of :func:`kang_ifnb`.
    """
    return load_study("kang_ctrl_8donors", path)


@documented("kang_ifnb")
def kang_ifnb(path: PathLike | None = None) -> AnnData:
    """Blood cells of eight donors with and without interferon beta: responses of unseen cell types and donors.

    ``obs["dev_split"]`` is a fixed development split. The genes are a subset: ``obs["total_counts_full"]`` is the library
    size.
    """
    return load_study("kang_ifnb", path)


@documented("onek1k")
def onek1k(path: PathLike | None = None) -> AnnData:
    """Blood cells of forty donors with age and sex: many small contexts of uneven composition."""
    return load_study("onek1k", path)


@documented("worm_embryo_neurons")
def worm_embryo_neurons(path: PathLike | None = None) -> AnnData:
    """Neurons of the worm embryo in seven batches: integration that must keep the continuous ``obs["embryo_time"]``."""
    return load_study("worm_embryo_neurons", path)


@documented("pbmc10k_citeseq")
def pbmc10k_citeseq(path: PathLike | None = None) -> AnnData:
    """Blood cells with RNA and surface proteins: ``obsm["protein_counts"]`` with names in ``uns["protein_names"]``."""
    return load_study("pbmc10k_citeseq", path)


@documented("gbm_panobinostat")
def gbm_panobinostat(path: PathLike | None = None) -> AnnData:
    """Glioblastoma slices of five patients with and without panobinostat: responses that differ between patients."""
    return load_study("gbm_panobinostat", path)


@documented("papalexi")
def papalexi(path: PathLike | None = None) -> AnnData:
    """THP-1 cells with 22 knock-outs and controls in three replicates: few strong effects, many null effects."""
    return load_study("papalexi", path)


@documented("norman_mcfaline")
def norman_mcfaline(path: PathLike | None = None) -> AnnData:
    """Gene activation with pairs (Norman) and kinase repression in three lines (McFaline-Figueroa).

    The genes are a subset: ``obs["total_counts_full"]`` is the library size. ``obs["dataset"]`` separates the two studies.
    """
    return load_study("norman_mcfaline", path)


@documented("datlinger_jurkat")
def datlinger_jurkat(path: PathLike | None = None) -> AnnData:
    """Sparse Jurkat CROP-seq with and without T-cell receptor stimulation: calibration when hardly anything happens.

    The genes are a subset: ``obs["total_counts_full"]`` is the library size.
    """
    return load_study("datlinger_jurkat", path)


@documented("sim_grn_perturb")
def sim_grn_perturb(path: PathLike | None = None) -> AnnData:
    """Simulated single and double knock-outs in a gene network, with the truth.

    ``varm["true_log_mean"]`` (genes x conditions, names in ``uns["true_log_mean_conditions"]``) is free of noise.
    """
    return load_study("sim_grn_perturb", path)


@documented("bmmc_cytof")
def bmmc_cytof(path: PathLike | None = None) -> AnnData:
    """Human bone marrow with twenty gated populations, some of a few dozen cells: annotation of rare populations."""
    return load_study("bmmc_cytof", path)


@documented("levine32")
def levine32(path: PathLike | None = None) -> AnnData:
    """Human bone marrow of two donors, fifty cells per population and donor: annotation of few cells with many markers."""
    return load_study("levine32", path)


@documented("debarcoding")
def debarcoding(path: PathLike | None = None) -> AnnData:
    """Events of twenty samples that three of six palladium channels encode; there is no ground truth.

    ``obs["top3_barcode"]`` is the code of the three brightest channels and ``obs["top3_separation"]`` how clear it is.
    """
    return load_study("debarcoding", path)


@documented("multicenter_cytof")
def multicenter_cytof(path: PathLike | None = None) -> AnnData:
    """Human blood in six samples that differ strongly: annotation of new samples, batch correction."""
    return load_study("multicenter_cytof", path)
