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

    from edgetune.runtime.learn.learner import Learner
    from edgetune.runtime.learn.state import State
    from edgetune.runtime.learn.trainer import Trainer
    from edgetune.runtime.watch import Watch

# how many batches' worth of encoded samples may wait for others that they can share one with
WAITING_BATCHES = 2


class EdgeModel:
    """A bundle, ready to predict.

    One object may be used from several threads: a session is thread-safe, and of what changes
    after loading, the learned states, a prediction takes one and keeps to it. As a context manager
    it is closed at the end.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        watch: "Watch | None" = None,
        state: "State | None" = None,
    ) -> None:
        """Open the bundle's graph; `EdgeModel.load` is the way in."""
        check_version(bundle.manifest.compatibility)
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.task = open_task(bundle)
        check_graph(bundle, GRAPH_NAME)
        self._session = open_session(bundle, GRAPH_NAME, threads=threads)
        self._outputs = [spec.name for spec in bundle.manifest.outputs]
        self._state = state
        self._adapters: dict[str, State | None] = {}
        # what an answer needs: the watch looks at features too
        self._asked = [n for n in self._outputs if n == "logits" or (n == "features" and watch)]
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
        learned: str | Path | None = None,
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
            learned: folder in which this bundle has learned; its live state answers. None, or a
                folder where the factory state is live: the bundle as it came.

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
            state, noting = None, None
            if learned is not None:
                from edgetune.runtime.learn.state import open_state  # most models never learn

                state = open_state(bundle, learned)
            if watch is not None:
                from edgetune.runtime.watch import Watch  # most models are not watched

                labels = None if state is None else state.labels
                noting = Watch.open(watch, bundle, keep_inputs=keep_inputs, labels=labels)
            return cls(bundle, threads=threads, watch=noting, state=state)
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
        """The labels that are predicted, in the order of the logits."""
        return self.manifest.labels if self._state is None else self._state.labels

    @property
    def state(self) -> "State | None":
        """The learned state that answers; None where the bundle answers as it came."""
        return self._state

    def use(self, state: "State | None") -> None:
        """Answer with this state from the next prediction on; None is the bundle as it came."""
        self._state = state
        if self._watch is not None:
            self._watch.use_labels(self.labels, learned=state is not None)

    def add_adapter(self, name: str, learned: str | Path) -> None:
        """Hold what was learned in another folder besides, for `predict(x, adapter=name)`.

        Raises:
            ConfigError: there is no such folder, or it belongs to another bundle.
            IntegrityError: it is damaged.
        """
        from edgetune.runtime.learn.state import open_state

        self._adapters[name] = open_state(self.bundle, learned)

    def learner(self, store: str | Path | None = None, **options: Any) -> "Learner":
        """Return what teaches this model new samples and classes; see `Learner`.

        Args:
            store: folder to keep what is learned in; default: the bundle's name with ".learned",
                beside it.
            options: of `Learner.open`.

        Raises:
            ConfigError: the bundle was exported without what learning needs.
            ResourceError: another process learns there.
        """
        from edgetune.runtime.learn.learner import Learner

        return Learner.open(self, store, **options)

    def trainer(self, store: str | Path | None = None, **options: Any) -> "Trainer":
        """Return what trains this model's own tensors; see `Trainer`.

        Args:
            store: as of `learner`.
            options: of `Trainer.open`.

        Raises:
            ConfigError: the bundle was exported without a training step.
            ResourceError: another process learns there.
        """
        from edgetune.runtime.learn.trainer import Trainer

        return Trainer.open(self, store, **options)

    def predict(
        self,
        value: Any,
        *,
        all_scores: bool = False,
        timeout: float | None = None,
        adapter: str | None = None,
    ) -> Any:
        """Return the result for one sample, or a list of results for a list of samples.

        Args:
            value: what the task takes. Text: a string. Image: a path, the bytes of an image
                file, an open binary file, a PIL image, or a uint8 array of shape (height,
                width, 3), which is not copied where it is contiguous.
            all_scores: give the probability of every label too.
            timeout: longest time in seconds, for all samples together. The session is stopped
                between two of the graph's nodes.
            adapter: name of a learned state that `add_adapter` holds; None: the live one.

        Raises:
            ConfigError: there is no such adapter.
            DataError: a sample is not what the task takes.
            PredictionTimeout: `timeout` seconds were not enough.
        """
        state = self._state if adapter is None else self._adapter(adapter)
        if timeout is not None:
            with RunLimit(timeout) as limit:
                return self._predict(value, all_scores, limit, state)
        return self._predict(value, all_scores, None, state)

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
                    result = self._answer([arrays], [raw], all_scores, None, self._state)[0]
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
            return self._predict(value, all_scores, limit, self._state)

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

        Nothing learned has a part in them, unless `inputs` has trainable tensors too.

        Raises:
            DataError: `inputs` is no table of name -> array.
        """
        if not isinstance(inputs, Mapping):
            raise DataError(f"expected a table of name -> array, got {type(inputs).__name__}")
        values = run_session(self.session, self._outputs, inputs, None)
        return dict(zip(self._outputs, values, strict=True))

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

    def _adapter(self, name: str) -> "State | None":
        if name not in self._adapters:
            known = ", ".join(sorted(self._adapters)) or "none"
            raise ConfigError(f"adapter: no {name!r} was added with add_adapter; there is: {known}")
        return self._adapters[name]

    def _predict(
        self, value: Any, all_scores: bool, limit: RunLimit | None, state: "State | None"
    ) -> Any:
        if self.task.is_many(value):
            return self._predict_many(list(value), all_scores, limit, state)
        return self._answer([self.task.encode(value)], [value], all_scores, limit, state)[0]

    def _answer(
        self,
        encoded: Sequence[dict[str, Any]],
        samples: Sequence[Any],
        all_scores: bool,
        limit: RunLimit | None,
        state: "State | None",
    ) -> list[Any]:
        """Return the results of samples that share a batch; raw ones are for the watch."""
        begin = time.perf_counter()
        outputs = self._run(self.task.stack(encoded), limit, state)
        labels, learned = self.manifest.labels, False
        if state is not None:
            outputs["logits"], labels = state.logits(outputs), state.labels
            learned = not state.has_head_of(self.manifest)
        seconds = time.perf_counter() - begin
        results = self.task.results(outputs, labels, all_scores=all_scores, learned=learned)
        if self._watch is not None:
            self._watch.record(outputs, results, seconds, samples)
        return results

    def _run(
        self, inputs: Mapping[str, Any], limit: RunLimit | None, state: "State | None"
    ) -> dict[str, Any]:
        asked = self._asked
        if state is not None:
            inputs = {**inputs, **state.tensors}
            if state.head is not None and "features" not in asked:
                asked = ["features"]
        values = run_session(self.session, asked, inputs, limit)
        return dict(zip(asked, values, strict=True))

    def _predict_many(
        self,
        samples: Sequence[Any],
        all_scores: bool,
        limit: RunLimit | None,
        state: "State | None",
    ) -> list[Any]:
        results: list[Any] = [None] * len(samples)
        for batch in self._batches(samples):
            raw = [samples[index] for index, _ in batch]
            answers = self._answer([arrays for _, arrays in batch], raw, all_scores, limit, state)
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
