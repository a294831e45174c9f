"""Markdown tables of the integration benchmark."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np

Run: TypeAlias = dict[str, Any]
Groups: TypeAlias = dict[tuple[str, str], list[Run]]

SCIB_COLUMNS = {
    "Isolated labels": "iso",
    "KMeans NMI": "NMI",
    "KMeans ARI": "ARI",
    "Silhouette label": "sil",
    "cLISI": "cLISI",
    "BRAS": "BRAS",
    "iLISI": "iLISI",
    "KBET": "kBET",
    "Graph connectivity": "graph",
    "PCR comparison": "PCR",
    "bio": "**bio**",
    "batch": "**batch**",
    "total": "**total**",
}


def group_runs(runs: list[Run], datasets: Iterable[str], methods: Iterable[str]) -> Groups:
    """Runs of the same data set and method, in the given order of both."""
    pairs = itertools.product(datasets, list(methods))
    groups = {pair: [run for run in runs if (run["dataset"], run["method"]) == pair] for pair in pairs}
    return {pair: found for pair, found in groups.items() if found}


def mean_sd(values: list[float], digits: int = 3) -> str:
    """``mean ± sd`` (sample standard deviation), or the bare value of a single run."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Format rows as a markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def score_table(groups: Groups) -> str:
    """Mean and standard deviation over seeds of every score."""
    rows = []
    for (dataset, method), runs in groups.items():
        scores = [mean_sd([run["scores"][column] for run in runs]) for column in SCIB_COLUMNS]
        rows.append([dataset, method, str(len(runs)), *scores, mean_sd([run["cpu_s"] for run in runs], 1)])
    return markdown_table(["data", "method", "seeds", *SCIB_COLUMNS.values(), "fit CPU-s"], rows)


def held_out_table(groups: Groups) -> str | None:
    """Masked reconstruction of held-out cells for the methods that measure it."""
    measured = {key: runs for key, runs in groups.items() if all(run.get("held_out") for run in runs)}
    if not measured:
        return None
    columns = list(dict.fromkeys(name for runs in measured.values() for run in runs for name in run["held_out"]))
    rows = [
        [*key, *(mean_sd([run["held_out"].get(name, np.nan) for run in runs]) for name in columns)]
        for key, runs in measured.items()
    ]
    return markdown_table(["data", "method", *columns], rows)


def render(groups: Groups, command: str) -> str:
    """Build the whole result page."""
    runs = [run for found in groups.values() for run in found]
    environments = sorted({json.dumps(run["environment"], sort_keys=True) for run in runs})
    held_out = held_out_table(groups)
    parts = [
        "# Integration",
        f"Written by `{command}` after the steps `prepare`, `run` and `score` of the same script; its docstring states "
        "the protocol. Mean ± sample standard deviation over seeds; total = 0.6 bio + 0.4 batch, no min-max scaling.",
        score_table(groups),
        f"## Masked reconstruction of held-out cells\n\n{held_out}" if held_out else None,
        "## Environment\n\n" + "\n".join(f"* `{line}`" for line in environments),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
