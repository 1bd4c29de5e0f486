"""An exponential moving average of the weights (Polyak & Juditsky 1992, with forgetting)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from edgetune.errors import ConfigError
from edgetune.train.sharding import reshard


class Ema:
    """Averages of what trains: trainable parameters, and float buffers of modules with any.

    What trains is settled here, so make it where all that ever trains has `requires_grad`, and
    after the network is on its device and sharded. Averages are float32 at least: in bfloat16
    a step of 1 - decay would be rounded away.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        """Start from the network's present weights; 0 <= `decay` < 1."""
        self.decay = decay
        self._network = network
        self._parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}
        # a buffer may be replaced by another tensor, so it is looked up each time
        self._buffers = {
            f"{prefix}.{name}" if prefix else name: (module, name)
            for prefix, module in network.named_modules()
            if any(p.requires_grad for p in module.parameters(recurse=False))
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_floating_point()
        }
        self._averages = {
            name: tensor.to(_wide(tensor), copy=True) for name, tensor in self._live().items()
        }

    def update(self, step: int) -> None:
        """Move the averages towards the weights after an optimizer step.

        The decay is min(decay, (1 + step) / (10 + step)), so that the first weights are soon
        forgotten: tf.train.ExponentialMovingAverage with num_updates.

        Args:
            step: steps done before this one, 0 at first.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        # each process moves its own shards; buffers are whole in each
        averages = [_local(average) for average in self._averages.values()]
        weights = [
            _local(tensor).to(average.dtype)
            for tensor, average in zip(self._live().values(), averages, strict=True)
        ]
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the network, to measure or save it, and the weights back after.

        The weights come back bit for bit, also where an exception ends it.
        """
        kept = {name: tensor.clone() for name, tensor in self._live().items()}
        self._put(self._averages)
        try:
            yield
        finally:
            self._put(kept)

    def state(self) -> dict[str, Tensor]:
        """Return the averages by the names of the weights; no copies."""
        return dict(self._averages)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put `state` back.

        Raises:
            ConfigError: the names or shapes are not those of this network.
        """
        if state.keys() != self._averages.keys():
            odd = sorted(state.keys() ^ self._averages.keys())[:3]
            raise ConfigError(f"the saved averages do not fit the model: {', '.join(odd)}")
        for name, average in self._averages.items():
            if state[name].shape != average.shape:
                raise ConfigError(
                    f"the saved averages do not fit the model: {name}: expected shape"
                    f" {tuple(average.shape)}, got {tuple(state[name].shape)}"
                )
            average.copy_(state[name])

    def _live(self) -> dict[str, Tensor]:
        live = {name: parameter.detach() for name, parameter in self._parameters.items()}
        live.update({key: getattr(module, name) for key, (module, name) in self._buffers.items()})
        return live

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self._live().items():
                tensor.copy_(tensors[name])
        reshard(self._network)


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
