"""What the frozen first layers hand over, kept, so that later epochs need not compute it again.

A network whose first stages are frozen gives the same activations for the same sample in every
epoch. They are made once, in one pass of fixed batches (so a resumed run makes the very same),
and training and validation then begin behind the cut: the frozen modules' `forward` hands the
kept activation on. Whether that changes the result is tried, not assumed.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from edgetune.errors import ResourceError
from edgetune.tasks import Samples

Logits = Callable[[dict[str, Tensor]], Tensor]
# the logits behind the cut against those of the whole network, as a share of the largest:
# float32's rounding where batches are of other widths, and nothing more
TOLERANCE = 1e-4
# activations under another key than the batch's inputs
KEY = "activation"


class Refused(Exception):  # noqa: N818 (it is no failure)
    """Activations cannot be kept; the text says why."""


@dataclass(frozen=True)
class _Shape:
    """What a stage's output looked like: its tensor's shape, and what else it returned."""

    tensor: tuple[int, ...]
    others: tuple[Any, ...] | None


class Cut:
    """A network cut behind its frozen first stages."""

    def __init__(self, network: nn.Module, stages: Sequence[str]) -> None:
        """Keep the network and the module paths of the frozen stages, from the input on."""
        self._modules = [network.get_submodule(path) for path in stages]
        self._shapes: dict[int, _Shape] = {}

    def capture(self, run: Callable[[], object]) -> Tensor:
        """Return what the last frozen stage gives when `run` runs the network.

        Raises:
            Refused: the stage was not reached, or gives more than one tensor.
        """
        found: list[Tensor] = []

        def hook(number: int) -> Callable[..., None]:
            def keep(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
                tensor, others = _parts(output)
                self._shapes[number] = _Shape(tuple(tensor.shape), others)
                if number == len(self._modules) - 1:
                    found[:] = [tensor.detach()]

            return keep

        handles = [m.register_forward_hook(hook(i)) for i, m in enumerate(self._modules)]
        try:
            with torch.no_grad():
                run()
        finally:
            for handle in handles:
                handle.remove()
        if not found or len(self._shapes) != len(self._modules):
            raise Refused("a frozen stage is not run by the model")
        return found[0]

    @contextmanager
    def behind(self, activation: Tensor) -> Iterator[None]:
        """Within it the network takes `activation` for what the frozen stages give."""
        last = len(self._modules) - 1
        cut = self._shapes[last].tensor
        before = [module.__dict__.get("forward") for module in self._modules]
        for number, module in enumerate(self._modules):
            shape = self._shapes[number]
            # code between the stages may look at shapes: what has another one stays as it was
            same = len(shape.tensor) == len(cut) and shape.tensor[2:] == cut[2:]
            tokens = len(shape.tensor) == len(cut) == 3 and shape.tensor[-1] == cut[-1]
            if number == last or same or tokens:
                output: Any = activation
            else:
                zero = activation.new_zeros((1,) * len(shape.tensor))
                output = zero.expand(len(activation), *shape.tensor[1:])
            if shape.others is not None:
                output = (output, *shape.others)
            module.forward = _constant(output)
        try:
            yield
        finally:
            for module, forward in zip(self._modules, before, strict=True):
                del module.forward
                if forward is not None:
                    module.forward = forward


def _parts(output: Any) -> tuple[Tensor, tuple[Any, ...] | None]:
    if isinstance(output, Tensor):
        return output, None
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        if any(isinstance(o, Tensor) for o in output[1:]):
            raise Refused("a frozen stage hands over more than one tensor")
        return output[0], tuple(output[1:])
    raise Refused(f"a frozen stage gives a {type(output).__name__}")


def _constant(output: Any) -> Callable[..., Any]:
    def forward(*_: Any, **__: Any) -> Any:
        return output

    return forward


class KeptSamples:
    """Samples whose batches carry the kept activations instead of what they are made of.

    Of images every activation has one shape; of texts each has as many rows as the text has
    tokens, and all lie in one array.
    """

    def __init__(self, samples: Samples, store: Tensor, starts: Tensor | None) -> None:
        """Keep where the activations lie.

        Args:
            samples: what they were made of.
            store: (views * samples, ...) or, of texts, (all tokens, features).
            starts: int64, (samples + 1,), rows of each text in `store`; None for images.
        """
        self.lengths = samples.lengths
        self.views = samples.views
        self._samples, self._store, self._starts = samples, store, starts

    @property
    def nbytes(self) -> int:
        """Size of the activations."""
        return self._store.nbytes

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._samples)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Return the sample itself."""
        return self._samples[key]

    def view(self, epoch: int, index: int) -> int:
        """Return which of the sample's views `epoch` sees."""
        return self._samples.view(epoch, index)

    def outline(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return a batch without activations."""
        return self._samples.outline(indices)

    def batch(
        self, indices: Sequence[int], *, epoch: int = 0, view: int | None = None
    ) -> dict[str, Tensor]:
        """Return a batch's outline and its activations."""
        batch = self._samples.outline(indices)
        if self._starts is not None:
            chosen = torch.as_tensor(indices)
            mask = batch["attention_mask"].bool()
            starts = self._starts[chosen][:, None]  # (batch, 1)
            rows = (starts + torch.arange(mask.shape[1])).clamp_(max=len(self._store) - 1)
            kept = self._store[rows.flatten()].view(*rows.shape, -1)  # (batch, tokens, features)
            batch[KEY] = kept.masked_fill_(~mask[..., None], 0.0)
            return batch
        if self.views == 1:
            slots = torch.as_tensor(indices)
        else:
            slots = torch.tensor(
                [
                    (self.view(epoch, int(i)) if view is None else view) * len(self) + int(i)
                    for i in indices
                ]
            )
        batch[KEY] = self._store[slots]
        return batch


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where activations are kept, and how much of it they may take."""

    kind: Literal["memory", "disk"]
    folder: Path
    most_bytes: int


Progress = Callable[[int, int], None]


def keep_activations(
    cut: Cut,
    logits: Logits,
    samples: Samples,
    place: Place,
    *,
    name: str,
    batch_size: int,
    device: torch.device,
    progress: Progress,
) -> KeptSamples:
    """Make every sample's activation in each of its views and keep it.

    Args:
        cut: of a network in the mode it trains in.
        logits: runs the network on a batch.
        samples: with a finite number of views.
        place: where to keep them.
        name: of the file, where it is one.
        batch_size: samples a batch.
        device: that the network is on.
        progress: called with (done, all) samples.

    Raises:
        Refused: they take more than the place allows.
        ResourceError: the disk is full.
    """
    views = samples.views or 0
    order = _fixed_batches(samples, batch_size)
    first = cut.capture(lambda: logits(_on(samples.batch(order[0], view=0), device)))
    variable = samples.lengths is not None
    if variable and views != 1:
        raise Refused("texts have one view")
    lengths = np.asarray(samples.lengths if variable else np.ones(len(samples)), np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    shape = (
        (int(starts[-1]), *first.shape[2:])
        if variable
        else (views * len(samples), *first.shape[1:])
    )
    size = int(np.prod(shape)) * first.element_size()
    if size > place.most_bytes:
        raise Refused(
            f"what the frozen layers hand over takes {size / 2**30:.1f} GiB, more than the"
            f" {place.most_bytes / 2**30:.1f} GiB that cache_gib and this machine allow"
        )
    store = _allocate(place, name, shape, first.dtype, size)
    done = 0
    for view in range(views):
        for indices in order:
            batch = _on(samples.batch(indices, view=view), device)
            kept = cut.capture(lambda batch=batch: logits(batch)).to("cpu", store.dtype)  # type: ignore[misc]
            if variable:
                for row, index in enumerate(indices):
                    n = int(lengths[index])
                    store[int(starts[index]) : int(starts[index]) + n] = kept[row, :n]
            else:
                store[torch.as_tensor(indices) + view * len(samples)] = kept
            done += len(indices)
            progress(done, views * len(samples))
    return KeptSamples(samples, store, torch.from_numpy(starts) if variable else None)


def difference_behind(
    cut: Cut, logits: Logits, samples: Samples, kept: KeptSamples, device: torch.device
) -> float:
    """Return how far logits behind the cut are from the whole network's.

    The network is to be in evaluation mode: dropout behind the cut would make any two differ.

    Returns:
        the largest difference over a batch, as a share of the largest logit; infinite where
        the network cannot be run behind the cut at all.
    """
    indices = list(range(min(8, len(samples))))
    with torch.no_grad():
        whole = logits(_on(samples.batch(indices, view=0), device)).float()
        batch = _on(kept.batch(indices, view=0), device)
        activation = batch.pop(KEY)
        try:
            with cut.behind(activation):
                behind = logits(batch).float()
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError):
            return float("inf")
    if whole.shape != behind.shape:
        return float("inf")
    scale = max(float(whole.abs().max()), 1e-6)
    return float((whole - behind).abs().max()) / scale


def _fixed_batches(samples: Samples, batch_size: int) -> list[list[int]]:
    """Return all indices in batches of like length; the same for every run."""
    order = np.arange(len(samples))
    if samples.lengths is not None:
        order = np.argsort(np.asarray(samples.lengths), kind="stable")
    return [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]


def _allocate(
    place: Place, name: str, shape: tuple[int, ...], dtype: torch.dtype, size: int
) -> Tensor:
    if place.kind == "memory":
        return torch.empty(shape, dtype=dtype)
    place.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place.folder).free
    if free < size + 2**28:
        raise ResourceError(
            f"{place.folder}: the kept activations need {size / 2**30:.1f} GiB, free are"
            f" {free / 2**30:.1f}; make room or use --activation-cache off"
        )
    path = place.folder / name
    count = int(np.prod(shape))
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(shape)


def _on(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {k: v.to(device) for k, v in batch.items() if k != "labels"}
