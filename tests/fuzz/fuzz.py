"""Open hostile bundles for as long as one likes; see README.md.

python tests/fuzz/fuzz.py --minutes 60 [--seed N] [--keep FOLDER] [--kind KIND]
python tests/fuzz/fuzz.py --replay FILE
"""

import argparse
import contextlib
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
READERS = ("manifest", "zip", "graph")
ROUND = 300  # examples of a kind before the next one's turn


def main() -> int:
    parser = argparse.ArgumentParser(description="Open hostile bundles.")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--kind", help="only these; see README.md")
    parser.add_argument("--replay", type=Path, help="run one case that was kept")
    parser.add_argument("--reader", choices=READERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reader:
        guided(options.reader, options.minutes, options.keep)
    if options.replay:
        return replay(options.replay)
    failures = 0
    minutes = options.minutes
    if find_spec("atheris") and not options.kind:
        for reader in READERS:
            command = [
                sys.executable, __file__, "--reader", reader, "--keep", str(options.keep),
                "--minutes", str(minutes / 2 / len(READERS)),
            ]  # fmt: skip
            failures += subprocess.run(command, check=False).returncode != 0
        minutes /= 2
    failures += loop(minutes, options.seed, options.keep, options.kind)
    return 1 if failures else 0


def loop(minutes: float, seed: int, keep: Path, kind: str | None) -> int:
    """Open bundles of all kinds in turn; return how many new ways to fail there were."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from watched import Worker

    hostile = load_hostile()
    kinds = [kind] if kind else list(hostile.strategies)
    ends = time.monotonic() + 60 * minutes
    seen: set[str] = set()
    with Worker(hostile.good) as worker:

        def check(case: dict[str, Any]) -> None:
            if time.monotonic() > ends:
                return
            failures = worker.run(case)["failures"]
            if not failures:
                return
            # numbers and paths differ where the fault does not
            what = re.sub(r"\d+|/\S+|'.*?'", "", " ".join(failures))[:300]
            if what in seen:
                return
            seen.add(what)
            data = json.dumps(case)
            keep.mkdir(parents=True, exist_ok=True)
            path = keep / f"{hashlib.sha256(data.encode()).hexdigest()[:12]}.json"
            path.write_text(data)
            print(f"\n{failures}\nagain: python {__file__} --replay {path}", flush=True)

        turn = 0
        while time.monotonic() < ends:
            name = kinds[turn % len(kinds)]
            limits = settings(
                max_examples=ROUND,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            seeded(seed + turn)(limits(given(hostile.strategies[name])(check)))()
            turn += 1
            print(
                f"\r{worker.cases} bundles, {worker.loaded} of them could be loaded, {len(seen)}"
                f" ways to fail (seed {seed})",
                end="",
                flush=True,
            )
    print()
    return len(seen)


def replay(path: Path) -> int:
    """Run one case and print what happened."""
    from watched import Worker

    with Worker(load_hostile().good) as worker:
        verdict = worker.run(json.loads(path.read_text()))
    print(json.dumps(verdict, indent=2))
    return 1 if verdict["failures"] else 0


def load_hostile() -> Any:
    """Make the two good bundles that all cases begin with."""
    from hostile import Hostile, read_folder
    from tiny_bundles import make_color_bundle, make_word_bundle

    with tempfile.TemporaryDirectory() as place:
        make_color_bundle(Path(place) / "colors")
        make_word_bundle(Path(place) / "words")
        return Hostile(
            colors=read_folder(Path(place) / "colors"), words=read_folder(Path(place) / "words")
        )


def guided(reader: str, minutes: float, keep: Path) -> None:
    """Let atheris look for bytes that a reader falls over; ends the process."""
    import atheris

    hostile = load_hostile()
    with atheris.instrument_imports(include=["edgetune.runtime"]):
        from edgetune.runtime import archive, bundle, graph, manifest, records  # noqa: F401
    keep.mkdir(parents=True, exist_ok=True)
    corpus = Path(tempfile.mkdtemp(prefix=f"edgetune-{reader}-"))
    for number, files in enumerate((hostile.colors, hostile.words)):
        (corpus / f"seed{number}").write_bytes(seed_of(reader, files))
    arguments = [
        sys.argv[0], f"-max_total_time={max(1, round(60 * minutes))}", "-max_len=65536",
        "-timeout=5", "-rss_limit_mb=1024", f"-artifact_prefix={keep}/{reader}-", "-verbosity=0",
        str(corpus),
    ]  # fmt: skip
    atheris.Setup(arguments, target_of(reader, corpus.parent / f"{corpus.name}.zip"))
    atheris.Fuzz()


def seed_of(reader: str, files: dict[str, bytes]) -> bytes:
    from hostile import Zip

    whole = {"manifest": files["manifest.json"], "graph": files["model.onnx"]}
    return whole[reader] if reader in whole else Zip.of(files).build()


def target_of(reader: str, scratch: Path) -> Callable[[bytes], None]:
    """Return what is called with bytes; an error that is not edgetune's own is a find."""
    from hostile import digest

    from edgetune.errors import EdgetuneError
    from edgetune.runtime.archive import Archive
    from edgetune.runtime.graph import external_places, operator_domains, relocated
    from edgetune.runtime.manifest import dump_manifest, parse_manifest

    def read_manifest(data: bytes) -> None:
        with contextlib.suppress(ValueError, RecursionError):  # json's own, and half surrogates
            mapping = json.loads(data)
            if isinstance(mapping, dict):
                data = json.dumps({**mapping, "digest": digest(mapping)}).encode()
        with contextlib.suppress(EdgetuneError):
            dump_manifest(parse_manifest(data, where="manifest"))

    def read_zip(data: bytes) -> None:
        scratch.write_bytes(data)
        with contextlib.suppress(EdgetuneError):
            archive = Archive(scratch)
            for name, member in archive.members.items():
                assert len(bytes(archive.view(name))) == member.size
            archive.close()

    def read_graph(data: bytes) -> None:
        with contextlib.suppress(ValueError):
            operator_domains(data)
            places = external_places(data)
            assert external_places(relocated(data, lambda place: place)) == places

    return {"manifest": read_manifest, "zip": read_zip, "graph": read_graph}[reader]


if __name__ == "__main__":
    sys.exit(main())
