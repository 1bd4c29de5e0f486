"""What a device has learned, ready to answer with: labels, a head or trained tensors."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.errors import ConfigError, IntegrityError
from edgetune.runtime.bundle import STEP_NAME, Bundle
from edgetune.runtime.learn.projection import Projection
from edgetune.runtime.learn.ridge import Head
from edgetune.runtime.learn.store import Generation, Store
from edgetune.runtime.manifest import Manifest
from edgetune.runtime.npz import load_arrays

STATE_NAME = "state.npz"
MAX_BYTES = 2**28
SUFFIX = ".learned"


@dataclass(frozen=True, kw_only=True)
class State:
    """A learned state.

    labels: in the order of its logits. head: on the graph's features; None where the graph's own
    answers. projection: what features go through first. tensors: values of the graph's
    trainable inputs, name -> array. generation: which one of its store; 0 where it was not kept.
    """

    labels: tuple[str, ...]
    head: Head | None = None
    projection: Projection | None = None
    tensors: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    generation: int = 0

    def logits(self, outputs: Mapping[str, Any]) -> npt.NDArray[np.float32]:
        """Return logits, float32 (batch, labels), of the graph's outputs.

        Raises:
            IntegrityError: the graph gives no features for the head.
        """
        if self.head is None:
            found: npt.NDArray[np.float32] = outputs["logits"]
            return found
        features = outputs.get("features")
        if features is None:
            raise IntegrityError("the graph has no output named features for a learned head")
        return self.head_logits(features)

    def has_head_of(self, manifest: Manifest) -> bool:
        """Tell whether the bundle's own last layer, as it was exported, gives the logits."""
        if self.head is not None or self.labels != manifest.labels:
            return False
        specs = () if manifest.training is None else manifest.training.trainable
        return not any("classes" in spec.shape and spec.name in self.tensors for spec in specs)

    def head_logits(self, features: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return logits of features, (batch, d), by the head."""
        assert self.head is not None
        placed = features if self.projection is None else self.projection.apply(features)
        return self.head.logits(placed)


def binding_of(bundle: Bundle) -> dict[str, str]:
    """Return what ties a store to a bundle."""
    return {"bundle": bundle.manifest.name, "digest": bundle.manifest.digest}


def default_store(bundle: Bundle) -> Path:
    """Return where a bundle's store lies if nothing else is said: beside it."""
    where = bundle.where
    return where.with_name(where.name + SUFFIX)


def open_state(bundle: Bundle, folder: str | Path) -> State | None:
    """Return the live state of the store in `folder`; None where the factory's is live.

    Raises:
        ConfigError: there is no store, or it belongs to another bundle.
        IntegrityError: it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: nothing was learned there; edgetune-rt learn makes such a folder"
        )
    store = Store.open(folder, binding=binding_of(bundle), readonly=True)
    live = store.live
    return None if live is None else read_state(bundle, store, live)


def read_state(bundle: Bundle, store: Store, generation: Generation) -> State:
    """Return the state that a generation holds.

    Raises:
        IntegrityError: its file is damaged, or does not fit the bundle.
    """
    where = f"{store.folder}: generation {generation.number}"
    data = store.read(generation, STATE_NAME)
    return load_state(bundle, data, where=where, generation=generation.number)


def dump_state(state: State) -> bytes:
    """Return a state's bytes."""
    arrays: dict[str, npt.NDArray[Any]] = {
        "labels": np.frombuffer(json.dumps(list(state.labels)).encode(), np.uint8)
    }
    if state.head is not None:
        arrays["head_weights"] = state.head.weights
        arrays["head_bias"] = state.head.bias
        arrays["head_temperature"] = np.array(state.head.temperature, np.float64)
    if state.projection is not None:
        p = state.projection
        arrays["projection"] = np.array([p.width_in, p.width, p.seed], np.int64)
    arrays |= {f"tensor_{name}": value for name, value in state.tensors.items()}
    data = io.BytesIO()
    np.savez(data, **arrays)  # type: ignore[arg-type]  # numpy takes them for its options
    return data.getvalue()


def load_state(bundle: Bundle, data: bytes, *, where: str, generation: int = 0) -> State:
    """Return the state in those bytes.

    Raises:
        IntegrityError: they are none, or do not fit the bundle.
    """
    try:
        arrays = load_arrays(data, MAX_BYTES)
        labels = json.loads(arrays["labels"].tobytes().decode())
        if not isinstance(labels, list) or not all(isinstance(x, str) for x in labels):
            raise ValueError("labels: expected strings")
        if len(set(labels)) != len(labels) or not labels:
            raise ValueError("labels: one is there twice, or there is none")
        head, projection = _head(arrays, tuple(labels))
        tensors = {
            name.removeprefix("tensor_"): value
            for name, value in arrays.items()
            if name.startswith("tensor_")
        }
        _check_tensors(bundle, tensors, len(labels))
    except (KeyError, ValueError, TypeError) as error:
        raise IntegrityError(f"{where}: cannot be read: {error}") from error
    return State(
        labels=tuple(labels), head=head, projection=projection, tensors=tensors,
        generation=generation,
    )  # fmt: skip


def _head(
    arrays: Mapping[str, npt.NDArray[Any]], labels: tuple[str, ...]
) -> tuple[Head | None, Projection | None]:
    if "head_weights" not in arrays:
        return None, None
    weights, bias = arrays["head_weights"], arrays["head_bias"]
    temperature = float(arrays["head_temperature"])
    real = weights.dtype == bias.dtype == np.float32
    if not real or weights.ndim != 2 or weights.shape[1] != len(labels):
        raise ValueError(f"head: expected float32 weights (features, {len(labels)})")
    if bias.shape != (len(labels),) or not temperature > 0 or not np.isfinite(weights).all():
        raise ValueError("head: its bias, temperature or weights are out of bounds")
    head = Head(labels=labels, weights=weights, bias=bias, temperature=temperature)
    planned = arrays.get("projection")
    if planned is None:
        return head, None
    if planned.shape != (3,) or planned.dtype != np.int64 or int(planned[1]) != len(weights):
        raise ValueError("projection: does not fit the head")
    width_in, width, seed = (int(n) for n in planned)
    return head, Projection(width_in=width_in, width=width, seed=seed)


def _check_tensors(bundle: Bundle, tensors: Mapping[str, npt.NDArray[Any]], classes: int) -> None:
    if not tensors:
        return
    training = bundle.manifest.training
    if training is None:
        raise ValueError(f"tensors: this bundle has no {STEP_NAME}")
    expected = {spec.name: spec for spec in training.trainable}
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())[:3]
        raise ValueError(f"tensors: not those of the bundle: {', '.join(odd)}")
    for name, value in tensors.items():
        shape = tuple(classes if d == "classes" else d for d in expected[name].shape)
        if value.shape != shape or value.dtype != np.float32 or not np.isfinite(value).all():
            raise ValueError(
                f"{name}: expected finite float32 {shape}, got {value.dtype} {value.shape}"
            )


def index_of(labels: Sequence[str]) -> dict[str, int]:
    """Return label -> place."""
    return {label: i for i, label in enumerate(labels)}
