"""Run folders as training leaves them, without training."""

from pathlib import Path

from edgetune.config import TrainConfig
from edgetune.train.history import write_history
from edgetune.train.run import RunRecord, write_config, write_record


def write_run(
    folder: Path,
    *,
    accuracies: tuple[float, ...] = (0.5, 0.75, 0.7),
    status: str = "finished",
    checkpoint: bool = True,
    energy_wh: float | None = None,
    **config: object,
) -> Path:
    """Write a run of so many epochs; its loss is 1 - accuracy, its time a minute an epoch."""
    folder.mkdir(parents=True)
    keys = {"task": "text-classification", "model": "tiny", "data": "t.csv", "metric": "accuracy"}
    write_config(folder, TrainConfig(**{**keys, "output": str(folder), **config}))
    best = max(range(len(accuracies)), key=accuracies.__getitem__) + 1 if accuracies else 0
    metrics = {}
    if accuracies:
        metrics = {"val_accuracy": accuracies[best - 1], "val_loss": 1 - accuracies[best - 1]}
        (folder / "best.safetensors").write_bytes(b"x" * 100)
        lines = [
            {
                "epoch": n, "step": 10 * n, "train_loss": 0.5 / n, "val_loss": 1 - a,
                "val_accuracy": a, "samples_per_s": 100.0, "seconds": 60.0 * n,
            }
            for n, a in enumerate(accuracies, 1)
        ]  # fmt: skip
        write_history(folder, lines)
    record = RunRecord(
        status=status, task=str(config.get("task", "text-classification")), labels=("off", "on"),
        trainable_parameters=25, parameters=1000, frozen_sha256="0" * 64, best_epoch=best,
        metrics=metrics, seconds=60.0 * len(accuracies), energy_wh=energy_wh,
    )  # fmt: skip
    write_record(folder, record)
    if checkpoint:
        place = folder / "checkpoints" / "step-00000010"
        place.mkdir(parents=True)
        (place / "weights.safetensors").write_bytes(b"x" * 1000)
        (place / "state.json").write_bytes(b"x" * 24)
    return folder
