"""Choose what of a graph is to learn on the device, and give LoRA its branches.

Before quantization `prepare` inserts LoRA and marks what has to stay in float; after it `release`
gives every trainable tensor a name of its own and makes it an input with a default, so that an
inference session takes new values with a call.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgetune.autodiff.builder import Builder
from edgetune.errors import ConfigError
from edgetune.quantize.layers import (
    LEARN_KEY,
    PREPROCESS_SCOPE,
    SCOPE_KEY,
    arrays,
    attribute,
    copy_model,
    mark,
    set_mark,
)

Kind = Literal["head", "last", "norm", "bias", "lora"]

DEFAULT_RANK = 8
# where a network lies in the module that is exported
NETWORK_SCOPE = "classifier.network."
LOGITS = "logits"
# what may lie between the last layer and the logits
HEAD_FOLLOWERS = frozenset(
    {"Add", "Flatten", "GlobalAveragePool", "Identity", "ReduceMean", "Relu", "Reshape", "Squeeze"}
)


@dataclass(frozen=True, kw_only=True)
class LearnRequest:
    """What is to learn besides the head, which always does.

    kind: "head" nothing; "last" all weights of the last `blocks` blocks and what follows them;
        "norm", "bias": scales and biases of normalisation, all biases; "lora": low-rank branches.
    blocks: of the last so many; None: of all.
    rank: of LoRA.
    """

    kind: Kind
    blocks: int | None = None
    rank: int = DEFAULT_RANK

    def __str__(self) -> str:
        """Return it as it is written on the command line."""
        return self.kind if self.blocks is None else f"{self.kind}:{self.blocks}"


def parse_request(text: str, *, rank: int = DEFAULT_RANK) -> LearnRequest:
    """Read "head", "last:2", "norm", "bias:1", "lora" or "lora:2".

    Raises:
        ConfigError: it is none of these.
    """
    match = re.fullmatch(r"([a-z]+)(?::([1-9][0-9]{0,3}))?", text)
    kinds = get_args(Kind)
    if match is None or match[1] not in kinds or (match[1] == "last") > bool(match[2]):
        raise ConfigError(
            f"learn: expected one of head, last:N, norm, bias, lora (the last three with :N for the"
            f" last N blocks only), got {text!r}"
        )
    if match[1] == "head" and match[2]:
        raise ConfigError(f"learn: head takes no number, got {text!r}")
    if not 1 <= rank <= 256:
        raise ConfigError(f"learn: expected a rank of 1 to 256, got {rank}")
    kind: Any = match[1]
    return LearnRequest(kind=kind, blocks=int(match[2]) if match[2] else None, rank=rank)


def prepare(
    model: onnx.ModelProto,
    request: LearnRequest,
    blocks: Sequence[str],
    is_target: Callable[[str], bool],
    *,
    static: bool,
    seed: int = 0,
) -> onnx.ModelProto:
    """Return the float graph with LoRA branches, and marked where it has to stay float.

    Args:
        model: as it comes from the exporter, its nodes marked with their modules.
        request: what is to learn.
        blocks: paths of the network's blocks, from the input to the output.
        is_target: tells a module's path whether LoRA is to adapt it.
        static: activations will be quantized by calibrated ranges; then all that learning goes
            through stays float, so that it has a gradient.
        seed: of LoRA's first factors.

    Raises:
        ConfigError: there are not so many blocks, or nothing of them can learn so.
    """
    first = _first_block(request, blocks)
    model = copy_model(model)
    index = block_indices(model, blocks)
    head = {node.output[0] for node in _head_nodes(model)}
    for node in model.graph.node:
        if _is_head(node) or node.output[0] in head:
            set_mark(node, LEARN_KEY, "head")
        elif index[node.output[0]] >= first and (request.kind == "last" or static):
            set_mark(node, LEARN_KEY, request.kind)
    if request.kind == "lora":
        _insert_lora(model, request.rank, first, index, is_target, seed)
    return model


@dataclass(frozen=True, kw_only=True)
class Learnable:
    """A graph whose trainable tensors are inputs with defaults.

    class_axes: tensor of the head -> its axis of classes.
    inner: what the nodes of the blocks that learn, and of all behind them, make.
    """

    model: onnx.ModelProto
    trainable: tuple[str, ...]
    class_axes: dict[str, int]
    inner: frozenset[str]


def release(model: onnx.ModelProto, request: LearnRequest, blocks: Sequence[str]) -> Learnable:
    """Make what is to learn inputs of the graph, quantized since `prepare` or not.

    Raises:
        ConfigError: nothing of it can learn so.
    """
    first = _first_block(request, blocks)
    model = copy_model(model)
    index = block_indices(model, blocks)
    constants = arrays(model)
    freed: dict[str, npt.NDArray[Any]] = {}
    class_axes: dict[str, int] = {}
    head = _head_nodes(model)
    for node in model.graph.node:
        inner = index[node.output[0]] >= first and mark(node, SCOPE_KEY) != PREPROCESS_SCOPE
        places = _places(node, constants)
        for place, role in places.items():
            in_head = any(node is n for n in head)
            if not (in_head or (inner and _learns(request.kind, node, role, places))):
                continue
            name = _own_name(node, role, freed)
            freed[name] = constants[node.input[place]]
            node.input[place] = name
            if in_head:
                turned = node.op_type == "Conv" or attribute(node, "transB", 0)
                class_axes[name] = 1 if role == "weight" and not turned else 0
    _free_classes(model, head, constants)
    if not freed or (request.kind != "head" and len(freed) <= len(class_axes)):
        hint = "; its normalisation is part of its convolutions" if request.kind == "norm" else ""
        raise ConfigError(f"learn: this network has nothing that {request} could train{hint}")
    for name, value in freed.items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
        shape: list[int | str] = list(value.shape)
        if name in class_axes:
            shape[class_axes[name]] = "classes"
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    for output in model.graph.output:
        if output.name == LOGITS:
            output.type.tensor_type.shape.dim[1].dim_param = "classes"
    _drop_unread(model)
    made_inside = {o for n in model.graph.node if index[n.output[0]] >= first for o in n.output}
    return Learnable(
        model=model, trainable=tuple(freed), class_axes=class_axes, inner=frozenset(made_inside)
    )


def block_indices(model: onnx.ModelProto, blocks: Sequence[str]) -> dict[str, int]:
    """Return the block of each node, by the name of its first output.

    -1 is what comes before the blocks, len(blocks) what comes after the last. A node of no block
    belongs to the last block that it comes of.
    """
    paths = [NETWORK_SCOPE + name for name in blocks]
    reached: dict[str, int] = {}
    found: dict[str, int] = {}
    for node in model.graph.node:
        scope = mark(node, SCOPE_KEY)
        index = next(
            (i for i, path in enumerate(paths) if scope == path or scope.startswith(f"{path}.")),
            None,
        )
        if index is None:
            index = max((reached.get(name, -1) for name in node.input), default=-1)
            if index == len(blocks) - 1 and scope:
                index = len(blocks)
        for name in node.output:
            reached[name] = index
        found[node.output[0]] = index
    return found


def _first_block(request: LearnRequest, blocks: Sequence[str]) -> int:
    if request.kind == "head":
        return len(blocks) + 1
    if request.blocks is None:
        return 0
    if request.blocks > len(blocks):
        raise ConfigError(f"learn: this network has {len(blocks)} blocks, got {request}")
    return len(blocks) - request.blocks


def _is_head(node: onnx.NodeProto) -> bool:
    return mark(node, SCOPE_KEY) == "classifier.output"


def _head_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the product that makes the logits, and what lies between it and them.

    That is the Add of a bias, or where the last layer is a convolution, its average over places.
    """
    maker = {name: node for node in model.graph.node for name in node.output if name}
    found: list[onnx.NodeProto] = []
    name = LOGITS
    while name in maker:
        found.append(maker[name])
        if found[-1].op_type not in HEAD_FOLLOWERS:
            break
        name = next((i for i in found[-1].input if i in maker), "")
    return found


def _free_classes(
    model: onnx.ModelProto,
    head: Sequence[onnx.NodeProto],
    constants: Mapping[str, npt.NDArray[Any]],
) -> None:
    """Have no Reshape behind the last layer count the classes: (batch, classes, 1, 1) as it is."""
    for node in head:
        shape = constants.get(node.input[1]) if node.op_type == "Reshape" else None
        if shape is not None and shape.size == 2 and shape[0] < 1:
            node.input[1] = f"{node.output[0]}.free"
            del node.attribute[:]  # allowzero, with which 0 would not mean "as it is"
            kept = np.array([0, -1], np.int64)
            model.graph.initializer.append(numpy_helper.from_array(kept, node.input[1]))


def _places(node: onnx.NodeProto, constants: dict[str, npt.NDArray[Any]]) -> dict[int, str]:
    """Return which inputs of a node are weights, and what they are."""

    def real(place: int, dims: int) -> bool:
        value = constants.get(node.input[place]) if len(node.input) > place else None
        return (
            value is not None
            and value.dtype == np.float32
            and value.ndim == dims
            and value.size > 1
        )

    roles: dict[int, str] = {}
    if node.op_type in ("MatMul", "Gemm", "FusedMatMul"):
        roles = {1: "weight"} if real(1, 2) else {}
    elif node.op_type == "Conv":
        roles = {1: "weight"} if real(1, 4) else {}
    elif node.op_type == "LayerNormalization":
        roles = {1: "scale"} if real(1, 1) else {}
    if node.op_type in ("Gemm", "Conv", "LayerNormalization") and real(2, 1):
        roles[2] = "bias"
    if node.op_type in ("Add", "Mul"):
        for place in (0, 1):
            if real(place, 1) and node.input[1 - place] not in constants:
                roles[place] = "bias" if node.op_type == "Add" else "scale"
    return roles


def _learns(kind: Kind, node: onnx.NodeProto, role: str, places: dict[int, str]) -> bool:
    if mark(node, LEARN_KEY) == "lora-branch":
        return True
    if kind == "last":
        return mark(node, LEARN_KEY) == "last"
    if kind == "norm":
        return node.op_type == "LayerNormalization"
    if kind == "bias":
        return role == "bias" and (node.op_type != "Conv" or "weight" in places.values())
    return False


def _own_name(node: onnx.NodeProto, role: str, taken: dict[str, Any]) -> str:
    """Return a name for a trainable tensor: its module's path and its role."""
    scope = mark(node, SCOPE_KEY).removeprefix(NETWORK_SCOPE) or node.name or node.output[0]
    base = f"{scope.removeprefix('classifier.')}.{role}"
    name, number = f"learn.{base}", 1
    while name in taken:
        number += 1
        name = f"learn.{base}_{number}"
    return name


def _insert_lora(
    model: onnx.ModelProto,
    rank: int,
    first: int,
    index: dict[str, int],
    is_target: Callable[[str], bool],
    seed: int,
) -> None:
    """Add B(A(x)) to the outputs of the targets, B = 0 (Hu et al. 2021, arXiv:2106.09685).

    Of a convolution A has its kernel, stride and padding, B is pointwise.
    """
    constants = arrays(model)
    rng = np.random.default_rng(seed)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    nodes: list[onnx.NodeProto] = []
    count = 0
    renamed: dict[str, onnx.NodeProto] = {}
    for node in model.graph.node:
        nodes.append(node)
        adapted = renamed.pop(node.output[0], None)
        if adapted is not None:
            nodes.extend(_branch(model, adapted, node, constants, rank, rng))
            count += 1
            continue
        if not _takes_lora(node, constants) or index[node.output[0]] < first:
            continue
        path = _module_path(node)
        if not is_target(path):
            continue
        last = node
        following = readers.get(node.output[0], [])
        # the bias of a product is an Add of its own, which is joined with it later
        if node.op_type == "MatMul" and len(following) == 1 and following[0].op_type == "Add":
            last = following[0]
        if last is node:
            nodes.extend(_branch(model, node, node, constants, rank, rng))
            count += 1
        else:
            renamed[last.output[0]] = node
    if not count:
        raise ConfigError("learn: this network has no layer that LoRA could adapt there")
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _takes_lora(node: onnx.NodeProto, constants: dict[str, npt.NDArray[Any]]) -> bool:
    if node.op_type not in ("MatMul", "Gemm", "Conv") or len(node.input) < 2:
        return False
    if mark(node, SCOPE_KEY) == PREPROCESS_SCOPE or _is_head(node):
        return False
    weight = constants.get(node.input[1])
    if weight is None or weight.dtype != np.float32 or attribute(node, "group", 1) != 1:
        return False
    return weight.ndim == (4 if node.op_type == "Conv" else 2)


def _module_path(node: onnx.NodeProto) -> str:
    """Return the path of the layer: of a convolution with a folded norm, the convolution's."""
    weight = node.input[1]
    named = weight.startswith(NETWORK_SCOPE) and weight.endswith(".weight")
    path = weight.removesuffix(".weight") if named else mark(node, SCOPE_KEY)
    return path.removeprefix(NETWORK_SCOPE)


def _branch(
    model: onnx.ModelProto,
    node: onnx.NodeProto,
    last: onnx.NodeProto,
    constants: dict[str, npt.NDArray[Any]],
    rank: int,
    rng: np.random.Generator,
) -> list[onnx.NodeProto]:
    """Return the nodes of a branch beside `node` whose sum takes the name of `last`'s output."""
    weight = constants[node.input[1]]
    out, scope = last.output[0], mark(node, SCOPE_KEY)
    last.output[0] = f"{out}_frozen"
    builder = Builder(f"{out}.lora.")
    if node.op_type == "Conv":
        outputs, fan_in = weight.shape[0], int(np.prod(weight.shape[1:]))
        a = rng.uniform(-1, 1, (rank, *weight.shape[1:])) / fan_in**0.5
        b = np.zeros((outputs, rank, 1, 1))
        kept = {x.name: helper.get_attribute_value(x) for x in node.attribute}
        inner = builder.node("Conv", node.input[0], f"{out}.lora_a", **kept)
        outer = builder.node("Conv", inner, f"{out}.lora_b", kernel_shape=[1, 1])
    else:
        turned = node.op_type == "Gemm" and attribute(node, "transB", 0)
        fan_in, outputs = weight.shape[::-1] if turned else weight.shape
        a = rng.uniform(-1, 1, (fan_in, rank)) / fan_in**0.5
        b = np.zeros((rank, outputs))
        inner = builder.node("MatMul", node.input[0], f"{out}.lora_a")
        outer = builder.node("MatMul", inner, f"{out}.lora_b")
    for name, value in ((f"{out}.lora_a", a), (f"{out}.lora_b", b)):
        model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    nodes = builder.nodes
    for new, factor in zip(nodes, ("lora_a", "lora_b"), strict=True):
        set_mark(new, SCOPE_KEY, f"{scope}.{factor}")
        set_mark(new, LEARN_KEY, "lora-branch")
    total = helper.make_node("Add", [last.output[0], outer], [out], name=f"{out}_adapted")
    set_mark(total, SCOPE_KEY, scope)
    set_mark(total, LEARN_KEY, "lora")
    return [*nodes, total]


def _drop_unread(model: onnx.ModelProto) -> None:
    read = {name for node in model.graph.node for name in node.input}
    kept = [t for t in model.graph.initializer if t.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
