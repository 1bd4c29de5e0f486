"""The one place that imports onnxruntime, with its telemetry switched off first."""

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from edgetune.errors import (
    ConfigError,
    EdgetuneError,
    IntegrityError,
    PredictionTimeout,
    ResourceError,
)
from edgetune.runtime.bundle import Bundle, Folder
from edgetune.runtime.graph import Place, relocated
from edgetune.runtime.manifest import Compatibility, release_numbers

if TYPE_CHECKING:
    from edgetune.runtime.archive import Archive

# onnxruntime's own telemetry opens a network connection and writes to the user's cache
# folder within seconds of its import; a device that people ship to must do neither. The
# variable is read at import; disable_telemetry_events() afterwards does not stop it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime as onnxruntime  # others get it from here

MAX_THREADS = 1024
# tried: 1.17 and 1.18 map no external data for a graph given as bytes; 1.19 to 1.21 do, from an
# absolute path, which 1.24 refuses; from 1.22 on this option names the folder
MAPS_FROM_MEMORY = (1, 19, 0)
HAS_FOLDER_OPTION = (1, 22, 0)
FOLDER_OPTION = "session.model_external_initializers_file_folder_path"
_LEVELS = {
    "off": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def open_session(
    bundle: Bundle,
    name: str,
    *,
    threads: int | None = None,
    profile: Path | None = None,
    patterns: bool = True,
) -> Any:
    """Return an `onnxruntime.InferenceSession` of a bundle's graph, set up as its manifest says.

    Args:
        bundle: an opened one; external data is memory-mapped from where it lies, in a zip too.
        name: the graph's file.
        threads: overrides the manifest's thread count.
        profile: how the names of the profiles begin that its runs are to write.
        patterns: allot the memory of a run as a whole, once for each shape of the inputs. Of many
            shapes, each keeps its own.

    Raises:
        ConfigError: none of the execution providers is in this onnxruntime, the number of
            threads is out of bounds, or the onnxruntime is too old to read from a zip.
        IntegrityError: onnxruntime refuses the graph or a setting.
        ResourceError: memory ran out.
    """
    settings = bundle.manifest.session
    count = settings.intra_op_threads if threads is None else threads
    if type(count) is not int or not 1 <= count <= MAX_THREADS:
        raise ConfigError(f"threads: expected 1 to {MAX_THREADS}, got {count!r}")
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
    options.log_severity_level = 4  # what goes wrong is raised, and told once
    options.enable_cpu_mem_arena = settings.arena
    options.enable_mem_pattern = patterns
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        options.add_session_config_entry(
            "session.intra_op.allow_spinning", "1" if settings.allow_spinning else "0"
        )
        for key, value in settings.config.items():
            options.add_session_config_entry(key, value)
        if isinstance(bundle.files, Folder):
            graph: str | bytes = str(bundle.path(name))
        else:
            graph = _graph_in_archive(bundle, bundle.files, name, options)
        session = onnxruntime.InferenceSession(graph, options, providers=providers)
    except EdgetuneError:
        raise
    except Exception as error:  # onnxruntime's exceptions share no base but Exception
        kind = ResourceError if _lacks_memory(error) else IntegrityError
        raise kind(f"{bundle.where / name}: {_said(error)}") from error
    if not isinstance(bundle.files, Folder):
        bundle.files.check_unchanged()
    return session


def _graph_in_archive(bundle: Bundle, archive: "Archive", name: str, options: Any) -> bytes:
    """Return a graph whose external data is looked for in the archive that it lies in."""
    found = release_numbers(onnxruntime.__version__)
    if found < MAPS_FROM_MEMORY:
        raise ConfigError(
            f"{bundle.where}: onnxruntime {onnxruntime.__version__} reads no bundle from a zip;"
            f" unpack it (edgetune-rt unpack {bundle.where} FOLDER), or install 1.19 or newer"
        )
    path = bundle.where.resolve()
    if found >= HAS_FOLDER_OPTION:
        options.add_session_config_entry(FOLDER_OPTION, str(path.parent))
        location = path.name
    else:
        location = str(path)  # as these versions allow

    def move(place: Place) -> Place:
        member = archive.members[place.location]  # check_graph has seen that it is there
        length = member.size - place.offset if place.length is None else place.length
        return Place(location=location, offset=member.offset + place.offset, length=length)

    return relocated(bundle.read(name), move)


def run_session(
    session: Any,
    outputs: Sequence[str],
    inputs: Mapping[str, Any],
    limit: "RunLimit | None" = None,
) -> list[Any]:
    """Run the graph on its own arrays and return the outputs of those names.

    Raises:
        EdgetuneError: onnxruntime cannot: the arrays do not fit the graph.
        PredictionTimeout: the limit was reached.
        ResourceError: memory ran out.
    """
    try:
        if limit is None:
            return cast("list[Any]", session.run(outputs, inputs))
        limit.check()
        return cast("list[Any]", session.run(outputs, inputs, limit.options))
    except PredictionTimeout:
        raise
    except Exception as error:
        if limit is not None:
            limit.check()
        shapes = ", ".join(f"{k} {getattr(v, 'shape', '')}" for k, v in inputs.items())
        kind = ResourceError if _lacks_memory(error) else EdgetuneError
        raise kind(f"the graph cannot be run on {shapes}: {_said(error)}") from error


class RunLimit:
    """Stops session runs after some seconds, or when told to; a context manager.

    onnxruntime looks between two nodes of a graph whether it is to stop.
    """

    def __init__(self, seconds: float | None) -> None:
        """Allow `seconds` from the entry of the context on; None is no limit.

        Raises:
            ConfigError: `seconds` is not above 0.
        """
        if seconds is not None and not (isinstance(seconds, int | float) and seconds > 0):
            raise ConfigError(f"timeout: expected more than 0 seconds, got {seconds!r}")
        self.seconds = seconds
        self.options = onnxruntime.RunOptions()
        self._stopped = False
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Self:
        """Start the clock."""
        if self.seconds is not None and self.seconds < threading.TIMEOUT_MAX:
            self._timer = threading.Timer(self.seconds, self.stop)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *failure: object) -> None:
        """Stop the clock."""
        if self._timer is not None:
            self._timer.cancel()

    def stop(self) -> None:
        """Stop the run that is going on, and let none begin."""
        self._stopped = True
        self.options.terminate = True

    def check(self) -> None:
        """Raise `PredictionTimeout` if it was stopped."""
        if self._stopped:
            allowed = "" if self.seconds is None else f" within {self.seconds:g} s"
            raise PredictionTimeout(f"no answer{allowed}: the run was stopped")


def check_version(needs: Compatibility) -> None:
    """Refuse an onnxruntime that cannot run the bundle.

    Raises:
        ConfigError: this onnxruntime is older than the bundle needs, or known broken.
    """
    found = onnxruntime.__version__
    if release_numbers(found) < release_numbers(needs.onnxruntime_min):
        raise ConfigError(
            f"the bundle needs onnxruntime {needs.onnxruntime_min} or newer, found {found};"
            f" pip install 'onnxruntime>={needs.onnxruntime_min}'"
        )
    if release_numbers(found) in map(release_numbers, needs.onnxruntime_excluded):
        raise ConfigError(
            f"onnxruntime {found} is known not to work on this bundle's device"
            f" ({', '.join(needs.onnxruntime_excluded)} excluded); install another version"
        )


def version() -> str:
    """Return onnxruntime's version."""
    return str(onnxruntime.__version__)


def _lacks_memory(error: Exception) -> bool:
    words = ("bad_alloc", "bad allocation", "Failed to allocate memory", "annot allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _said(error: Exception) -> str:
    """Return onnxruntime's message on one line."""
    return f"onnxruntime {onnxruntime.__version__}: {' '.join(str(error).split())}"
