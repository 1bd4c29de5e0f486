"""EdgeModel: load a bundle, predict."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from edgetune.errors import IntegrityError
from edgetune.runtime.bundle import GOLDENS_NAME, GRAPH_NAME, Bundle, open_bundle, verify_files
from edgetune.runtime.ort import check_version, open_session
from edgetune.runtime.tasks import open_task


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
        self._session = open_session(
            bundle.path(GRAPH_NAME), bundle.manifest.session, threads=threads
        )
        self._outputs = [spec.name for spec in bundle.manifest.outputs]

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
        values = self._session.run(self._outputs, inputs)
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
            IntegrityError: a logit is further from the stored one than the manifest allows, or
                a label that was clear is another.
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
            second, first = np.sort(stored)[-2:]
            if first - second > 2 * tolerance and logits.argmax() != stored.argmax():
                raise IntegrityError(
                    f"golden {number}: expected {self.labels[stored.argmax()]!r},"
                    f" got {self.labels[logits.argmax()]!r}"
                )
            worst = max(worst, difference)
        return worst

    def _predict_many(self, samples: Sequence[Any], all_scores: bool) -> list[Any]:
        groups: dict[Any, list[int]] = {}
        encoded = [self.task.encode(sample) for sample in samples]
        for index, arrays in enumerate(encoded):
            groups.setdefault(self.task.group(arrays), []).append(index)
        results: list[Any] = [None] * len(encoded)
        size = self.manifest.session.max_batch
        for members in groups.values():
            for start in range(0, len(members), size):
                batch = members[start : start + size]
                outputs = self._run_batch([encoded[i] for i in batch])
                answers = self.task.results(outputs, all_scores=all_scores)
                for index, answer in zip(batch, answers, strict=True):
                    results[index] = answer
        return results

    def _run_batch(self, encoded: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return self.run(self.task.stack(encoded))


def _read_goldens(bundle: Bundle) -> tuple[list[Any], Any]:
    """Return raw samples and the logits expected of them, shape (samples, labels)."""
    path = bundle.path(GOLDENS_NAME)
    try:
        with np.load(path, allow_pickle=False) as stored:
            logits = stored["logits"]
            samples = [stored[f"input_{i}"] for i in range(bundle.manifest.goldens.count)]
    except (OSError, ValueError, KeyError) as error:
        raise IntegrityError(f"{path}: cannot be read: {error}") from error
    if logits.shape != (len(samples), len(bundle.manifest.labels)):
        raise IntegrityError(
            f"{path}: expected logits of shape {(len(samples), len(bundle.manifest.labels))},"
            f" got {logits.shape}"
        )
    # a text travels as a 0-d array of str
    return [s.item() if s.ndim == 0 else s for s in samples], logits
