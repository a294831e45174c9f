"""One table of the assembled data sets: what the file must look like and whom to cite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["STUDIES", "Study"]


@dataclass(frozen=True)
class Study:
    """One assembled file.

    Parameters
    ----------
    file
        File name.
    shape
        Cells x genes.
    sha256
        Checksum of the file that the published numbers refer to.
    obs
        Columns of ``obs`` that the file must have.
    citation
        Study to cite, with its accession where there is one.
    carrier
        Public repositories that redistribute the matrices from which the file was assembled.
    licence
        Licences of these repositories, in the same order.
    markers
        Whether the columns are markers of cytometry, with dense intensities, and not genes with sparse counts.
    """

    file: str
    shape: tuple[int, int]
    sha256: str
    obs: tuple[str, ...]
    citation: str
    carrier: str
    licence: str
    markers: bool = False


_PERTURBATION: Final = ("perturbation", "batch", "cell_type")

STUDIES: Final[dict[str, Study]] = {
    "pbmc_multistudy": Study(
        file="pbmc_multistudy.h5ad",
        shape=(9880, 10603),
        sha256="ec1e1e6a12462d12afe90ae1e0e3bec8d988e33053fcc4e10264be51ae3c5c0c",
        obs=("batch", "study", "sample", "chemistry", "cell_type", "cell_type_l1", "label_source", "label_conf"),
        citation=(
            "10x Genomics PBMC 3k, 1k v2, 1k v3, 6k and 8k; Zheng et al. 2017; GSE115189; SCP345; SCP591; SRR7244582; "
            "SRR11038995"
        ),
        carrier=(
            "rnabioco/clustifyrdata, stephenslab/fastTopics, baj12/scWGParis, "
            "stemangiola/bioceurope2020_tidytranscriptomics"
        ),
        licence="MIT, BSD-2-Clause, GPL-2, CC BY-SA 4.0",
    ),
    "kang_ctrl_8donors": Study(
        file="kang_ctrl_8donors_1287g.h5ad",
        shape=(12261, 1287),
        sha256="2a7d935b63167786419a7d7f1d0d6deae863bf2834d1e8e2c7ba24bd59c96ced",
        obs=("donor", "batch", "cell_type", "condition"),
        citation="Kang et al. 2018 (GSE96583)",
        carrier="HelenaLC/muscat",
        licence="GPL-3",
    ),
    "kang_ifnb": Study(
        file="kang_ifnb.h5ad",
        shape=(2984, 4805),
        sha256="c67e11d6729fcd400244c52eca91a9d9902a9c08cac67e7aed9ed81e0a7812cf",
        obs=("condition", "donor", "label_source", "total_counts_full", "dev_split", *_PERTURBATION),
        citation="Kang et al. 2018 (GSE96583)",
        carrier="immunogenomics/harmony, theislab/scgen, yelabucsf/demuxlet_paper_code, HelenaLC/muscat, bioc/distinct",
        licence="GPL-3, GPL-3, none stated, GPL-3, GPL-3",
    ),
    "onek1k": Study(
        file="onek1k_1000g.h5ad",
        shape=(7811, 1000),
        sha256="9deed82422544f0e4c0032be10d6131989ffadf97a05624e325e7408061f11ab",
        obs=("donor", "batch", "cell_type", "sex", "age"),
        citation="Yazar et al. 2022 (OneK1K)",
        carrier="chrisycd/scDesignPop",
        licence="MIT",
    ),
    "worm_embryo_neurons": Study(
        file="worm_embryo_neurons.h5ad",
        shape=(1805, 10000),
        sha256="6e780ae6a71525b7ca295a73eb12cf7c394212953626c6da0bb2b837fe8a88cb",
        obs=("batch", "cell_type", "lineage", "embryo_time"),
        citation="Packer et al. 2019",
        carrier="cole-trapnell-lab/monocle3",
        licence="MIT",
    ),
    "pbmc10k_citeseq": Study(
        file="pbmc10k_citeseq_698g.h5ad",
        shape=(6661, 698),
        sha256="522531bf292ed99e78fe05752f350fdb810822d77d56f9fb8379e2d9c0b3fbef",
        obs=("cell_type", "batch"),
        citation="10x Genomics PBMC 10k protein v3",
        carrier="xianglin226/scMDC, scverse/scvi-tools",
        licence="Apache-2.0, BSD-3-Clause",
    ),
    "gbm_panobinostat": Study(
        file="gbm_panobinostat_300g.h5ad",
        shape=(4000, 300),
        sha256="955821e03926ad0e85b4ac70374ac13e25b2fc4c8c29253c4b635b71c5a8205d",
        obs=("donor", "condition", "sample", "dev_split", *_PERTURBATION),
        citation="Zhao et al. 2021 (GSE148842)",
        carrier="const-ae/lemur",
        licence="MIT",
    ),
    "papalexi": Study(
        file="papalexi_thp1_299g.h5ad",
        shape=(15951, 299),
        sha256="d527fe67dcf1296ff3176bd4443220857590e0063ad50475c169a7783eb1f2fe",
        obs=("guide", "guide_umi", "dev_split", *_PERTURBATION),
        citation="Papalexi et al. 2021 (GSE153056)",
        carrier="Katsevich-Lab/sceptredata",
        licence="MIT",
    ),
    "norman_mcfaline": Study(
        file="norman_mcfaline_hvg500.h5ad",
        shape=(4815, 500),
        sha256="409bf0dc51e6d8b8a5158b2c0d93798610d6b630723b8a3712ce66cc08113133",
        obs=("dataset", "perturbation_type", "n_targets", "total_counts_full", "dev_split", *_PERTURBATION),
        citation="Norman et al. 2019 (GSE133344); McFaline-Figueroa et al. 2023",
        carrier="altoslabs/perturbench",
        licence="BSD-3-Clause",
    ),
    "datlinger_jurkat": Study(
        file="datlinger_jurkat_hvg2000.h5ad",
        shape=(7500, 2000),
        sha256="74e4ed594efd96676153b8e749c9acb8a689292a2c70f1cc44a62314d7cc0349",
        obs=("guide", "condition", "well", "total_counts_full", *_PERTURBATION),
        citation="Datlinger et al. 2021",
        carrier="sanderlab/scPerturb",
        licence="MIT",
    ),
    "sim_grn_perturb": Study(
        file="sim_grn_perturb_800g.h5ad",
        shape=(4180, 800),
        sha256="e520979340a1e23592ae802d721da86917d8ce5ff144b011608f3fd628a20680",
        obs=("escaper", "n_targets", "interaction", "dev_split", *_PERTURBATION),
        citation="simulated from the CD4 T cells of 10x Genomics PBMC 3k",
        carrier="rnabioco/clustifyrdata",
        licence="MIT",
    ),
    "bmmc_cytof": Study(
        file="cytometry/bmmc_basal1.h5ad",
        shape=(102987, 13),
        sha256="8ab445f4ef96e6f17c3dd59895dce50b25030525c4f18e97f97855699a899329",
        obs=("cell_type", "sample"),
        citation="Bendall et al. 2011",
        carrier="asampat3090/229-project",
        licence="none stated for the data",
        markers=True,
    ),
    "levine32": Study(
        file="cytometry/levine32_stratified.h5ad",
        shape=(1500, 32),
        sha256="967c363257473b6f20b2da9dab4a717cc69cf0a3f7e5e18a574fd70c68562e4e",
        obs=("cell_type", "subject"),
        citation="Levine et al. 2015",
        carrier="phipsonlab/SuperCellCyto",
        licence="GPL-3",
        markers=True,
    ),
    "debarcoding": Study(
        file="cytometry/debarcoding_catalyst.h5ad",
        shape=(20000, 6),
        sha256="defc4d9d1bc1543903cc37d8a002590e7412087a01ab50c77904418be5b77bf7",
        obs=("top3_barcode", "top3_separation"),
        citation="sample data of CATALYST (Chevrier et al. 2018)",
        carrier="HelenaLC/CATALYST",
        licence="GPL-2 or later",
        markers=True,
    ),
    "multicenter_cytof": Study(
        file="cytometry/multicenter_6samples.h5ad",
        shape=(48000, 8),
        sha256="30aa01470816b4b419f515e0e41b05247171000fa19ae206ac83f825f7f94632",
        obs=("cell_type", "sample", "group"),
        citation="multi-centre CyTOF study of blood, as in Li et al. 2017 (DeepCyTOF)",
        carrier="abbioinfo/CyAnno, tabdelaal/CyTOF-Linear-Classifier",
        licence="GPL-3, none stated",
        markers=True,
    ),
}
