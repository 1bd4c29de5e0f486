"""Write a bundle's files and its manifest."""

import dataclasses
import io
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgetune import __version__
from edgetune.export.graph import IR_VERSION, OPSET, save_graph, tensor_specs
from edgetune.profile import DeviceProfile
from edgetune.runtime.bundle import GOLDENS_NAME, GRAPH_NAME, file_sha256
from edgetune.runtime.files import flush
from edgetune.runtime.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Compatibility,
    DeviceClass,
    Evaluation,
    FileEntry,
    Goldens,
    Manifest,
    SessionSettings,
    dump_manifest,
)

CARD_NAME = "MODEL_CARD.md"
NO_EVALUATION = Evaluation(split="", samples=0, metrics={})


def write_draft(
    folder: Path,
    model: onnx.ModelProto,
    *,
    name: str,
    release: int,
    task: str,
    labels: Sequence[str],
    precision: str,
    profile: DeviceProfile,
    options: Mapping[str, Any],
    files: Mapping[str, bytes],
    max_batch: int,
    session_config: Mapping[str, str] | None = None,
) -> Manifest:
    """Write a bundle that lacks only goldens, metrics and model card, and can be run already."""
    folder.mkdir(parents=True)
    save_graph(model, folder / GRAPH_NAME)
    for file_name, data in files.items():
        (folder / file_name).write_bytes(data)
    inputs, outputs = tensor_specs(model)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        release=release,
        task=task,
        labels=tuple(labels),
        precision=precision,
        profile=profile.name,
        options=dict(options),
        inputs=inputs,
        outputs=outputs,
        compatibility=Compatibility(
            onnxruntime_min=profile.runtime.onnxruntime_min,
            onnxruntime_excluded=profile.runtime.onnxruntime_excluded,
            opset=OPSET,
            ir_version=IR_VERSION,
        ),
        device=DeviceClass(
            arch=profile.cpu.arch,
            cpu_features=profile.cpu.features,
            int8=profile.cpu.int8,
        ),
        session=SessionSettings(
            execution_providers=profile.runtime.execution_providers,
            intra_op_threads=profile.runtime.intra_op_threads,
            allow_spinning=profile.runtime.allow_spinning,
            arena=profile.runtime.arena,
            config=dict(session_config or {}),
            max_batch=max_batch,
        ),
        evaluation=NO_EVALUATION,
        reference=NO_EVALUATION,
        goldens=Goldens(count=0, tolerance=0.0),
        files={},
        edgetune_version=__version__,
    )
    return write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write manifest.json with the size and hash of every other file there; return it whole."""
    entries = {
        path.name: FileEntry(size=path.stat().st_size, sha256=file_sha256(path))
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST_NAME
    }
    manifest = dataclasses.replace(manifest, files=entries)
    (folder / MANIFEST_NAME).write_bytes(dump_manifest(manifest))
    return manifest


def write_goldens(
    folder: Path,
    samples: Sequence[Any],
    encoded: Sequence[Mapping[str, np.ndarray]],
    logits: np.ndarray,
) -> None:
    """Write goldens.npz, uncompressed: what a device is asked and the logits expected of it.

    Args:
        folder: the bundle's.
        samples: raw: str, or uint8 pixels of shape (height, width, 3).
        encoded: the graph's own inputs; token ids are stored too, for programs that have no
            tokenizer.
        logits: shape (samples, labels).
    """
    arrays: dict[str, Any] = {f"input_{i}": np.array(sample) for i, sample in enumerate(samples)}
    arrays |= {f"ids_{i}": e["input_ids"] for i, e in enumerate(encoded) if "input_ids" in e}
    buffer = io.BytesIO()
    np.savez(buffer, logits=logits.astype(np.float32), **arrays)
    (folder / GOLDENS_NAME).write_bytes(buffer.getvalue())


def publish(staging: Path, output: Path) -> None:
    """Flush a finished bundle to disk and move it to its place in one step."""
    for path in staging.iterdir():
        path.chmod(0o644)
        flush(path)
    flush(staging)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.exists():  # empty: the caller has looked
        output.rmdir()
    staging.rename(output)
    flush(output.parent)


def discard(folder: Path) -> None:
    """Remove a folder of intermediate files."""
    shutil.rmtree(folder, ignore_errors=True)
