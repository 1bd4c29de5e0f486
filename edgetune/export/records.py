"""What an export's search for a candidate found, as plain records.

They are written to search.json and shown by edgetune.export.report; from_mapping reads them
back. None stands for what was not measured or not set.
"""

from dataclasses import dataclass, field
from typing import Literal

from edgetune.export.search import Budgets
from edgetune.tasks.metrics import Interval
from edgetune.tasks.paired import Comparison

AttemptStatus = Literal["chosen", "passed", "failed", "refused", "skipped", "error"]
LatencyBasis = Literal["measured here", "measured on target", "estimate"]
Arithmetic = Literal["native", "emulated: saturates", "emulated: exact"]
Repair = Literal["none", "u8 weights", "reduced range", "x64quantprecision"]


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One candidate of the search.

    Attributes:
        rung: its name on the ladder.
        description: what was done, in a few words.
        precision: of the weights, "fp32" or "int8" for instance.
        status: "passed" met every budget but another was better; "failed" did not; "refused"
            can't be made for this model or profile; "skipped" was not tried; "error" broke.
        reason: why it has that status, a sentence.
        size_mib: of the bundle.
        latency_p50_ms: median time of one sample.
        latency_p95_ms: 95th percentile of the same.
        latency_basis: where the latencies come from.
        peak_rss_mib: largest resident memory of a process that predicts.
        accuracy: with its interval, on the samples that the gate compares.
        comparison: with the fp32 graph; None for that graph itself.
        arithmetic: how the accuracy's answers were computed; "emulated" stands in for a CPU
            that this machine has not.
        seconds: what it took to make and measure.
        cached: it was made and measured by an earlier search.
        pareto: no other attempt is as good in every respect and better in one.
        session_config: onnxruntime session options that it needs.
    """

    rung: str
    description: str
    precision: str
    status: AttemptStatus
    reason: str
    size_mib: float | None = None
    latency_p50_ms: float | None = None
    latency_p95_ms: float | None = None
    latency_basis: LatencyBasis | None = None
    peak_rss_mib: float | None = None
    accuracy: Interval | None = None
    comparison: Comparison | None = None
    arithmetic: Arithmetic = "native"
    seconds: float = 0.0
    cached: bool = False
    pareto: bool = False
    session_config: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LayerDamage:
    """What quantizing one layer alone does to the logits.

    Attributes:
        layer: its name in the graph.
        op: its ONNX operator.
        parameters: how many weights it holds.
        sqnr_db: signal-to-quantization-noise ratio of the logits; None where nothing changed.
        mean_kl: mean Kullback-Leibler divergence of the answers from fp32's, nats.
        accuracy_drop: a share in [-1, 1].
        kept: what the chosen candidate does with the layer: "int8", "u8", "float", ...
    """

    layer: str
    op: str
    parameters: int
    sqnr_db: float | None = None
    mean_kl: float | None = None
    accuracy_drop: float | None = None
    kept: str


@dataclass(frozen=True, kw_only=True)
class LayerSaturationRow:
    """Where a CPU without VNNI saturates the sum of two int8 products.

    Attributes:
        layer: its name in the graph.
        candidate_pairs: pairs of weights large enough that some input saturates them.
        saturated_share: pairs that did, of all that were computed on real samples, [0, 1].
        worst_error: largest error of an output, in units of its scale.
        repair: what the chosen candidate does about it.
    """

    layer: str
    candidate_pairs: int
    saturated_share: float
    worst_error: float
    repair: Repair


@dataclass(frozen=True, kw_only=True)
class SearchReport:
    """A whole search.

    Attributes:
        name: of the bundle.
        profile: of the device.
        budgets: what was asked.
        attempts: in the order of the ladder; at most one is "chosen".
        layers: damage of single layers, in any order.
        saturation: of single layers, in any order.
        verdict: what came of it, a sentence.
        notes: what the user should know.
        facts: machine, versions and data, in the order to print.
        overrides: limits that the user set aside.
        search: how the ladder was climbed.
        seconds: what all of it took.
    """

    name: str
    profile: str
    budgets: Budgets
    attempts: tuple[Attempt, ...]
    layers: tuple[LayerDamage, ...] = ()
    saturation: tuple[LayerSaturationRow, ...] = ()
    verdict: str
    notes: tuple[str, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    search: str
    seconds: float
