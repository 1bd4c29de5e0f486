"""The ladder: one row a rung, each with the function that makes its graph.

A rung turns a float graph into a smaller or faster one. Rows of one `shape` cost the same
on a device (they differ in their numbers only), so where one is too slow or too large the
others need not be tried.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import onnx
import onnxruntime

from edgetune.errors import ConfigError
from edgetune.export.cache import code_key, key_of
from edgetune.export.records import Repair
from edgetune.export.workshop import PROBE_SAMPLES, Built, Source, Workshop
from edgetune.profile import DeviceProfile
from edgetune.quantize.arithmetic import LayerSaturation, saturation
from edgetune.quantize.blocks import quantize_blocks, quantize_weights
from edgetune.quantize.calibrate import Method
from edgetune.quantize.dynamic import DynamicCode, quantize_dynamic
from edgetune.quantize.embeddings import quantize_embeddings
from edgetune.quantize.equalize import correct_bias, equalize
from edgetune.quantize.half import to_fp16
from edgetune.quantize.qdq import WeightCode, plan_static, write_static
from edgetune.quantize.sensitivity import Damage, worst_layers
from edgetune.quantize.smooth import smooth
from edgetune.runtime.records import nearest
from edgetune.tasks import task_kind

Precision = Literal["fp32", "fp16", "int8", "int4"]
# what stays float is not small: no more of the parameters than this
MOST_FLOAT_PARAMETERS = 0.25
TEXT_BATCH = 8
# onnxruntime's session option: u8 x u8 kernels on x86 whatever the weights
X64_PRECISION = "session.x64quantprecision"
# the share of a layer's outputs that may have a saturated sum in it before it is repaired
HARMFUL = 0.01
_REPAIR_CODES: dict[str, WeightCode] = {"u8 weights": "u8", "reduced range": "s7"}


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One row.

    name, about: what it is called and what it does, for people.
    precision: of most of its weights.
    shape: what it costs; rows that cost the same share it.
    suits: the families' `int8` for which it makes sense.
    make: (workshop, source, **settings) -> the graph.
    source: "run", or the name of a student.
    explore: tried by the Pareto search only, or where the others cost too much.
    fallback: has a point only where the rungs before it lose too much; the Pareto search, which
        wants speed, tries it last.
    saturating_only: has a point only on CPUs whose sums saturate.
    line, kept: rows of a line differ in the share of the network that they keep.
    """

    name: str
    about: str
    precision: Precision
    shape: str
    suits: tuple[str, ...]
    make: Callable[..., Built]
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: str = "run"
    explore: bool = False
    fallback: bool = False
    saturating_only: bool = False
    line: str = ""
    kept: float = 1.0


def leave_fp32(shop: Workshop, source: Source) -> Built:
    """Leave the graph as it is."""
    return Built(model=source.model, precision="fp32", max_batch=_float_batch(shop))


def make_fp16(shop: Workshop, source: Source) -> Built:
    """Store and compute in float16."""
    model = to_fp16(source.model, feeds=shop.feeds(PROBE_SAMPLES))
    return Built(model=model, precision="fp16", max_batch=_float_batch(shop))


def make_static(
    shop: Workshop,
    source: Source,
    *,
    method: Method = "minmax",
    equalized: bool = False,
    corrected: bool = False,
    smoothed: bool = False,
    float_share: float = 0.0,
    repair: Repair = "u8 weights",
    repair_above: float = HARMFUL,
) -> Built:
    """Quantize weights per channel and activations by calibrated ranges.

    On profiles that saturate, layers of whose outputs a larger share than `repair_above` has a
    saturated sum in it on real samples are repaired: "u8 weights" are the same values, summed
    exactly, by a slower kernel; a "reduced range" keeps the kernel and costs a bit of precision;
    "x64quantprecision" has onnxruntime take the slower kernel for every layer. What saturation is
    left, the gate sees.
    """
    source = _prepared(shop, source, equalized=equalized, smoothed=smoothed)
    damage: list[Damage] = []
    kept: list[str] = []
    if float_share:
        damage = shop.damage(source, "static", _static_without(shop, source, method))
        kept = worst_layers(damage, share=float_share, most_parameters=MOST_FLOAT_PARAMETERS)
    plan = plan_static(source.model, keep_float=kept)
    ranges = shop.ranges(source, plan, method)
    quantized = write_static(source.model, plan, ranges)
    repairs: dict[str, Repair] = {}
    found: list[LayerSaturation] = []
    if shop.profile.cpu.int8 == "saturates":
        shop.say("looking for sums that saturate")
        found = saturation(quantized, shop.feeds(PROBE_SAMPLES))
        repairs = {s.node: repair for s in found if s.outputs_hit > repair_above}
        if repair in _REPAIR_CODES:
            codes = dict.fromkeys(repairs, _REPAIR_CODES[repair])
            quantized = write_static(source.model, plan, ranges, layer_codes=codes)
    if corrected:
        quantized = correct_bias(source.model, quantized, shop.feeds(PROBE_SAMPLES))
    return Built(
        model=quantize_embeddings(quantized),
        precision="int8",
        session={X64_PRECISION: "1"} if repairs and repair == "x64quantprecision" else {},
        repairs=repairs,
        saturation=tuple(
            (s.node, s.candidate_pairs, s.saturated / max(1, s.pair_sums), float(s.worst_error))
            for s in found
        ),
        damage=_rows(damage),
        kept_float=tuple(kept),
    )


def make_dynamic(shop: Workshop, source: Source, *, float_share: float = 0.0) -> Built:
    """Quantize matrix products, activations scaled as they come, and embeddings by row."""
    # u8 weights never saturate, s8 weights are faster where nothing does
    codes: DynamicCode = "s8" if shop.profile.cpu.int8 == "exact" else "u8"

    def quantize(keep: Collection[str]) -> onnx.ModelProto:
        return quantize_dynamic(source.model, codes=codes, keep_float=keep)

    damage: list[Damage] = []
    kept: list[str] = []
    if float_share:
        damage = shop.damage(source, f"dynamic {codes}", quantize)
        kept = worst_layers(damage, share=float_share, most_parameters=MOST_FLOAT_PARAMETERS)
    return Built(
        model=quantize_embeddings(quantize(kept)),
        precision="int8",
        damage=_rows(damage),
        kept_float=tuple(kept),
    )


def make_weights(shop: Workshop, source: Source) -> Built:  # noqa: ARG001
    """Quantize weights alone, in plain ONNX, and embeddings by row."""
    return Built(model=quantize_embeddings(quantize_weights(source.model)), precision="int8")


def make_blocks(shop: Workshop, source: Source) -> Built:  # noqa: ARG001
    """Quantize weights alone, to 4 bits in blocks, and embeddings by row."""
    model = quantize_embeddings(quantize_blocks(source.model, method="hqq"))
    return Built(model=model, precision="int4")


RUNGS: tuple[Rung, ...] = (
    Rung(
        name="int8-dynamic", about="int8 weights and embeddings, activations scaled as they come",
        precision="int8", shape="int8-dynamic", suits=("dynamic",), make=make_dynamic,
    ),
    Rung(
        name="int8-dynamic-mixed", about="int8-dynamic, the worst tenth of the layers in float",
        precision="int8", shape="int8-dynamic-mixed", suits=("dynamic",), make=make_dynamic,
        fallback=True,
        settings={"float_share": 0.1},
    ),
    Rung(
        name="int8-dynamic-mixed-25", about="int8-dynamic, the worst quarter of layers in float",
        precision="int8", shape="int8-dynamic-mixed-25", suits=("dynamic",), make=make_dynamic,
        fallback=True,
        settings={"float_share": 0.25},
    ),
    Rung(
        name="int8-smooth", about="SmoothQuant, then int8 weights and calibrated activations",
        precision="int8", shape="int8-smooth", suits=("dynamic",), make=make_static,
        settings={"smoothed": True, "method": "percentile"},
    ),
    Rung(
        name="int8-static", about="int8 per channel, activations by their extremes",
        precision="int8", shape="int8-static", suits=("static",), make=make_static,
    ),
    Rung(
        name="int8-static-exact", about="int8-static, u8 weights wherever a sum would saturate",
        precision="int8", shape="int8-static-exact", suits=("static",), make=make_static,
        settings={"repair_above": 0.0}, saturating_only=True,
    ),
    Rung(
        name="int8-static-reduced", about="int8-static, 7-bit weights where sums would saturate",
        precision="int8", shape="int8-static-reduced", suits=("static",), make=make_static,
        settings={"repair": "reduced range", "repair_above": 0.0}, saturating_only=True,
    ),
    Rung(
        name="int8-static-precise", about="int8-static, onnxruntime set to exact sums",
        precision="int8", shape="int8-static-precise", suits=("static",), make=make_static,
        settings={"repair": "x64quantprecision", "repair_above": 0.0}, saturating_only=True,
    ),
    Rung(
        name="int8-static-mse", about="int8 per channel, ranges of least squared error",
        precision="int8", shape="int8-static", suits=("static",), make=make_static,
        fallback=True,
        settings={"method": "mse"},
    ),
    Rung(
        name="int8-static-percentile", about="int8 per channel, outermost 0.01 % left out",
        precision="int8", shape="int8-static", suits=("static",), make=make_static,
        fallback=True,
        settings={"method": "percentile"},
    ),
    Rung(
        name="int8-static-entropy", about="int8 per channel, ranges of least divergence",
        precision="int8", shape="int8-static", suits=("static",), make=make_static,
        fallback=True,
        settings={"method": "entropy"},
    ),
    Rung(
        name="int8-corrected", about="int8-static with bias correction",
        precision="int8", shape="int8-static", suits=("static",), make=make_static,
        fallback=True,
        settings={"method": "mse", "corrected": True},
    ),
    Rung(
        name="int8-equalized", about="cross-layer equalisation, bias correction, int8",
        precision="int8", shape="int8-static", suits=("static",), make=make_static,
        fallback=True,
        settings={"equalized": True, "corrected": True},
    ),
    Rung(
        name="int8-mixed", about="int8-static, the worst tenth of the layers in float",
        precision="int8", shape="int8-mixed", suits=("static",), make=make_static,
        fallback=True,
        settings={"method": "mse", "float_share": 0.1},
    ),
    Rung(
        name="int8-mixed-25", about="int8-static, the worst quarter of the layers in float",
        precision="int8", shape="int8-mixed-25", suits=("static",), make=make_static,
        fallback=True,
        settings={"method": "mse", "float_share": 0.25},
    ),
    Rung(
        name="int4-blocks", about="4-bit weights in blocks of 32 (HQQ), float activations",
        precision="int4", shape="int4-blocks", suits=("dynamic",), make=make_blocks, explore=True,
    ),
    Rung(
        name="int8-weights", about="int8 weights per channel, float activations, int8 embeddings",
        precision="int8", shape="int8-weights", suits=("dynamic",), make=make_weights, explore=True,
    ),
    Rung(
        name="fp16", about="float16 weights and arithmetic",
        precision="fp16", shape="fp16", suits=("static", "dynamic"), make=make_fp16,
    ),
    *(
        Rung(
            name=f"{name}-int8", about=f"{about}, distilled, then int8", precision="int8",
            shape=name, suits=("dynamic",), make=make_dynamic, source=name, explore=True,
            line=line, kept=kept,
        )
        for name, about, line, kept in (
            ("depth-50", "half of the blocks", "depth", 0.5),
            ("depth-33", "a third of the blocks", "depth", 0.33),
            ("depth-67", "two thirds of the blocks", "depth", 0.67),
            ("width-50", "half of the heads and of each feed-forward", "width", 0.5),
        )
    ),
    *(
        Rung(
            name=f"{name}-int8", about=f"{about}, distilled, then int8", precision="int8",
            shape=name, suits=("static",), make=make_static, settings={"method": "mse"},
            source=name, explore=True, line=line, kept=kept,
        )
        for name, about, line, kept in (
            ("image-71", "images of 0.71 times the side", "image", 0.71),
            ("image-57", "images of 0.57 times the side", "image", 0.57),
            ("image-86", "images of 0.86 times the side", "image", 0.86),
            ("channels-50", "half of the inner channels", "channels", 0.5),
            ("channels-75", "three quarters of the inner channels", "channels", 0.75),
            ("image-71-channels-75", "0.71 times the side, 3/4 of the inner channels", "", 1.0),
        )
    ),
    # a network without a fast int8 on the device may still be made smaller
    *(
        Rung(
            name=f"{name}-fp32", about=f"{about}, distilled, float", precision="fp32",
            shape=f"{name}-fp32", suits=("static",), make=leave_fp32, source=name, explore=True,
        )
        for name, about in (
            ("channels-50", "half of the inner channels"),
            ("image-71", "images of 0.71 times the side"),
        )
    ),
    Rung(
        name="int8-qat-lora", about="a short quantization-aware fine-tune of LoRA, then int8",
        precision="int8", shape="int8-dynamic", suits=("dynamic",), make=make_dynamic,
        fallback=True,
        source="qat-lora",
    ),
    Rung(
        name="int8-qat", about="a short quantization-aware fine-tune of all weights, then int8",
        precision="int8", shape="int8-dynamic", suits=("dynamic",), make=make_dynamic,
        fallback=True,
        source="qat",
    ),
    Rung(
        name="int8-static-qat", about="a short quantization-aware fine-tune of all weights, int8",
        precision="int8", shape="int8-static", suits=("static",), make=make_static,
        fallback=True,
        settings={"method": "mse"}, source="qat",
    ),
)  # fmt: skip
FP32 = Rung(
    name="fp32", about="the trained model as it is", precision="fp32", shape="fp32",
    suits=("static", "dynamic"), make=leave_fp32,
)  # fmt: skip


# what leaves nodes in float that are marked as learning
_LEARNING = (make_static, make_dynamic, make_weights)


def rungs_for(
    profile: DeviceProfile,
    int8: str,
    *,
    precision: str = "auto",
    only: Collection[str] = (),
    learning: bool = False,
) -> list[Rung]:
    """Return the rows that the profile and the model's family allow, in the order of trying.

    Args:
        profile: of the device.
        int8: the family's `int8`.
        precision: "auto", or the only one that is wanted.
        only: names of rungs, where nothing else is to be tried.
        learning: whether the graph is to learn on the device: some of it stays float then, which
            not every rung leaves so.

    Raises:
        ConfigError: `only` names an unknown rung, or nothing is left.
    """
    names = [rung.name for rung in (*RUNGS, FP32)]
    for name in only:
        if name not in names:
            raise ConfigError(f"rung: no rung {name!r}{nearest(name, names)}")
    has = {"fp32": True, "fp16": profile.precision.fp16, "int8": profile.precision.int8}
    found = [
        rung
        for rung in RUNGS
        if int8 in rung.suits
        and (profile.cpu.int8 == "saturates" or not rung.saturating_only)
        and has.get(rung.precision, True)
        and precision in ("auto", rung.precision)
        and (not only or rung.name in only)
        and (not learning or (rung.source == "run" and rung.make in _LEARNING))
    ]
    wants_fp32 = precision in ("auto", "fp32") and (not only or "fp32" in only)
    if not found and not wants_fp32:
        why = f"precision {precision}" if precision != "auto" else f"rungs {', '.join(only)}"
        raise ConfigError(
            f"profile {profile.name} and this model allow nothing of {why}; export with"
            " --precision fp32, or name another rung"
        )
    return found


def build(shop: Workshop, rung: Rung, source: Source) -> tuple[Built, bool]:
    """Make a rung's graph, or take it from the cache; return it and whether it was there."""
    key = key_of(
        code_key(), source.key, shop.data_key, rung.name, dict(rung.settings),
        shop.profile.cpu.int8, onnx.__version__, onnxruntime.__version__,
    )  # fmt: skip
    made: list[Built] = []

    def make() -> Built:
        if not made:
            made.append(rung.make(shop, source, **rung.settings))
        return made[0]

    model, cached = shop.cache.model("graph", key, lambda: make().model)
    facts, _ = shop.cache.json("graph", key, lambda: _facts(make()))
    return Built(
        model=model,
        precision=facts["precision"],
        max_batch=facts["max_batch"],
        session=facts["session"],
        repairs=facts["repairs"],
        damage=tuple((node, op, size, sqnr) for node, op, size, sqnr in facts["damage"]),
        saturation=tuple((node, n, share, worst) for node, n, share, worst in facts["saturation"]),
        kept_float=tuple(facts["kept_float"]),
    ), cached


def _facts(built: Built) -> dict[str, Any]:
    return {
        "precision": built.precision,
        "max_batch": built.max_batch,
        "session": dict(built.session),
        "repairs": dict(built.repairs),
        "damage": [list(row) for row in built.damage],
        "saturation": [list(row) for row in built.saturation],
        "kept_float": list(built.kept_float),
    }


def _prepared(shop: Workshop, source: Source, *, equalized: bool, smoothed: bool) -> Source:
    """Return the source with its float graph made easier to quantize, its answers unchanged."""
    model, steps = source.model, []
    if equalized:
        model, steps = equalize(model), ["equalized"]
    if smoothed:
        model, steps = smooth(model, shop.feeds(PROBE_SAMPLES)), [*steps, "smoothed"]
    if not steps:
        return source
    key = key_of(source.key, *steps)
    return Source(name=source.name, model=model, key=key, task=source.task)


def _static_without(
    shop: Workshop, source: Source, method: Method
) -> Callable[[Collection[str]], onnx.ModelProto]:
    ranges = shop.ranges(source, plan_static(source.model), method)

    def quantize(keep: Collection[str]) -> onnx.ModelProto:
        return write_static(source.model, plan_static(source.model, keep_float=keep), ranges)

    return quantize


def _rows(damage: list[Damage]) -> tuple[tuple[str, str, int, float], ...]:
    return tuple(
        (d.layer.node, d.layer.op, d.parameters, round(min(d.sqnr_db, 200.0), 2)) for d in damage
    )


def _float_batch(shop: Workshop) -> int:
    """Return the largest batch of a graph without scales that its samples would share.

    Texts may share it; images of any size would make memory depend on them.
    """
    return TEXT_BATCH if task_kind(shop.run.config.task) == "text" else 1
