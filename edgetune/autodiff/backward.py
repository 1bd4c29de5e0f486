"""Reverse-mode differentiation of a list of units, written as further ONNX nodes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy.typing as npt

from edgetune.autodiff.builder import Builder
from edgetune.autodiff.lower import Unit
from edgetune.autodiff.shapes import Dim, Tensor
from edgetune.errors import EdgetuneError

Gradients = Literal["float32", "int8"]
# a rule: (backward, unit, gradient of its first output); it gives gradients to its inputs
Rule = Callable[["Backward", Unit, str], None]


class Backward:
    """The gradients found so far, and what rules need to write more."""

    def __init__(
        self,
        builder: Builder,
        tensors: Mapping[str, Tensor],
        constants: Mapping[str, npt.NDArray[Any]],
        wanted: set[str],
        *,
        gradients: Gradients,
    ) -> None:
        """Write into `builder`; only tensors in `wanted` get gradients."""
        self.b = builder
        self.gradients = gradients
        self._tensors = tensors
        self._constants = constants
        self._wanted = wanted
        self._given: dict[str, list[str]] = {}
        self._served: set[str] = set()  # by the rule that is at work

    def run(
        self, units: Sequence[Unit], rules: Mapping[str, Rule], seeds: Mapping[str, str]
    ) -> None:
        """Go through the units from the last to the first.

        Args:
            units: in the order of the forward pass.
            rules: kind -> rule.
            seeds: tensor -> its gradient, where the loss reads it.

        Raises:
            EdgetuneError: an operator on the way has no rule.
        """
        for name, gradient in seeds.items():
            self.give(name, gradient)
        for unit in reversed(units):
            if not any(name in self._wanted for name in unit.inputs):
                continue
            given = [name for name in unit.outputs if name in self._given]
            if not given:
                continue
            rule = rules.get(unit.kind)
            if rule is None:
                raise EdgetuneError(
                    f"operator {unit.kind} has no gradient yet; train less of the model, above it"
                )
            if given != [unit.outputs[0]] and unit.kind != "Split":
                raise EdgetuneError(
                    f"operator {unit.kind} has a gradient for its first output only"
                )
            self._served = set()
            rule(self, unit, self.gradient(unit.outputs[0]) if unit.kind != "Split" else "")
            for name in unit.inputs:
                if name in self._wanted - self._served:  # silence would be a wrong answer
                    raise EdgetuneError(f"operator {unit.kind} has no gradient for its {name} yet")

    def wants(self, name: str) -> bool:
        """Say whether a tensor's gradient is needed."""
        return name in self._wanted

    def give(self, name: str, gradient: str) -> None:
        """Add to a tensor's gradient."""
        if name in self._wanted:
            self._given.setdefault(name, []).append(gradient)
            self._served.add(name)

    def gradient(self, name: str) -> str:
        """Return a tensor's gradient, summed; "" where it has none."""
        parts = self._given.get(name, [])
        if not parts:
            return ""
        total = parts[0]
        for part in parts[1:]:
            total = self.b.add(total, part)
        self._given[name] = [total]
        return total

    def values(self, name: str) -> list[int]:
        """Return the elements of a constant of integers.

        Raises:
            EdgetuneError: it is computed as the graph runs.
        """
        if name not in self._constants:
            raise EdgetuneError(f"expected {name} to be a constant, it is computed")
        return [int(v) for v in self._constants[name].reshape(-1)]

    def is_constant(self, name: str) -> bool:
        """Say whether a tensor is a constant."""
        return name in self._constants

    def dtype(self, name: str) -> npt.DTypeLike:
        """Return the element type of a constant."""
        return self._constants[name].dtype

    def dims(self, name: str) -> tuple[Dim, ...]:
        """Return a tensor's dimensions."""
        return self._tensors[name].dims

    def fixed(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape.

        Raises:
            EdgetuneError: a dimension of it is free.
        """
        shape = self._tensors[name].fixed
        if shape is None:
            raise EdgetuneError(f"expected {name} to have a fixed shape, got {self.dims(name)}")
        return shape

    def size(self, name: str, axis: int) -> int:
        """Return one dimension.

        Raises:
            EdgetuneError: it is free.
        """
        dim = self.dims(name)[axis]
        if not isinstance(dim, int):
            raise EdgetuneError(f"expected axis {axis} of {name} to have a fixed size, it is free")
        return dim

    def reshape_like(self, gradient: str, of: str, like: str) -> str:
        """Return the gradient of tensor `of` in the shape of tensor `like`."""
        source, target = self.dims(of), self.dims(like)
        if source == target:
            return gradient
        shape = [
            0 if i < len(source) and d == source[i] else d if isinstance(d, int) else -1
            for i, d in enumerate(target)
        ]
        if shape.count(-1) > 1:
            return self.b.node("Reshape", gradient, self.b.node("Shape", like))
        return self.b.reshape(gradient, *shape)

    def unbroadcast(self, gradient: str, of: str, like: str) -> str:
        """Return the gradient of tensor `of` summed to the shape of `like`, which was broadcast."""
        return self.reduce_to(gradient, self.dims(of), self.dims(like))

    def reduce_to(self, gradient: str, source: Sequence[Dim], target: Sequence[Dim]) -> str:
        """Sum a gradient of shape `source` over what `target` was broadcast along."""
        extra = len(source) - len(target)
        inner = [i for i, (s, t) in enumerate(zip(source[extra:], target, strict=True)) if s != t]
        if extra:
            gradient = self.b.sum(gradient, *range(extra))
        return self.b.sum(gradient, *inner, keep=True) if inner else gradient
