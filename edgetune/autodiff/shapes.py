"""Shapes of every tensor, found by running the graph twice.

ONNX's inference knows nothing of com.microsoft's operators, and exporters' symbols do not survive
rewriting. Two runs on inputs of different sizes tell what is fixed and what is free.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from edgetune.errors import EdgetuneError
from edgetune.quantize.layers import arrays, copy_model
from edgetune.runtime.ort import onnxruntime

# a dimension: its number, or where it is free what it was in the two runs
Dim = int | tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """What is known of a tensor: dimensions and whether it holds real numbers."""

    dims: tuple[Dim, ...]
    real: bool

    @property
    def fixed(self) -> tuple[int, ...] | None:
        """The shape, where no dimension is free."""
        dims = tuple(d for d in self.dims if isinstance(d, int))
        return dims if len(dims) == len(self.dims) else None


def find_shapes(
    model: onnx.ModelProto, runs: Sequence[Mapping[str, Any]], names: Iterable[str]
) -> dict[str, Tensor]:
    """Return the shapes of the named tensors and of the initializers.

    Args:
        model: weights inside.
        runs: two sets of inputs; free dimensions differ between them.
        names: of tensors that nodes make, or of inputs.

    Raises:
        EdgetuneError: onnxruntime cannot run the graph.
    """
    first, second = runs
    constants = arrays(model)
    found = {
        name: Tensor(dims=value.shape, real=value.dtype == np.float32)
        for name, value in constants.items()
    }
    wanted = [n for n in dict.fromkeys(names) if n not in constants]
    made = {output for node in model.graph.node for output in node.output if output}
    probe = copy_model(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=n) for n in wanted if n in made)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            probe.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        outputs = [o.name for o in session.get_outputs()]
        values = [
            {**feeds, **dict(zip(outputs, session.run(outputs, dict(feeds)), strict=True))}
            for feeds in (first, second)
        ]
    except Exception as error:  # onnxruntime's exceptions share no base but Exception
        raise EdgetuneError(f"the graph cannot be run to learn its shapes: {error}") from error
    for name in wanted:
        if name in values[0]:
            a, b = values[0][name], values[1][name]
            dims = tuple(x if x == y else (x, y) for x, y in zip(a.shape, b.shape, strict=True))
            found[name] = Tensor(dims=dims, real=a.dtype == np.float32)
    return found
