"""Scores of predicted perturbation responses, beside simple predictions and a repeat of the experiment."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import pandas as pd
from anndata import AnnData
from scvi import settings as scvi_settings

from cellweave.data import ConditionNames
from cellweave.stats import SHIFT_PREDICTORS

from ._perturbation_cell_eval import cell_eval_profile, cell_eval_scores
from ._perturbation_inputs import Cells, Columns, first_of, missing_control, read_cells, require_genes
from ._perturbation_methods import Baseline, Method, PredictedCells, Replicate
from ._perturbation_scores import metric_names, score
from ._perturbation_screen import Screen, Settings

__all__ = ["evaluate_perturbation"]

COLUMNS = ["perturbation", "context", "method", "metric", "value", "n_true"]


def evaluate_perturbation(
    pred: AnnData | Mapping[str, AnnData] | None,
    true: AnnData,
    *,
    perturbation_key: str,
    control_key: str = "control",
    train: AnnData | None = None,
    pairing_keys: str | Sequence[str] | None = None,
    shift_keys: str | Sequence[str] | None = None,
    stratify_keys: str | Sequence[str] | None = None,
    sep: str = "+",
    layer: str | None = None,
    baselines: str | Sequence[str] | None = "auto",
    metrics: Sequence[str] | None = None,
    split_control: bool = True,
    n_splits: int = 5,
    n_top_genes: int = 20,
    n_pcs: int = 50,
    max_cells: int = 500,
    min_cells: int = 15,
    min_train_cells: int = 15,
    seed: int = 0,
    name: str = "prediction",
    cell_eval: bool | str = False,
) -> pd.DataFrame:
    r"""Compare predicted with measured perturbed cells, beside simple predictions and a repeat of the experiment.

    Every (perturbation, context) with enough cells is scored. All expression is log-normalised.

    **Disjoint control cells.** The usual Pearson correlation of shifts subtracts the same noisy control mean from
    prediction and truth. This alone correlates them: on a screen without any effect, the mean of the other perturbations
    reaches 0.66. By default the control cells are therefore halved at random; one half is all that the prediction sees, the
    shifts of the training cells included, and the other half defines the true shift. Predicted cells that name the control
    cell they were made from, in ``obs["source_cell"]``, enter with those made from the first half only. What a model
    learned from the other half in training cannot be taken away like this.

    Parameters
    ----------
    pred
        Predicted cells, or several predictions by name; control cells among them are ignored. None or an empty mapping
        scores the simple predictions only. Read from ``layer`` if they have it, else from ``X``.
    true
        Measured cells. Their control cells are used where there is no ``train``.
    perturbation_key
        Column of ``obs`` with the names of perturbations.
    control_key
        Name of control cells.
    train
        Cells that predictors could see, with control cells. They give control cells, principal components, the scale of the
        kernels, and the simple predictions; without them only ``"no_change"`` is there.
    pairing_keys
        Columns of ``obs`` whose combinations are the contexts: perturbed cells are compared with control cells of the same
        context only.
    shift_keys
        Columns of ``obs`` whose combinations are the contexts between which the simple predictions carry shifts; a coarser
        choice, such as the cell type where contexts are cell type and donor, pools cells. ``pairing_keys`` by default.
    stratify_keys
        More columns within which control cells are halved evenly, such as the batch.
    sep
        What stands between the parts of a combination.
    layer
        Layer with log-normalised expression; ``X`` by default.
    baselines
        Names of simple predictions, see :data:`cellweave.stats.SHIFT_PREDICTORS`; ``"auto"`` takes all that apply, None
        none. As cells they are ``max(control + shift, 0)``. ``"observed"`` is what ``train`` measured of the same perturbation in
        the same context, where it did.
    metrics
        Names of metrics; all by default.
    split_control
        Use disjoint halves of the control cells. False gives the usual, inflated correlations.
    n_splits
        Random halvings that correlations and discrimination are averaged over.
    n_top_genes
        Number of genes, by \|Wilcoxon z\| of the measured against the control cells, of the metrics that end on
        ``_top{n}``.
    n_pcs
        Principal components of the training cells in which distances between populations are taken.
    max_cells
        Cells of a population, drawn at random, that enter these distances.
    min_cells
        Groups with fewer measured or control cells are left out.
    min_train_cells
        Training shifts that rest on fewer perturbed cells are not used.
    seed
        Seed of all random draws. They do not depend on the order of the cells.
    name
        Name of the prediction if it is not a mapping.
    cell_eval
        Add the metrics of cell-eval, as ``cell_eval:{its name}``, from the profile ``"vcc"``, or the one that is named: ``"minimal"``,
        ``"full"``, ``"de"``, ``"anndata"``. Needs the extra ``eval``. Perturbations of a context are evaluated together, and
        prediction and truth get disjoint halves of the control cells unless ``split_control`` is False.

    Returns
    -------
    pandas.DataFrame
        Long table with the columns ``perturbation``, ``context`` (values of ``pairing_keys``, joined), ``method`` (name of a
        prediction, of a simple prediction, or ``"replicate"``: one random half of the measured cells predicts the other),
        ``metric``, ``value`` and ``n_true`` (measured cells). The metrics:

        - ``mse``, ``mae``, ``mse_top20``: errors of the mean over all, or the top, genes.
        - ``pearson_delta``, ``pearson_delta_top20``: correlation of the shifts; 0 for no predicted shift.
        - ``energy_distance``, ``mmd``: unbiased distances of the populations, around 0 at best.
        - ``variance_ratio``, ``zero_fraction_ratio``: total variance and share of zeros, predicted over true; 1 at best.
        - ``discrimination_l1``: rank of the own measured shift among all of the context, 1 at best, 0.5 by chance, the
          perturbed genes left out. It is blind to the size of the effect.
        - ``de_overlap_top20``: share of the top genes of the truth among the top genes of the prediction (Wilcoxon).
        - ``n_de_pred``, ``n_de_true``: genes at a false discovery rate of 5 % against control, with equal numbers of cells.
        - ``energy_p_true``, ``null``: permutation p-value of the energy distance of the measured cells to control cells, and
          1 where it is above 0.05 and there are no DE genes: whatever a model claims there is not supported by the data.

    Raises
    ------
    ImportError
        If ``cell_eval`` is asked for and cell-eval is not installed.
    KeyError
        If a column or layer is missing.
    TypeError
        If a prediction is no AnnData.
    ValueError
        If genes differ, there are no control cells, predicted and measured perturbations are not the same, values are
        not log-normalised or not finite, nothing is left to compare, or an argument is out of range.

    Notes
    -----
    Principal components fit the training cells closer than new cells. A prediction that is made of training control cells
    keeps a small distance to measured cells that do not differ from them; compare with ``"no_change"``. The p-value
    ``energy_p_true`` uses components of the measured and the control cells alike and has no such bias.

    A shift of the mean moves every zero, so Wilcoxon tests of the simple predictions would call every gene. Their genes
    are ranked by the shift in units of the spread of the control cells instead, with p-values of a normal approximation.

    References
    ----------
    Ahlmann-Eltze, Huber and Anders, *Deep-learning-based gene perturbation effect prediction does not yet outperform
    simple linear baselines*, Nature Methods (2025). Szekely and Rizzo, *Energy statistics* (2013). Gretton et al., *A
    kernel two-sample test*, JMLR (2012).

    Examples
    --------
    >>> table = cw.tl.evaluate_perturbation(
    ...     pred, adata[test], train=adata[train], perturbation_key="perturbation", pairing_keys="cell_type"
    ... )
    >>> table.pivot_table(index="method", columns="metric", values="value")
    """
    settings = Settings(split_control, n_splits, n_top_genes, n_pcs, max_cells, seed)
    wanted, profile = metric_names(n_top_genes, metrics), cell_eval_profile(cell_eval)
    pairing = _as_tuple(pairing_keys)
    shift = pairing if shift_keys is None else _as_tuple(shift_keys)
    _require_coarser(shift, pairing)
    columns = Columns(perturbation_key, ConditionNames(control_key, sep), pairing, shift, _as_tuple(stratify_keys))
    screen = build_screen(true, train, columns, settings, layer, min_cells)
    predictions = read_predictions(pred, name, screen, columns, layer)
    methods: list[Method] = [PredictedCells(key, screen, cells) for key, cells in predictions.items()]
    methods += [*_baselines(baselines, screen, min_train_cells), Replicate(screen)]
    methods = [method for method in methods if method.applies.any()]
    tables = [_long(score(method, screen, wanted), method.name, screen) for method in methods]
    if profile is not None:
        tables += [cell_eval_scores(method, screen, profile) for method in methods]
    return pd.concat(tables, ignore_index=True)


def build_screen(
    true: AnnData, train: AnnData | None, columns: Columns, settings: Settings, layer: str | None, min_cells: int
) -> Screen:
    """Read and check measured cells, and choose the groups that can be scored.

    Raises
    ------
    ValueError
        If there are no control cells, or no group has enough cells.
    """
    measured = read_cells(true, "true", columns._replace(stratify=() if train is not None else columns.stratify), layer)
    source, role = measured, "true"
    if train is not None:
        source, role = (
            require_genes(read_cells(train, "train", columns, layer), "train", measured.genes, "true"),
            "train",
        )
    control_name = columns.names.control_key
    is_control = (source.obs["perturbation"] == control_name).to_numpy()
    if not is_control.any():
        raise ValueError(missing_control(role, columns, source))
    control = source.take(is_control)
    truth = measured.take((measured.obs["perturbation"] != control_name).to_numpy())
    groups = _groups(truth, control, role, min_cells)
    if train is not None:
        _warn_of_leak(truth, source)
    return Screen(groups, truth, control, None if train is None else source, columns, settings)


def _groups(truth: Cells, control: Cells, role: str, min_cells: int) -> pd.MultiIndex:
    """Perturbations and contexts that have enough measured and control cells, sorted."""
    if not len(truth.obs):
        raise ValueError("`true` has no perturbed cells, only control cells; give the measured cells to compare with.")
    n_true = truth.obs.groupby(["perturbation", "context"], observed=True).size().sort_index()
    n_control = control.obs["context"].value_counts().reindex(n_true.index.get_level_values("context"), fill_value=0)
    few_true, few_control = n_true.to_numpy() < max(min_cells, 1), n_control.to_numpy() < max(min_cells, 1)
    left_out = few_true | few_control
    if left_out.any():
        text = (
            f"{int(left_out.sum())} of {len(left_out)} measured group(s) have fewer than `min_cells={min_cells}` measured "
            f"cells in `true` ({int(few_true.sum())}) or control cells of their context in `{role}` "
            f"({int(few_control.sum())}) (first: {first_of(n_true.index[left_out])})"
        )
        if left_out.all():
            raise ValueError(
                f"{text}, so nothing is left to compare; lower `min_cells`, or choose coarser `pairing_keys`."
            )
        warnings.warn(f"{text}; they are left out.", UserWarning, stacklevel=scvi_settings.warnings_stacklevel)
    return n_true.index[~left_out]


def _warn_of_leak(truth: Cells, train: Cells) -> None:
    """Say if measured cells are among the training cells."""
    # names such as "0" or "1" occur in all files: the same name must stand for the same perturbation, too
    shared = truth.obs.set_index("perturbation", append=True).index.intersection(
        train.obs.set_index("perturbation", append=True).index
    )
    if len(shared):
        warnings.warn(
            f"`train` and `true` share {len(shared)} names of perturbed cells (first: {shared[0][0]!r}); if these are the same "
            "cells, the simple predictions have seen the truth.",
            UserWarning,
            stacklevel=scvi_settings.warnings_stacklevel,
        )


def read_predictions(
    pred: AnnData | Mapping[str, AnnData] | None, name: str, screen: Screen, columns: Columns, layer: str | None
) -> dict[str, Cells]:
    """Read and check predicted cells by name.

    Raises
    ------
    ValueError
        If predicted and measured groups differ, or a name is taken.
    """
    given = {} if pred is None else dict(pred) if isinstance(pred, Mapping) else {name: pred}
    taken = {*SHIFT_PREDICTORS, "replicate"}.intersection(given)
    if taken:
        raise ValueError(
            f"The name {min(taken)!r} of a prediction in `pred` is that of a baseline; choose another name."
        )
    return {key: _prediction(value, key, screen, columns, layer) for key, value in given.items()}


def _prediction(adata: AnnData, key: str, screen: Screen, columns: Columns, layer: str | None) -> Cells:
    role = f"pred[{key!r}]"
    has_layer = isinstance(adata, AnnData) and layer is not None and layer in adata.layers
    plain = columns._replace(shift=(), stratify=())
    cells = read_cells(adata, role, plain, layer if has_layer else None, measured=False)
    cells = require_genes(cells, role, screen.truth.genes, "true")
    cells = cells.take((cells.obs["perturbation"] != columns.names.control_key).to_numpy())
    predicted, measured = cells.groups.unique(), screen.truth.groups.unique()
    unknown = predicted.difference(measured)
    if len(unknown):
        raise ValueError(
            f"`{role}` has {len(unknown)} predicted group(s) that `true` has no cells of (first: {first_of(unknown)}); "
            "predict what was measured, in the same `pairing_keys`, or select it."
        )
    missing = screen.groups.difference(predicted)
    if len(missing):
        raise ValueError(
            f"`{role}` has no cells of {len(missing)} of the {len(screen.groups)} measured group(s) (first: "
            f"{first_of(missing)}); predict them too, or leave them out of `true`."
        )
    return cells


def _baselines(chosen: str | Sequence[str] | None, screen: Screen, min_train_cells: int) -> list[Baseline]:
    """Simple predictions that apply to at least one group."""
    names = [chosen] if isinstance(chosen, str) and chosen != "auto" else chosen
    if names is None:
        return []
    if names == "auto":
        names = list(SHIFT_PREDICTORS) if screen.train is not None else ["no_change"]
    unknown = [name for name in names if name not in SHIFT_PREDICTORS]
    if unknown:
        raise ValueError(
            f"`baselines` has {len(unknown)} unknown name(s) (first: {unknown[0]!r}); choose from "
            f"{', '.join(SHIFT_PREDICTORS)}."
        )
    if screen.train is None and set(names) - {"no_change"}:
        raise ValueError(
            f"`baselines` names {min(set(names) - {'no_change'})!r}, which rests on training cells; give them as `train=`."
        )
    chosen_predictors = {name: SHIFT_PREDICTORS[name] for name in names}
    return Baseline.fit(chosen_predictors, screen, min_train_cells)


def _long(wide: pd.DataFrame, method: str, screen: Screen) -> pd.DataFrame:
    """The tidy form of a table of scores."""
    wide = wide.rename_axis(index=["perturbation", "context"], columns="metric")
    long = wide.stack(future_stack=True).rename("value").reset_index()
    n_true = pd.Series(screen.n_true, index=screen.groups)
    keys = pd.MultiIndex.from_frame(long[["perturbation", "context"]])
    return long.assign(method=method, n_true=n_true.reindex(keys).to_numpy())[COLUMNS]


def _as_tuple(keys: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if keys is None else (keys,) if isinstance(keys, str) else tuple(dict.fromkeys(keys))


def _require_coarser(shift: tuple[str, ...], pairing: tuple[str, ...]) -> None:
    finer = [key for key in shift if key not in pairing]
    if finer:
        raise ValueError(
            f"`shift_keys` has {finer[0]!r}, which is not in `pairing_keys` ({list(pairing)}); a context must lie within "
            "one stratum of `shift_keys`, so choose some of the `pairing_keys`."
        )
