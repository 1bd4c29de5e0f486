"""int8, two ways: activations scaled at run time (encoders), or calibrated (convolutional nets)."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from edgetune.export.graph import preprocessing_nodes
from edgetune.profile import DeviceProfile

Feeds = dict[str, Any]
# calibrating on more adds little; fewer leave the ranges of rare activations out
CALIBRATION_SAMPLES = 128


def quantize_dynamic(
    model: onnx.ModelProto,
    profile: DeviceProfile,  # noqa: ARG001
    calibration: Iterable[Feeds],  # noqa: ARG001
    workplace: Path,
) -> onnx.ModelProto:
    """Quantize weights of matrix products and embeddings; activations are scaled as they come.

    Weights are unsigned and per channel: u8 x u8 sums do not saturate on any CPU, while
    u8 x s8 does on x86 without VNNI, so the answer is the same everywhere.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as ort_quantize_dynamic

    source, target = workplace / "dynamic_in.onnx", workplace / "dynamic_out.onnx"
    onnx.save(model, source)
    with _quiet():
        ort_quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            nodes_to_exclude=preprocessing_nodes(model),
            per_channel=True,
            weight_type=QuantType.QUInt8,
            # shape inference stops at onnxruntime's own operators; everything there is float
            extra_options={"DefaultTensorType": TensorProto.FLOAT},
        )
    return _cleaned(onnx.load(target))


def quantize_static(
    model: onnx.ModelProto,
    profile: DeviceProfile,  # noqa: ARG001
    calibration: Iterable[Feeds],
    workplace: Path,
) -> onnx.ModelProto:
    """Quantize weights per channel and activations by the range seen on `calibration`, as QDQ.

    The preprocessing stays float: it works on pixels and sizes, which have no range to learn.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as ort_quantize_static

    source, target = workplace / "static_in.onnx", workplace / "static_out.onnx"
    onnx.save(model, source)
    with _quiet():
        ort_quantize_static(
            source,
            target,
            _Reader(calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "Add", "Clip", "Relu", "GlobalAveragePool"],
            nodes_to_exclude=preprocessing_nodes(model),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"CalibStridedMinMax": None},
        )
    return _cleaned(onnx.load(target))


Quantize = Callable[[onnx.ModelProto, DeviceProfile, Iterable[Feeds], Path], onnx.ModelProto]

# a model family's `int8` -> (function, largest batch on a device). Scales taken at run time would
# make an answer depend on its neighbours; images of any size would make memory depend on them
QUANTIZERS: dict[str, tuple[Quantize, int]] = {
    "dynamic": (quantize_dynamic, 1),
    "static": (quantize_static, 1),
}


class _Reader:
    """Hands feeds to onnxruntime's calibration one at a time."""

    def __init__(self, feeds: Iterable[Feeds]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feeds | None:
        return next(self._feeds, None)


def _cleaned(model: onnx.ModelProto) -> onnx.ModelProto:
    """Strip what the quantizer leaves behind."""
    model.producer_name, model.producer_version = "edgetune", ""
    del model.metadata_props[:]
    del model.graph.value_info[:]
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence advice that does not apply: preprocessing is done, the graph is float by intent."""
    logger = logging.getLogger()
    previous = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(previous)
