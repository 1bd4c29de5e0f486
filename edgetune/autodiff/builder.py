"""Write ONNX nodes as if they were arithmetic; numbers become initializers once."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

MICROSOFT = "com.microsoft"


class Builder:
    """Nodes and constants in the order of their making.

    Methods named like operators write one node and return the name of its output.
    """

    def __init__(self, prefix: str) -> None:
        """Begin every new name with `prefix`, so that none meets one of the graph's own."""
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, npt.NDArray[Any]] = {}
        self._prefix = prefix
        self._count = 0
        self._known: dict[bytes, str] = {}

    def node(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Write a node of ONNX's own domain and return its first output."""
        return self.nodes_of(op, *inputs, outputs=outputs, **attributes)[0]

    def nodes_of(self, op: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """Write a node and return all its outputs."""
        return self._write(op, "", inputs, outputs, attributes)

    def microsoft(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Write a node of com.microsoft's domain and return its output."""
        return self._write(op, MICROSOFT, inputs, 1, attributes)[0]

    def alias(self, source: str, name: str) -> str:
        """Give a tensor a second name."""
        self.nodes.append(helper.make_node("Identity", [source], [name], name=f"{name}_identity"))
        return name

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """Return the name of a constant; equal ones are one."""
        array = np.asarray(value, dtype)
        key = repr((array.shape, array.dtype.str)).encode() + array.tobytes()
        if key not in self._known:
            name = f"{self._prefix}constant_{len(self._known)}"
            self._known[key] = name
            self.constants[name] = array
        return self._known[key]

    def ints(self, *values: int) -> str:
        """Return the name of an int64 vector."""
        return self.constant(values, np.int64)

    def add(self, a: str, b: str) -> str:
        """Return a + b."""
        return self.node("Add", a, b)

    def sub(self, a: str, b: str) -> str:
        """Return a - b."""
        return self.node("Sub", a, b)

    def mul(self, a: str, b: str) -> str:
        """Return a * b."""
        return self.node("Mul", a, b)

    def div(self, a: str, b: str) -> str:
        """Return a / b."""
        return self.node("Div", a, b)

    def scale(self, a: str, factor: float) -> str:
        """Return a * factor."""
        return a if factor == 1.0 else self.mul(a, self.constant(factor))

    def matmul(
        self, a: str, b: str, *, transpose_a: bool = False, transpose_b: bool = False,
        factor: float = 1.0,
    ) -> str:  # fmt: skip
        """Return factor * a b over the last two axes, either of them transposed without a copy."""
        if not transpose_a and not transpose_b and factor == 1.0:
            return self.node("MatMul", a, b)
        return self.microsoft(
            "FusedMatMul", a, b, transA=int(transpose_a), transB=int(transpose_b), alpha=factor
        )

    def reshape(self, a: str, *shape: int) -> str:
        """Return a in another shape; 0 copies a dimension, -1 is what is left."""
        return self.node("Reshape", a, self.ints(*shape))

    def transpose(self, a: str, *axes: int) -> str:
        """Return a with its axes in another order."""
        return self.node("Transpose", a, perm=list(axes))

    def sum(self, a: str, *axes: int, keep: bool = False) -> str:
        """Return the sum over axes."""
        return self.node("ReduceSum", a, self.ints(*axes), keepdims=int(keep))

    def initializers(self) -> list[onnx.TensorProto]:
        """Return the constants."""
        return [numpy_helper.from_array(value, name) for name, value in self.constants.items()]

    def fresh(self, hint: str) -> str:
        """Return a name that no other tensor has."""
        self._count += 1
        return f"{self._prefix}{hint}_{self._count}"

    def _write(
        self, op: str, domain: str, inputs: tuple[str, ...], outputs: int, attributes: Any
    ) -> list[str]:
        names = [self.fresh(op.lower()) for _ in range(outputs)]
        self.nodes.append(
            helper.make_node(
                op, inputs, names, name=f"{names[0]}_node", domain=domain, **attributes
            )
        )
        return names
