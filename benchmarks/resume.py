"""How far a resumed run is from the uninterrupted one, and what the machinery for it costs.

    python benchmarks/resume.py --output benchmarks/results/resume.md

Every row trains a model without interruption and once more with an interruption, then compares the final weights. The
models of cellweave are stopped by checkpoints of their own; SCVI of scvi-tools is resumed through the checkpoint of
Lightning, as its ``train(ckpt_path=...)`` does. Costs are CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
import scvi
import torch
from anndata import AnnData
from lightning.pytorch import Callback

from cellweave.model import StackModel
from cellweave.objective import derive_seed

N_CELLS, N_GENES, EPOCHS, BATCH = 2000, 500, 4, 128
RUN = {"max_epochs": EPOCHS, "batch_size": BATCH, "accelerator": "cpu", "enable_progress_bar": False}


class Act(Callback):
    """Calls a function at the start of a step, counted from one."""

    def __init__(self, step: int, function) -> None:
        self.step, self.function, self.n = step, function, 0

    def on_train_batch_start(self, trainer, plan, batch, batch_idx):
        """Count, and act at the step."""
        self.n += 1
        if self.n == self.step:
            self.function()


class SaveAfterEpoch(Callback):
    """Lets Lightning write its checkpoint at the end of an epoch."""

    def __init__(self, path: Path, epoch: int) -> None:
        self.path, self.epoch = path, epoch

    def on_train_epoch_end(self, trainer, plan):
        """Save after the epoch."""
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def simulate() -> AnnData:
    """Negative-binomial counts of four cell types."""
    rng = np.random.default_rng(0)
    profile = rng.gamma(0.5, 1.0, size=(4, N_GENES))
    kind = rng.integers(4, size=N_CELLS)
    counts = rng.poisson(profile[kind] * rng.gamma(2.0, 0.5, size=(N_CELLS, 1))).astype(np.float32)
    counts[counts.sum(1) == 0, 0] = 1
    return AnnData(sp.csr_matrix(counts), obs=pd.DataFrame(index=np.arange(N_CELLS).astype(str)))


def create(model_class: type, **options):
    """A model on the same data with the same first weights every time."""
    scvi.settings.seed = 0
    adata = simulate()
    model_class.setup_anndata(adata)
    return model_class(adata, **options)


def stack() -> StackModel:
    """The model of the table."""
    return create(StackModel, dropout=0.1)


def difference(first, second) -> float:
    """Largest absolute difference of any weight."""
    other = second.module.state_dict()
    return max((value - other[name]).abs().max().item() for name, value in first.module.state_dict().items())


def same_history(first, second) -> bool:
    """Whether all curves agree bit for bit."""
    return all(frame.equals(second.history[name]) for name, frame in first.history.items())


def interrupted(step: int, folder: Path) -> StackModel:
    """Stopped by SIGTERM from within, as a scheduler does, at a step; then continued in a new model."""
    try:
        stack().train(**RUN, checkpoint_dir=folder, callbacks=[Act(step, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    except SystemExit:
        pass
    resumed = stack()
    resumed.train(**RUN, checkpoint_dir=folder, resume="auto")
    return resumed


def killed_process(folder: Path, seconds: float) -> tuple[StackModel, str]:
    """A process of its own that gets SIGTERM from outside after some time of training; then continued here."""
    process = subprocess.Popen([sys.executable, __file__, "--train", str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()  # it says when training begins
    time.sleep(seconds)
    process.terminate()
    status = process.wait(timeout=120)
    where = max(path.stem for path in folder.iterdir())
    resumed = stack()
    resumed.train(**RUN, checkpoint_dir=folder, resume="auto")
    return resumed, f"SIGTERM from outside (exit status {status}, checkpoint `{where}`)"


def child(folder: Path) -> None:
    """What the process to be killed runs."""
    stack().train(**RUN, checkpoint_dir=folder, callbacks=[Act(1, lambda: print("training", flush=True))])


def resume_rows() -> list[str]:
    """StackModel, interrupted in five places."""
    whole = stack()
    whole.train(**RUN)
    n_steps = -(-len(whole.train_indices) // BATCH)
    rows = []

    def add(how: str, resumed: StackModel) -> None:
        same = "equal" if same_history(whole, resumed) else "differ"
        rows.append(f"| StackModel | {how} | {difference(whole, resumed):.1e} | {same} |")

    for epoch, step in [(1, n_steps), (2, 1), (2, 4), (3, n_steps - 1)]:
        where = "end of" if step == n_steps else f"step {step} of {n_steps} of"
        with tempfile.TemporaryDirectory() as folder:
            add(f"{where} epoch {epoch}", interrupted((epoch - 1) * n_steps + step, Path(folder)))
    with tempfile.TemporaryDirectory() as folder:
        resumed, how = killed_process(Path(folder), 0.7)
        add(how, resumed)
    return rows


def scvi_row() -> str:
    """The same question to SCVI, between two epochs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scvi.ckpt"
        whole = create(scvi.model.SCVI)
        whole.train(**RUN, callbacks=[SaveAfterEpoch(path, 1)])
        resumed = create(scvi.model.SCVI)
        resumed.train(**RUN, ckpt_path=path)
    parts = {name: frame.index for name, frame in resumed.history.items()}  # it has the continued epochs only
    same = all(resumed.history[name].equals(whole.history[name].loc[epochs]) for name, epochs in parts.items())
    history = f"{'equal' if same else 'differ'} in the continued epochs, the others are lost"
    return f"| SCVI (scvi-tools) | end of epoch 2, `ckpt_path` | {difference(whole, resumed):.1e} | {history} |"


def cost_rows() -> list[str]:
    """CPU time of a training step, and of what determinism adds to it."""
    model = stack()
    model.train(**{**RUN, "max_epochs": 1})
    steps, start = 0, time.process_time()
    model.train(**{**RUN, "max_epochs": 6})
    elapsed = time.process_time() - start
    steps = 6 * -(-len(model.train_indices) // BATCH)
    n = 20_000
    start = time.process_time()
    for batch in range(n):  # what CellweaveTrainingPlan does per batch
        seed = derive_seed(0, 0, 3, batch)
        torch.default_generator.manual_seed(derive_seed(seed, 0))
        torch.tensor(seed)
        for stream in (0, 1):  # masked genes, loss
            torch.Generator().manual_seed(derive_seed(seed, stream))
        for context in range(2):  # prior samples of each context
            torch.Generator().manual_seed(derive_seed(seed, context))
    seeding = (time.process_time() - start) / n
    step = elapsed / steps
    return [
        f"| training step (validation included), {BATCH} cells x {N_GENES} genes | {1e3 * step:.2f} ms | |",
        f"| seeding of a step | {1e3 * seeding:.3f} ms | {100 * seeding / step:.2f} % |",
    ]


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if arguments.train:
        child(arguments.train)
        return
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "scvi-tools"))
    text = "\n".join(
        [
            "# Exact resume",
            "",
            f"`python benchmarks/resume.py --output benchmarks/results/resume.md` ({versions}, Python "
            f"{platform.python_version()}, one CPU thread). {N_CELLS} simulated cells x {N_GENES} genes, {EPOCHS} epochs "
            "with validation; StackModel with dropout 0.1.",
            "",
            "| model | interrupted | max. weight difference to the uninterrupted run | history |",
            "| --- | --- | --- | --- |",
            *resume_rows(),
            scvi_row(),
            "",
            "| cost of determinism | CPU time | share of a step |",
            "| --- | --- | --- |",
            *cost_rows(),
            "",
        ]
    )
    if arguments.output:
        arguments.output.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
