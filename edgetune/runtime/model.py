"""EdgeModel: load a bundle, predict."""

import threading
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from edgetune.errors import ConfigError, DataError, EdgetuneError, IntegrityError
from edgetune.runtime.bundle import GRAPH_NAME, Bundle, open_bundle, verify_files
from edgetune.runtime.graph import check_graph
from edgetune.runtime.manifest import TensorSpec
from edgetune.runtime.ort import RunLimit, check_version, open_session, run_session
from edgetune.runtime.tasks import open_task

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from edgetune.runtime.watch import Watch

# how many batches' worth of encoded samples may wait for others that they can share one with
WAITING_BATCHES = 2


class EdgeModel:
    """A bundle, ready to predict.

    One object may be used from several threads: a session is thread-safe and nothing here
    changes after loading. As a context manager it is closed at the end.
    """

    def __init__(
        self, bundle: Bundle, *, threads: int | None = None, watch: "Watch | None" = None
    ) -> None:
        """Open the bundle's graph; `EdgeModel.load` is the way in."""
        check_version(bundle.manifest.compatibility)
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.task = open_task(bundle)
        check_graph(bundle, GRAPH_NAME)
        self._session = open_session(bundle, GRAPH_NAME, threads=threads)
        self._outputs = [spec.name for spec in bundle.manifest.outputs]
        self._check_names("inputs", self.manifest.inputs, self._session.get_inputs())
        self._check_names("outputs", self.manifest.outputs, self._session.get_outputs())
        self._executor: ThreadPoolExecutor | None = None
        self._watch = watch
        self._closing = threading.Lock()

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        threads: int | None = None,
        check: Literal["quick", "full"] = "quick",
        watch: str | Path | None = None,
        keep_inputs: int = 0,
    ) -> Self:
        """Load the bundle in folder or zip `path`.

        Args:
            path: the bundle's folder, or the one file that `edgetune-rt pack` makes of it; that
                is read where it lies, nothing is unpacked.
            threads: overrides the number of threads that the manifest names.
            check: "quick" compares every size and the hash of all but the weights; "full"
                hashes those too.
            watch: folder, or .jsonl file, to note in what was predicted: counts, latency,
                scores, drift; see `runtime.watch`. None notes nothing.
            keep_inputs: how many texts or paths, those of the lowest scores, to note with each
                window; nothing of the inputs is noted otherwise.

        Raises:
            IntegrityError: the bundle is not what its manifest says.
            ConfigError: this onnxruntime cannot run it, or an extra is not installed.
            ResourceError: a file cannot be read.
        """
        if check not in ("quick", "full"):
            raise ConfigError(f"check: expected 'quick' or 'full', got {check!r}")
        if keep_inputs and watch is None:
            raise ConfigError("keep_inputs: there is no watch to keep them in; name its folder")
        bundle = open_bundle(path)
        try:
            if check == "full":
                verify_files(bundle)
            if watch is None:
                return cls(bundle, threads=threads)
            from edgetune.runtime.watch import Watch  # most models are not watched

            noting = Watch.open(watch, bundle, keep_inputs=keep_inputs)
            return cls(bundle, threads=threads, watch=noting)
        except BaseException:
            bundle.files.close()
            raise

    def __enter__(self) -> Self:
        """Return the model."""
        return self

    def __exit__(self, *failure: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Give back the session's memory and threads; nothing can be predicted any more.

        What was watched and not written yet is written.
        """
        with self._closing:
            executor, self._executor = self._executor, None
            session, self._session = self._session, None
        if executor is not None:
            executor.shutdown(wait=True)  # what waits there is told that the model was closed
        del session
        self.flush_watch()
        self.bundle.files.close()

    def flush_watch(self) -> None:
        """Write what was watched and not written yet."""
        if self._watch is not None:
            self._watch.close()

    @property
    def session(self) -> Any:
        """The `onnxruntime.InferenceSession`, for what has no way here.

        Raises:
            EdgetuneError: the model was closed.
        """
        if self._session is None:
            raise EdgetuneError(f"{self.bundle.where}: this model was closed")
        return self._session

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the graph's logits."""
        return self.manifest.labels

    def predict(self, value: Any, *, all_scores: bool = False, timeout: float | None = None) -> Any:
        """Return the result for one sample, or a list of results for a list of samples.

        Args:
            value: what the task takes. Text: a string. Image: a path, the bytes of an image
                file, an open binary file, a PIL image, or a uint8 array of shape (height,
                width, 3), which is not copied where it is contiguous.
            all_scores: give the probability of every label too.
            timeout: longest time in seconds, for all samples together. The session is stopped
                between two of the graph's nodes.

        Raises:
            DataError: a sample is not what the task takes.
            PredictionTimeout: `timeout` seconds were not enough.
        """
        if timeout is not None:
            with RunLimit(timeout) as limit:
                return self._predict(value, all_scores, limit)
        return self._predict(value, all_scores, None)

    def predict_stream(
        self,
        samples: Iterable[Any],
        *,
        all_scores: bool = False,
        queue_size: int = 2,
        errors: Literal["raise", "return"] = "raise",
    ) -> Iterator[Any]:
        """Yield the result for each sample, in order, while the next ones are being decoded.

        A thread takes samples and decodes them, no more than `queue_size` beyond the one that is
        being answered. It ends with the generator.

        Args:
            samples: any iterable: frames of a camera, lines of a file.
            all_scores: give the probability of every label too.
            queue_size: how many samples may be taken ahead.
            errors: "raise" ends the stream with the first sample that can't be answered;
                "return" yields its `EdgetuneError` in its place and goes on.

        Raises:
            DataError: a sample is not what the task takes.
        """
        if queue_size < 1:
            raise ConfigError(f"queue_size: expected 1 or more, got {queue_size}")
        if errors not in ("raise", "return"):
            raise ConfigError(f"errors: expected 'raise' or 'return', got {errors!r}")
        if isinstance(samples, str | bytes):
            raise DataError("expected samples to iterate over, got one; that is what predict takes")
        return self._stream(samples, all_scores, queue_size, errors == "raise")

    def _stream(
        self, samples: Iterable[Any], all_scores: bool, queue_size: int, raises: bool
    ) -> Iterator[Any]:
        from edgetune.runtime.stream import ahead  # most programs stream nothing

        def encode(sample: Any) -> tuple[Any, dict[str, Any]]:
            return sample, self.task.encode(sample)

        with ahead(encode, samples, queue_size) as encoded:
            for item in encoded:
                try:
                    if isinstance(item, EdgetuneError):
                        raise item
                    raw, arrays = item
                    result = self._answer([arrays], [raw], all_scores, None)[0]
                except EdgetuneError as error:
                    if raises or self._session is None:
                        raise
                    result = error
                yield result

    async def apredict(
        self, value: Any, *, all_scores: bool = False, timeout: float | None = None
    ) -> Any:
        """Return what `predict` does, without blocking the event loop; `close` blocks it.

        Calls are answered one after the other, in a thread of the model's own. A call that is
        cancelled stops its session run, or is taken out of the queue.
        """
        import asyncio  # most programs need neither
        from concurrent.futures import ThreadPoolExecutor

        limit = RunLimit(timeout)

        def call() -> Any:
            limit.check()
            return self._predict(value, all_scores, limit)

        with self._closing:  # so that no thread is made that nobody ends
            self.session  # noqa: B018 - says that the model was closed
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="edgetune")
            future = asyncio.get_running_loop().run_in_executor(self._executor, call)
        try:
            # not the limit's own clock: a call that waits for its turn has no run to be stopped
            done, _ = await asyncio.wait({future}, timeout=timeout)
        finally:
            if not future.done():  # too late, or cancelled
                limit.stop()
                future.cancel()
        if not done:
            limit.check()
        return future.result()

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run the graph on its own arrays (with batch axis) and return its outputs by name.

        Raises:
            DataError: `inputs` is no table of name -> array.
        """
        if not isinstance(inputs, Mapping):
            raise DataError(f"expected a table of name -> array, got {type(inputs).__name__}")
        return self._run(inputs, None)

    def outputs(self, sample: Any) -> dict[str, Any]:
        """Return the graph's raw outputs for one raw sample, batch axis of 1 kept."""
        return self.run(self.task.stack([self.task.encode(sample)]))

    def goldens(self) -> list[Any]:
        """Return the raw samples of the bundle's self-test."""
        from edgetune.runtime.goldens import read_goldens  # a start reads none

        return read_goldens(self.bundle, self.task)[0]

    def self_test(self) -> float:
        """Replay the goldens and return the largest difference of a logit.

        Raises:
            IntegrityError: a logit is further from the stored one than the manifest allows.
        """
        from edgetune.runtime.goldens import read_goldens

        samples, expected = read_goldens(self.bundle, self.task)
        tolerance = self.manifest.goldens.tolerance
        worst = 0.0
        for number, (sample, stored) in enumerate(zip(samples, expected, strict=True)):
            logits = self.outputs(sample).get("logits")
            if logits is None or logits.shape != (1, *stored.shape) or logits.dtype != np.float32:
                raise IntegrityError(
                    f"golden {number}: the graph gives no logits of shape {(1, *stored.shape)},"
                    " float32"
                )
            with np.errstate(all="ignore"):  # infinite less infinite is no number, and refused
                difference = float(np.abs(logits[0] - stored).max(initial=0.0))
            if not difference <= tolerance:
                raise IntegrityError(
                    f"golden {number}: a logit is {difference:.4g} from the stored one, allowed"
                    f" {tolerance:.4g}; this device does not answer as the exporter did"
                )
            worst = max(worst, difference)
        return worst

    def _predict(self, value: Any, all_scores: bool, limit: RunLimit | None) -> Any:
        if self.task.is_many(value):
            return self._predict_many(list(value), all_scores, limit)
        return self._answer([self.task.encode(value)], [value], all_scores, limit)[0]

    def _answer(
        self,
        encoded: Sequence[dict[str, Any]],
        samples: Sequence[Any],
        all_scores: bool,
        limit: RunLimit | None,
    ) -> list[Any]:
        """Return the results of samples that share a batch; raw ones are for the watch."""
        begin = time.perf_counter()
        outputs = self._run(self.task.stack(encoded), limit)
        seconds = time.perf_counter() - begin
        results = self.task.results(outputs, all_scores=all_scores)
        if self._watch is not None:
            self._watch.record(outputs, results, seconds, samples)
        return results

    def _run(self, inputs: Mapping[str, Any], limit: RunLimit | None) -> dict[str, Any]:
        values = run_session(self.session, self._outputs, inputs, limit)
        return dict(zip(self._outputs, values, strict=True))

    def _predict_many(
        self, samples: Sequence[Any], all_scores: bool, limit: RunLimit | None
    ) -> list[Any]:
        results: list[Any] = [None] * len(samples)
        for batch in self._batches(samples):
            raw = [samples[index] for index, _ in batch]
            answers = self._answer([arrays for _, arrays in batch], raw, all_scores, limit)
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
                f"{self.bundle.where}: the manifest names the graph's {what}"
                f" {', '.join(sorted(stated))}; the graph has {', '.join(sorted(there))}"
            )
