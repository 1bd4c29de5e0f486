"""EdgeModel: load a bundle, predict."""

from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from edgetune.errors import IntegrityError
from edgetune.runtime.bundle import GOLDENS_NAME, GRAPH_NAME, Bundle, open_bundle, verify_files
from edgetune.runtime.external_data import check_external_data
from edgetune.runtime.manifest import TensorSpec
from edgetune.runtime.ort import check_version, open_session, run_session
from edgetune.runtime.tasks import open_task

# how many batches' worth of encoded samples may wait for others that they can share one with
WAITING_BATCHES = 2


class EdgeModel:
    """A bundle, ready to predict.

    One object may be used from several threads: a session is thread-safe and nothing here
    changes after loading.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        """Open the bundle's graph; `EdgeModel.load` is the way in."""
        check_version(bundle.manifest.compatibility)
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.task = open_task(bundle)
        check_external_data(bundle, GRAPH_NAME)
        self._session = open_session(
            bundle.path(GRAPH_NAME), bundle.manifest.session, threads=threads
        )
        self._outputs = [spec.name for spec in bundle.manifest.outputs]
        self._check_names("inputs", self.manifest.inputs, self._session.get_inputs())
        self._check_names("outputs", self.manifest.outputs, self._session.get_outputs())

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        threads: int | None = None,
        check: Literal["quick", "full"] = "quick",
    ) -> Self:
        """Load the bundle in folder `path`.

        Args:
            path: the bundle's folder.
            threads: overrides the number of threads that the manifest names.
            check: "quick" compares every size and the hash of all but the weights; "full"
                hashes those too.

        Raises:
            IntegrityError: the bundle is not what its manifest says.
            ConfigError: this onnxruntime cannot run it, or an extra is not installed.
        """
        bundle = open_bundle(path)
        if check == "full":
            verify_files(bundle)
        return cls(bundle, threads=threads)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the graph's logits."""
        return self.manifest.labels

    def predict(self, value: Any, *, all_scores: bool = False) -> Any:
        """Return the result for one sample, or a list of results for a list of samples.

        Args:
            value: what the task takes. Text: a string. Image: a path, the bytes of an image
                file, a PIL image, or a uint8 array of shape (height, width, 3).
            all_scores: give the probability of every label too.

        Raises:
            DataError: a sample is not what the task takes.
        """
        if self.task.is_many(value):
            return self._predict_many(list(value), all_scores)
        outputs = self._run_batch([self.task.encode(value)])
        return self.task.results(outputs, all_scores=all_scores)[0]

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Run the graph on its own arrays (with batch axis) and return its outputs by name."""
        values = run_session(self._session, self._outputs, inputs)
        return dict(zip(self._outputs, values, strict=True))

    def outputs(self, sample: Any) -> dict[str, Any]:
        """Return the graph's raw outputs for one raw sample, batch axis of 1 kept."""
        return self._run_batch([self.task.encode(sample)])

    def goldens(self) -> list[Any]:
        """Return the raw samples of the bundle's self-test."""
        return _read_goldens(self.bundle)[0]

    def self_test(self) -> float:
        """Replay the goldens and return the largest difference of a logit.

        Raises:
            IntegrityError: a logit is further from the stored one than the manifest allows.
        """
        samples, expected = _read_goldens(self.bundle)
        tolerance = self.manifest.goldens.tolerance
        worst = 0.0
        for number, (sample, stored) in enumerate(zip(samples, expected, strict=True)):
            logits = self.outputs(sample)["logits"][0]
            difference = float(np.abs(logits - stored).max())
            if not difference <= tolerance:
                raise IntegrityError(
                    f"golden {number}: a logit is {difference:.4g} from the stored one, allowed"
                    f" {tolerance:.4g}; this device does not answer as the exporter did"
                )
            worst = max(worst, difference)
        return worst

    def _predict_many(self, samples: Sequence[Any], all_scores: bool) -> list[Any]:
        results: list[Any] = [None] * len(samples)
        for batch in self._batches(samples):
            outputs = self._run_batch([arrays for _, arrays in batch])
            answers = self.task.results(outputs, all_scores=all_scores)
            for (index, _), answer in zip(batch, answers, strict=True):
                results[index] = answer
        return results

    def _batches(self, samples: Sequence[Any]) -> Iterator[list[tuple[int, dict[str, Any]]]]:
        """Yield batches of (index, encoded sample), each of one group.

        Few samples wait encoded for others of their group, so that a long list of photos
        needs no more memory than a short one.
        """
        size = self.manifest.session.max_batch
        waiting: dict[Hashable, list[tuple[int, dict[str, Any]]]] = {}
        count = 0
        for index, sample in enumerate(samples):
            arrays = self.task.encode(sample)
            key = self.task.group(arrays)
            waiting.setdefault(key, []).append((index, arrays))
            count += 1
            if len(waiting[key]) == size:
                count -= size
                yield waiting.pop(key)
            elif count >= WAITING_BATCHES * size:
                largest = max(waiting, key=lambda k: len(waiting[k]))
                count -= len(waiting[largest])
                yield waiting.pop(largest)
        yield from waiting.values()

    def _check_names(self, what: str, specs: Sequence[TensorSpec], found: Sequence[Any]) -> None:
        stated, there = {spec.name for spec in specs}, {node.name for node in found}
        if stated != there:
            raise IntegrityError(
                f"{self.bundle.folder}: the manifest names the graph's {what}"
                f" {', '.join(sorted(stated))}; the graph has {', '.join(sorted(there))}"
            )

    def _run_batch(self, encoded: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return self.run(self.task.stack(encoded))


def _read_goldens(bundle: Bundle) -> tuple[list[Any], Any]:
    """Return raw samples and the logits expected of them, shape (samples, labels)."""
    path = bundle.path(GOLDENS_NAME)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            logits = stored["logits"]
            samples = [stored[f"input_{i}"] for i in range(bundle.manifest.goldens.count)]
    except Exception as error:  # zipfile and zlib have errors of their own, numpy passes them on
        reason = str(error).split(". ")[0]  # numpy goes on to say how to load a pickle
        raise IntegrityError(f"{path}: cannot be read: {reason}") from error
    expected = (len(samples), len(bundle.manifest.labels))
    if logits.shape != expected or logits.dtype != np.float32:
        raise IntegrityError(
            f"{path}: expected logits of shape {expected}, float32; got {logits.shape},"
            f" {logits.dtype}"
        )
    # a text travels as a 0-d array of str
    return [s.item() if s.ndim == 0 else s for s in samples], logits
