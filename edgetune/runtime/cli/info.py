"""`edgetune-rt info`: what a bundle is."""

import json
from pathlib import Path

import click

from edgetune.runtime.bundle import DRIFT_NAME, open_bundle
from edgetune.runtime.cli.lazy import printable
from edgetune.runtime.cli.options import BUNDLE, JSON
from edgetune.runtime.manifest import DeviceClass
from edgetune.runtime.records import to_mapping


@click.command("info")
@BUNDLE
@JSON
def command(bundle: Path, as_json: bool) -> None:
    """Say what a bundle is: task, labels, size, accuracy, what it needs."""
    opened = open_bundle(bundle)
    manifest = opened.manifest
    if as_json:
        click.echo(json.dumps(to_mapping(manifest), indent=2, ensure_ascii=False))
        return
    labels = ", ".join(manifest.labels[:12]) + (", ..." if len(manifest.labels) > 12 else "")
    rows = {
        "name": f"{manifest.name}, release {manifest.release}",
        "task": manifest.task,
        "labels": f"{len(manifest.labels)}: {labels}",
        "precision": manifest.precision,
        "profile": f"{manifest.profile} ({_device(manifest.device)})",
        "size": f"{opened.size_bytes / 2**20:.1f} MiB in {len(manifest.files)} files",
        "onnxruntime": f"{manifest.compatibility.onnxruntime_min} or newer"
        f" (opset {manifest.compatibility.opset}, IR {manifest.compatibility.ir_version})",
        "threads": str(manifest.session.intra_op_threads),
        "drift": "has a baseline" if DRIFT_NAME in manifest.files else "no baseline",
        "digest": manifest.digest[:12],
    }
    for name, metric in manifest.evaluation.metrics.items():
        rows[name] = (
            f"{metric.value:.4f} ({metric.low:.4f} to {metric.high:.4f}, 95 %;"
            f" {manifest.evaluation.samples} {manifest.evaluation.split} samples)"
        )
    if (found := manifest.calibration) is not None:
        rows["scores"] = (
            f"divided by temperature {found.temperature:.4g}: calibration error"
            f" {100 * found.ece_before:.1f} -> {100 * found.ece_after:.1f} points"
            f" ({found.samples} samples)"
        )
    if (kept := manifest.abstention) is not None:
        rows["abstains"] = (
            f"below score {kept.threshold:.4f}: {100 * kept.coverage:.1f} % of {kept.samples}"
            f" samples answered, accuracy at least {kept.low:.4f} (95 %)"
        )
    if manifest.overrides:
        rows["overrides"] = ", ".join(manifest.overrides)
    width = max(map(len, rows))
    for name, value in rows.items():
        click.echo(printable(f"{name:<{width}}  {value}"))


def _device(device: DeviceClass) -> str:
    memory = f"; {device.peak_rss_mib:.0f} MiB at the peak" if device.peak_rss_mib else ""
    return " ".join([device.arch, *device.cpu_features]) + memory
