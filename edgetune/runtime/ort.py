"""The one place that imports onnxruntime, with its telemetry switched off first."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgetune.errors import ConfigError, EdgetuneError, IntegrityError
from edgetune.runtime.manifest import Compatibility, SessionSettings

# onnxruntime's own telemetry opens a network connection and writes to the user's cache
# folder within seconds of its import; a device that people ship to must do neither. The
# variable is read at import; disable_telemetry_events() afterwards does not stop it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime

MAX_THREADS = 1024
_LEVELS = {
    "off": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def open_session(model: Path, settings: SessionSettings, *, threads: int | None = None) -> Any:
    """Return an `onnxruntime.InferenceSession` of `model`, set up as the manifest says.

    Args:
        model: the .onnx file; its external data lies beside it and is memory-mapped.
        settings: from the manifest.
        threads: overrides the manifest's thread count.

    Raises:
        ConfigError: none of the execution providers is in this onnxruntime, or the number of
            threads is out of bounds.
        IntegrityError: onnxruntime refuses the graph or a setting.
    """
    count = settings.intra_op_threads if threads is None else threads
    if not 1 <= count <= MAX_THREADS:
        raise ConfigError(f"threads: expected 1 to {MAX_THREADS}, got {count}")
    available = onnxruntime.get_available_providers()
    providers = [p for p in settings.execution_providers if p in available]
    if not providers:
        raise ConfigError(
            f"this onnxruntime has {', '.join(available)}; the bundle wants one of"
            f" {', '.join(settings.execution_providers)}"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = count
    options.inter_op_num_threads = 1
    options.graph_optimization_level = _LEVELS[settings.graph_optimization]
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.intra_op.allow_spinning", "1" if settings.allow_spinning else "0"
    )
    try:
        for key, value in settings.config.items():
            options.add_session_config_entry(key, value)
        return onnxruntime.InferenceSession(str(model), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions share no base but Exception
        raise IntegrityError(f"{model}: {_said(error)}") from error


def run_session(session: Any, outputs: Sequence[str], inputs: Mapping[str, Any]) -> list[Any]:
    """Run the graph on its own arrays and return the outputs of those names.

    Raises:
        EdgetuneError: onnxruntime cannot: the arrays do not fit the graph, or memory ran out.
    """
    try:
        values: list[Any] = session.run(outputs, inputs)
    except Exception as error:
        shapes = ", ".join(f"{k} {getattr(v, 'shape', '')}" for k, v in inputs.items())
        raise EdgetuneError(f"the graph cannot be run on {shapes}: {_said(error)}") from error
    return values


def check_version(needs: Compatibility) -> None:
    """Refuse an onnxruntime that cannot run the bundle.

    Raises:
        ConfigError: this onnxruntime is older than the bundle needs, or known broken.
    """
    found = onnxruntime.__version__
    if _numbers(found) < _numbers(needs.onnxruntime_min):
        raise ConfigError(
            f"the bundle needs onnxruntime {needs.onnxruntime_min} or newer, found {found};"
            f" pip install 'onnxruntime>={needs.onnxruntime_min}'"
        )
    if _numbers(found) in map(_numbers, needs.onnxruntime_excluded):
        raise ConfigError(
            f"onnxruntime {found} is known not to work on this bundle's device"
            f" ({', '.join(needs.onnxruntime_excluded)} excluded); install another version"
        )


def version() -> str:
    """Return onnxruntime's version."""
    return str(onnxruntime.__version__)


def _numbers(text: str) -> tuple[int, ...]:
    """Return the release numbers of a version: "1.20.1rc2+cu12" -> (1, 20, 1)."""
    numbers = [int(n) for n in re.findall(r"\d+", re.split(r"[^0-9.]", text)[0])[:3]]
    return tuple(numbers + [0] * (3 - len(numbers)))


def _said(error: Exception) -> str:
    """Return onnxruntime's message on one line."""
    return f"onnxruntime {onnxruntime.__version__}: {' '.join(str(error).split())}"
