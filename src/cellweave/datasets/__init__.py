"""Small real and simulated data sets with raw counts, or raw intensities of markers."""

from ._loaders import (
    bmmc_cytof,
    datlinger_jurkat,
    debarcoding,
    gbm_panobinostat,
    kang_ctrl_8donors,
    kang_ifnb,
    levine32,
    multicenter_cytof,
    norman_mcfaline,
    onek1k,
    papalexi,
    pbmc10k_citeseq,
    pbmc_multistudy,
    sim_grn_perturb,
    worm_embryo_neurons,
)
from ._pbmc68k import pbmc68k

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
    "pbmc68k",
    "pbmc_multistudy",
    "sim_grn_perturb",
    "worm_embryo_neurons",
]
