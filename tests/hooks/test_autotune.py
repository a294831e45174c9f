"""Hyperparameter search of scvi-tools (Ray Tune) over a cellweave model."""

from __future__ import annotations

import math
import signal

import pytest
import scvi

from cellweave.model import StackModel

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ray():
    """Ray on one core, quiet, shut down afterwards; the signal handlers that it sets and leaves do not stay either."""
    reason = 'needs Ray: pip install "cellweave[autotune]"'
    ray = pytest.importorskip("ray", reason=reason)
    for package in ("hyperopt", "scib_metrics"):
        pytest.importorskip(package, reason=reason)
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def test_autotune_finds_the_better_of_two_models(ray, make_adata, tiny, tmp_path):
    """Protects `scvi.autotune`: trials run, and what they report is what training with these arguments gives."""
    from ray import tune
    from scvi.autotune import run_autotune

    adata = make_adata()
    StackModel.setup_anndata(adata, batch_key="batch", context_key="donor")
    training = {"max_epochs": 2, "batch_size": 32, "accelerator": "cpu"}
    experiment = run_autotune(
        StackModel,
        data=adata,
        metrics="validation_loss",
        mode="min",
        search_space={
            "model_params": {**tiny, "n_layers": tune.choice([1])},
            "train_params": {**training, "lr": tune.loguniform(1e-4, 1e-1)},
        },
        num_samples=2,
        seed=1,
        resources={"cpu": 1},
        logging_dir=str(tmp_path),
        ignore_reinit_error=True,
    )
    results = list(experiment.result_grid)
    assert not experiment.result_grid.errors
    assert len({result.config["train_params"]["lr"] for result in results}) == 2
    assert all(math.isfinite(result.metrics["validation_loss"]) for result in results)
    best = experiment.result_grid.get_best_result("validation_loss", "min")
    assert best.metrics["validation_loss"] == min(result.metrics["validation_loss"] for result in results)

    scvi.settings.seed = 1
    model = StackModel(adata, **best.config["model_params"])
    model.train(**best.config["train_params"], enable_progress_bar=False)
    assert best.metrics["validation_loss"] == pytest.approx(model.history["validation_loss"].iloc[-1, 0], rel=1e-5)
