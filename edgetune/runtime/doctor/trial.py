"""Run a bundle once, in a process of its own, and say what came of it.

An onnxruntime that was built for another CPU dies of an illegal instruction, and Linux kills what
takes too much memory: whoever asks whether a device can run a bundle must outlive the answer.

    python -m edgetune.runtime.doctor.trial BUNDLE [--no-goldens]

prints one JSON object, a `Trial`, at every stage that it reaches.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgetune.errors import ConfigError, EdgetuneError, ResourceError
from edgetune.runtime.bundle import GRAPH_NAME, open_bundle
from edgetune.runtime.measure import peak_rss_mib
from edgetune.runtime.records import from_mapping, to_mapping

# records to which provider each node went; onnxruntime passes over keys that it does not know
RECORD_KEY = "session.record_ep_graph_assignment_info"
LIMIT_S = 600.0
# what an error is in truth, by the words of onnxruntime, Python and the C library
_TOO_OLD = r"max supported IR version|Opset \d+ is under development"
_NO_MEMORY = (
    r"failed to map segment|bad_?alloc|[Cc]annot allocate memory|MemoryError|memory allocation of"
)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How far a bundle came on this machine.

    `stage` is what was done last, or failed with `error` and the exit code of its kind.
    `nodes` counts the graph's nodes, execution provider -> type -> how many: "assigned" as
    onnxruntime distributed them, before it fuses those that belong together; "run" as it ran
    them, after all its optimisation; empty where this onnxruntime does not tell.
    `difference` is the largest of a golden's logits from the stored one. `peak_rss_mib` is of
    the process that answered the goldens.
    """

    stage: Literal["import", "load", "goldens", "done"]
    error: str = ""
    exit_code: int = 0
    onnxruntime: str = ""
    available: tuple[str, ...] = ()
    nodes: dict[str, dict[str, int]] = field(default_factory=dict)
    nodes_are: Literal["assigned", "run"] = "assigned"
    difference: float | None = None
    peak_rss_mib: float | None = None


def try_bundle(path: str | Path, *, goldens: bool = True, limit_s: float = LIMIT_S) -> Trial:
    """Load the bundle at `path` in a fresh Python and replay its goldens there.

    Args:
        path: a bundle whose files have been verified.
        goldens: replay them.
        limit_s: seconds until the process is stopped.
    """
    command = [sys.executable, "-P", "-m", "edgetune.runtime.doctor.trial", str(path)]
    search = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)  # noqa: PTH100
    try:
        done = subprocess.run(
            command if goldens else [*command, "--no-goldens"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=limit_s,
            env={**os.environ, "PYTHONPATH": search, "PYTHONIOENCODING": "utf-8"},
        )
    except subprocess.TimeoutExpired as expired:
        output: bytes | None = expired.stdout  # whatever the encoding was to be
        reached = _last((output or b"").decode(errors="replace"))
        return _failed(reached, f"no answer within {limit_s:g} s", ResourceError.exit_code)
    except OSError as error:
        reason = f"cannot start {sys.executable or 'Python'}: {error.strerror or error}"
        return _failed(_last(""), reason, ResourceError.exit_code)
    reached = _last(done.stdout)
    if done.returncode == 0:
        return reached
    return _failed(reached, *_cause(done.returncode, done.stderr))


def attempt(path: str | Path, *, goldens: bool = True) -> Iterator[Trial]:
    """Do in this process what `try_bundle` has done in another; yield at every stage."""
    now = Trial(stage="import")
    yield now
    try:
        from edgetune.runtime import ort
        from edgetune.runtime.model import EdgeModel

        now = dataclasses.replace(
            now,
            stage="load",
            onnxruntime=ort.version(),
            available=tuple(ort.onnxruntime.get_available_providers()),
        )
        yield now
        bundle = open_bundle(path)
        config = {**bundle.manifest.session.config, RECORD_KEY: "1"}
        session = dataclasses.replace(bundle.manifest.session, config=config)
        manifest = dataclasses.replace(bundle.manifest, session=session)
        with EdgeModel(dataclasses.replace(bundle, manifest=manifest)) as model:
            now = dataclasses.replace(now, stage="goldens", nodes=_assigned(model.session))
            yield now
            if goldens and manifest.goldens.count:
                difference = model.self_test()
                now = dataclasses.replace(now, difference=difference, peak_rss_mib=peak_rss_mib())
            if not now.nodes and manifest.goldens.count:
                now = dataclasses.replace(now, nodes=_ran(model), nodes_are="run")
        yield dataclasses.replace(now, stage="done")
    except EdgetuneError as error:
        yield _failed(now, str(error), error.exit_code)
    except ImportError as error:
        yield _failed(now, str(error), ConfigError.exit_code)
    except (OSError, MemoryError) as error:
        yield _failed(now, str(error) or type(error).__name__, ResourceError.exit_code)


def _assigned(session: Any) -> dict[str, dict[str, int]]:
    """Count the nodes of each provider as onnxruntime distributed them; {} if it is too old."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return {}
    parts = session.get_provider_graph_assignment_info()
    return _count([(part.ep_name, node.op_type) for part in parts for node in part.get_nodes()])


def _ran(model: Any) -> dict[str, dict[str, int]]:
    """Count the nodes of each provider from a profile of one golden's answer; {} if that fails."""
    from edgetune.runtime.ort import open_session

    try:
        inputs = model.task.stack([model.task.encode(model.goldens()[0])])
        with tempfile.TemporaryDirectory() as folder:
            session = open_session(
                model.bundle, GRAPH_NAME, threads=1, profile=Path(folder, "profile")
            )
            session.run(None, inputs)
            events = json.loads(Path(session.end_profiling()).read_bytes())
    except Exception:  # onnxruntime's share no base; the answer is worth more than the profile
        return {}
    return _count_events(events)


def _count_events(events: list[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Count the nodes in a profile of one run; only the event of a node's kernel has a provider."""
    ran = [e["args"] for e in events if e.get("cat") == "Node" and "provider" in e.get("args", {})]
    return _count([(arguments["provider"], arguments["op_name"]) for arguments in ran])


def _count(pairs: list[tuple[str, str]]) -> dict[str, dict[str, int]]:
    return {
        provider: dict(Counter(op for p, op in pairs if p == provider).most_common())
        for provider in dict.fromkeys(p for p, _ in pairs)
    }


def _last(output: str) -> Trial:
    """Return the last stage in a process's output; the last line of one that died may be cut."""
    for line in reversed(output.splitlines()):
        try:
            return from_mapping(Trial, json.loads(line), where="trial")
        except (ValueError, EdgetuneError):
            continue
    return Trial(stage="import")


def _cause(code: int, stderr: str) -> tuple[str, int]:
    """Say what a process died of, and the exit code of the error that it is."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    lines += [line for line in lines if re.search(_NO_MEMORY, line)]  # before what followed from it
    if code >= 0:
        return (lines[-1] if lines else f"ended with exit code {code}"), EdgetuneError.exit_code
    name = signal.strsignal(-code) or f"signal {-code}"
    why, exit_code = lines[-1] if lines else "it left no word", EdgetuneError.exit_code
    if -code == getattr(signal, "SIGILL", None):
        why, exit_code = "this onnxruntime was built for another CPU", ConfigError.exit_code
    elif -code == getattr(signal, "SIGKILL", None):
        why, exit_code = "memory ran out, most likely", ResourceError.exit_code
    return f"the process died of {name}: {why}", exit_code


def _failed(reached: Trial, error: str, exit_code: int) -> Trial:
    if re.search(_TOO_OLD, error):
        exit_code = ConfigError.exit_code
    elif re.search(_NO_MEMORY, error):
        exit_code = ResourceError.exit_code
    return dataclasses.replace(reached, error=error, exit_code=exit_code)


def main(arguments: list[str]) -> None:
    """Print every stage as a line of JSON."""
    for trial in attempt(arguments[0], goldens="--no-goldens" not in arguments[1:]):
        print(json.dumps(to_mapping(trial)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
