"""How much each layer's quantization damages the answer: what to keep in float, and what not."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx

from edgetune.quantize.calibrate import run_tensors
from edgetune.quantize.layers import Feeds, Layer, arrays, weight_layers

# float model, nodes to keep in float -> quantized model
Quantize = Callable[[Collection[str]], onnx.ModelProto]


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One layer quantized, all others float.

    sqnr_db: signal to quantization noise of the graph's output, in decibel; higher is better.
    noise: the squared error of the output over its squared values; adds up over layers as far
        as their errors are independent.
    """

    layer: Layer
    parameters: int
    noise: float

    @property
    def sqnr_db(self) -> float:
        """10 log10(signal / noise); infinite where nothing changed."""
        return float(-10 * np.log10(self.noise)) if self.noise > 0 else float("inf")


def layer_damage(
    model: onnx.ModelProto,
    quantize: Quantize,
    feeds: Sequence[Feeds] | Iterable[Feeds],
    *,
    output: str = "logits",
    on_layer: Callable[[int, int], None] | None = None,
) -> list[Damage]:
    """Quantize one layer after the other, alone, and measure what the output loses.

    Args:
        model: float graph.
        quantize: given the nodes to keep in float, returns the graph with the rest quantized.
        feeds: samples; gone through once per layer.
        output: tensor that is compared.
        on_layer: called with (done, all).

    Returns:
        One entry per layer that `quantize` changes, worst first.
    """
    layers = weight_layers(model)
    weights = arrays(model)
    reference = _stacked(model, feeds, output)
    signal = float((reference**2).mean()) or 1.0
    damages = []
    for number, layer in enumerate(layers):
        others = [other.node for other in layers if other is not layer]
        quantized = quantize(others)
        if quantized != model:
            error = _stacked(quantized, feeds, output) - reference
            damages.append(
                Damage(
                    layer=layer,
                    parameters=int(weights[layer.weight].size),
                    noise=float((error**2).mean()) / signal,
                )
            )
        if on_layer:
            on_layer(number + 1, len(layers))
    # a tie is kept in the graph's order
    return sorted(damages, key=lambda d: -d.noise)


def worst_layers(damages: Sequence[Damage], *, share: float, most_parameters: float) -> list[str]:
    """Return the nodes to keep in float: the worst `share` of the layers.

    A layer that would take the share of parameters in float above `most_parameters` is passed
    over: what stays float is not small.
    """
    total = sum(d.parameters for d in damages)
    wanted = max(1, round(share * len(damages)))
    chosen: list[str] = []
    spent = 0
    for damage in damages:
        if len(chosen) == wanted:
            break
        if spent + damage.parameters > most_parameters * total:
            continue
        chosen.append(damage.layer.node)
        spent += damage.parameters
    return chosen


def _stacked(
    model: onnx.ModelProto, feeds: Iterable[Feeds], output: str
) -> npt.NDArray[np.float64]:
    return np.concatenate(list(_rows(model, feeds, output))).astype(np.float64)


def _rows(
    model: onnx.ModelProto, feeds: Iterable[Feeds], output: str
) -> Iterator[npt.NDArray[np.float32]]:
    for values in run_tensors(model, feeds, [output]):
        yield values[output]
