"""Small real and simulated data sets with raw counts."""

from ._loaders import (
    datlinger_jurkat,
    gbm_panobinostat,
    kang_ctrl_8donors,
    kang_ifnb,
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
    "datlinger_jurkat",
    "gbm_panobinostat",
    "kang_ctrl_8donors",
    "kang_ifnb",
    "norman_mcfaline",
    "onek1k",
    "papalexi",
    "pbmc10k_citeseq",
    "pbmc68k",
    "pbmc_multistudy",
    "sim_grn_perturb",
    "worm_embryo_neurons",
]
