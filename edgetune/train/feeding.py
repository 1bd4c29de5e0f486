"""Batches on their way to the device: made in this process, or by others ahead of time."""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgetune.errors import EdgetuneError, ResourceError
from edgetune.tasks import Samples
from edgetune.train.batches import BatchOrder, IntArray, share_of


@dataclass(frozen=True, kw_only=True)
class Batch:
    """This process's share of a batch.

    tensors: the network's inputs and "labels", on the device.
    indices: which samples they are; none of them counts where the share is empty.
    rows: samples of the whole batch, over all processes.
    """

    tensors: dict[str, Tensor]
    indices: IntArray
    counts: bool
    rows: int
    number: int


class Feeder:
    """Gives one split's batches, epoch by epoch, from any batch on."""

    def __init__(
        self,
        samples: Samples,
        order: BatchOrder,
        *,
        device: torch.device,
        rank: int = 0,
        processes: int = 1,
        workers: int = 0,
    ) -> None:
        """Keep where batches come from and go to.

        Args:
            samples: of one split.
            order: which of them make a batch.
            device: where the tensors go.
            rank: of this process.
            processes: that share each batch.
            workers: processes that load ahead; 0 loads in this one.
        """
        self.samples, self.order = samples, order
        self._device, self._rank, self._processes = device, rank, processes
        self._plan = _Plan()
        self._loader: Any = None
        if workers:
            from torch.utils.data import DataLoader

            self._loader = DataLoader(
                _Batches(samples),  # type: ignore[arg-type]
                batch_size=None,
                sampler=self._plan,
                num_workers=workers,
                persistent_workers=True,
                pin_memory=device.type == "cuda",
                # each pass draws a seed; from the global generator it would shift dropout
                generator=torch.Generator(),
                worker_init_fn=_outlive_signals,
            )

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return len(self.order)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of `epoch` from number `start` on.

        Raises:
            ResourceError: a loading process was killed, as where memory runs out.
        """
        batches = self.order.batches(epoch)[start:]
        shares = [share_of(b, self._rank, self._processes) for b in batches]
        # a process without rows runs one all the same, which counts for nothing: the others
        # wait for its gradients
        loaded = [share if len(share) else batch[:1]
                  for share, batch in zip(shares, batches, strict=True)]  # fmt: skip
        tensors: Iterator[dict[str, Tensor]]
        if self._loader is None:
            tensors = (self.samples.batch(i.tolist(), epoch=epoch) for i in loaded)
        else:
            self._plan.keys = [(epoch, i) for i in loaded]
            tensors = self._loaded()
        for number, (batch, share, found) in enumerate(zip(batches, shares, tensors, strict=True)):
            yield Batch(
                tensors={k: v.to(self._device, non_blocking=True) for k, v in found.items()},
                indices=share,
                counts=len(share) > 0,
                rows=len(batch),
                number=start + number,
            )

    def batch_of(self, indices: IntArray) -> Batch:
        """Return this process's share of a batch of any samples, as seen in epoch 0."""
        share = share_of(indices, self._rank, self._processes)
        loaded = share if len(share) else indices[:1]
        tensors = self.samples.batch(loaded.tolist(), epoch=0)
        return Batch(
            tensors={k: v.to(self._device) for k, v in tensors.items()}, indices=share,
            counts=len(share) > 0, rows=len(indices), number=0,
        )  # fmt: skip

    def close(self) -> None:
        """End the loading processes."""
        self._loader = None

    def _loaded(self) -> Iterator[dict[str, Tensor]]:
        batches = iter(self._loader)
        while True:
            try:
                found = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise ResourceError(
                    f"a data loading process ended: {str(error).splitlines()[0]}; give the run"
                    " more (shared) memory, or use --workers 0"
                ) from error
            if isinstance(found, EdgetuneError):
                raise found
            yield found


class _Plan:
    """The keys of an epoch's batches, for torch's loader."""

    keys: list[tuple[int, IntArray]]

    def __init__(self) -> None:
        self.keys = []

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[tuple[int, IntArray]]:
        return iter(self.keys)


class _Batches:
    """Samples as a torch data set whose keys are whole batches."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __getitem__(self, key: tuple[int, IntArray]) -> dict[str, Tensor] | EdgetuneError:
        try:
            return self._samples.batch(key[1].tolist(), epoch=key[0])
        except EdgetuneError as error:
            return error  # raised here, torch would put a traceback into its one line


def _outlive_signals(worker: int) -> None:  # noqa: ARG001
    """Leave Ctrl-C and SIGTERM to the main process, which has a step and a checkpoint to make.

    Terminals and torchrun send them to the whole process group. SIGTERM itself stays what it
    is: with it multiprocessing ends a loader that is left over.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
