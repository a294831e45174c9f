"""Export to cell-eval, and its metrics as rows of the table of scores."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numba
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from cellweave.data import ConditionNames

from ._perturbation_inputs import Cells, Columns, missing_control, read_cells, require_genes
from ._perturbation_methods import Method
from ._perturbation_screen import Screen, Settings, halve

__all__ = ["cell_eval_profile", "cell_eval_scores", "to_cell_eval"]

# Before the names of its metrics: some have the names of ours, and other values.
PREFIX = "cell_eval:"
_KEY = "perturbation"
_PROFILES = ("vcc", "minimal", "full", "de", "anndata")


def to_cell_eval(
    pred: AnnData,
    true: AnnData,
    *,
    perturbation_key: str,
    control_key: str = "control",
    train: AnnData | None = None,
    sep: str = "+",
    layer: str | None = None,
    split_control: bool = True,
    seed: int = 0,
) -> tuple[AnnData, AnnData]:
    """Predicted and measured cells in the form that cell-eval reads.

    cell-eval wants two AnnData with the same genes in the same order, the same perturbations, and control cells in both.
    Both get measured control cells; those among the predicted cells, which a prediction could choose in its favour, are
    dropped. cell-eval knows no contexts: export one at a time.

    Parameters
    ----------
    pred
        Predicted cells. Read from ``layer`` if they have it, else from ``X``.
    true
        Measured cells, with control cells if there is no ``train``.
    perturbation_key
        Column of ``obs`` with the names of perturbations.
    control_key
        Name of control cells.
    train
        Training cells, whose control cells are used.
    sep
        What stands between the parts of a combination.
    layer
        Layer with log-normalised expression; ``X`` by default.
    split_control
        Give each its own random half of the control cells, so that correlations of shifts are not inflated; False gives
        both all of them.
    seed
        Seed of the halves.

    Returns
    -------
    tuple
        Predicted and measured cells, new AnnData with float32 CSR expression and ``obs[perturbation_key]``. Predicted
        values below 0, which cell-eval refuses, are 0. Nothing is written into the arguments.

    Raises
    ------
    KeyError
        If a column or layer is missing.
    ValueError
        If genes or perturbations differ, there are no control cells, or values are not log-normalised.

    Examples
    --------
    >>> predicted, measured = cw.tl.to_cell_eval(pred, adata[test], train=adata[train], perturbation_key="perturbation")
    >>> evaluator = cell_eval.MetricsEvaluator(predicted, measured, control_pert="control", pert_col="perturbation")
    """
    columns = Columns(perturbation_key, ConditionNames(control_key, sep))
    measured = read_cells(true, "true", columns, layer)
    source, role = measured, "true"
    if train is not None:
        source, role = (
            require_genes(read_cells(train, "train", columns, layer), "train", measured.genes, "true"),
            "train",
        )
    own = layer if isinstance(pred, AnnData) and layer is not None and layer in pred.layers else None
    predicted = require_genes(read_cells(pred, "pred", columns, own, measured=False), "pred", measured.genes, "true")
    control = source.take((source.obs["perturbation"] == control_key).to_numpy())
    if not len(control.obs):
        raise ValueError(missing_control(role, columns, source))
    truth, made = (c.take((c.obs["perturbation"] != control_key).to_numpy()) for c in (measured, predicted))
    _require_same(made, truth)
    n_control = len(control.obs)
    first = halve(np.zeros(n_control, dtype=int), Settings(True, 1, 2, 1, 2, seed).generator(1, 0))
    halves = (first, ~first) if split_control else (np.ones(n_control, dtype=bool),) * 2
    pairs = zip((made, truth), halves, strict=True)
    exported = [_export(_blocks(cells, control.take(half)), measured.genes, perturbation_key) for cells, half in pairs]
    return exported[0], exported[1]


def cell_eval_profile(chosen: bool | str) -> str | None:
    """Checked name of a set of metrics, None for none; checked before anything is computed.

    Raises
    ------
    ImportError
        If cell-eval is not installed.
    ValueError
        If there is no such set.
    """
    if not chosen:
        return None
    profile = _PROFILES[0] if chosen is True else chosen
    if profile not in _PROFILES:
        raise ValueError(f"`cell_eval={profile!r}` is no profile of cell-eval; choose from {', '.join(_PROFILES)}.")
    _cell_eval()
    return profile


def cell_eval_scores(method: Method, screen: Screen, profile: str) -> pd.DataFrame:
    """Metrics of cell-eval for a method, context by context, as rows of the table of scores.

    Raises
    ------
    ImportError
        If cell-eval is not installed.
    """
    evaluator = _cell_eval().MetricsEvaluator
    rows = []
    for context in np.unique(screen.context[method.applies]):
        groups = np.flatnonzero((screen.context == context) & method.applies)
        predicted, measured = _pair(method, screen, int(context), groups)
        with tempfile.TemporaryDirectory() as folder:
            options = {"num_threads": numba.get_num_threads(), "outdir": f"{folder}/cell-eval"}
            found = evaluator(predicted, measured, control_pert=_control(screen), pert_col=_KEY, **options)
            # a metric that fails is otherwise left out in silence
            table, _ = found.compute(profile=profile, write_csv=False, break_on_error=True)
        wide = pd.DataFrame({name: table[name].to_list() for name in table.columns}).set_index(_KEY)
        n_true = dict(zip(screen.groups.get_level_values(_KEY)[groups], screen.n_true[groups], strict=True))
        for metric in wide.columns:
            rows += [
                (label, screen.contexts[context], method.name, PREFIX + metric, float(value), n_true[label])
                for label, value in wide[metric].items()
            ]
    return pd.DataFrame(rows, columns=["perturbation", "context", "method", "metric", "value", "n_true"])


def _pair(method: Method, screen: Screen, context: int, groups: NDArray[np.intp]) -> tuple[AnnData, AnnData]:
    """Cells of a context for cell-eval; prediction and truth have the control cells of one half each."""
    labels = screen.groups.get_level_values(_KEY)
    blocks = [method.half_populations(int(group)) for group in groups]
    sides = []
    for side in (0, 1):
        control = screen.control.dense(screen.rows_of_half(context, 0, second=bool(side)))
        named = [(labels[group], block[side]) for group, block in zip(groups, blocks, strict=True)]
        sides.append(_export([*named, (_control(screen), control)], screen.truth.genes, _KEY))
    return sides[0], sides[1]


def _control(screen: Screen) -> str:
    return screen.columns.names.control_key


def _blocks(cells: Cells, control: Cells) -> list[tuple[str | NDArray[np.object_], Any]]:
    """Labels and expression of perturbed and control cells."""
    return [(block.obs["perturbation"].to_numpy(), block.x) for block in (cells, control)]


def _export(blocks: Sequence[tuple[str | NDArray[np.object_], Any]], genes: pd.Index, key: str) -> AnnData:
    """New AnnData of labelled blocks of cells."""
    matrices = [sp.csr_matrix(block, dtype=np.float32) for _, block in blocks]
    x = sp.vstack(matrices, format="csr")
    if x.nnz and x.data.min() < 0:
        x.data = np.maximum(x.data, 0)
        x.eliminate_zeros()
    labels = np.concatenate(
        [np.broadcast_to(label, m.shape[0]) for (label, _), m in zip(blocks, matrices, strict=True)]
    )
    obs = pd.DataFrame({key: labels.astype(str)}, index=[f"cell{i}" for i in range(x.shape[0])])
    return AnnData(x, obs=obs.astype({key: "category"}), var=pd.DataFrame(index=genes.astype(str)))


def _require_same(made: Cells, truth: Cells) -> None:
    predicted, measured = (pd.Index(cells.obs["perturbation"].unique()) for cells in (made, truth))
    more, missing = predicted.difference(measured), measured.difference(predicted)
    if len(more) or len(missing) or not len(measured):
        first = f" (first: {[*missing, *more][0]!r})" if len(more) or len(missing) else ""
        raise ValueError(
            f"`pred` and `true` must have the same perturbations, but {len(missing)} of {len(measured)} are missing in `pred` "
            f"and {len(more)} are in `pred` only{first}; select those that both have."
        )


def _cell_eval() -> ModuleType:
    """The optional library, or how to get it."""
    try:
        return importlib.import_module("cell_eval")
    except ImportError as error:
        raise ImportError(
            '`cell_eval` needs the package cell-eval, which is not installed: run `pip install "cellweave[eval]"`.'
        ) from error
