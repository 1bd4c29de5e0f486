"""`edgetune export`: a run becomes a bundle for a device."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune.cli.output import echo_json, echo_table

if TYPE_CHECKING:
    from edgetune.autodiff.step import Optimizer
    from edgetune.bench.evaluate import AnyAnswers
    from edgetune.export import ExportResult
    from edgetune.export.bundle import PrecisionChoice
    from edgetune.export.candidate import Candidate
    from edgetune.export.climb import Search
    from edgetune.runtime.manifest import Metric
    from edgetune.tasks.metrics import Interval

PRECISIONS: "tuple[PrecisionChoice, ...]" = ("auto", "fp32", "fp16", "int8", "int4")
SEARCHES: "tuple[Search, ...]" = ("first", "pareto")
OPTIMIZERS: "tuple[Optimizer, ...]" = ("adamw", "sgd")


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--profile", default="host", show_default=True, help="Device (edgetune profiles).")
@click.option("--output", type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--precision", type=click.Choice(PRECISIONS), default="auto", show_default=True,
    help="auto tries what the device has and falls back to fp32; another is shipped or nothing.",
)  # fmt: skip
@click.option(
    "--max-drop", type=float, default=0.02, show_default=True,
    help="Largest loss of validation accuracy against fp32, as a share, with 95 % confidence; of a"
    " regression, the largest rise of its mean absolute error.",
)  # fmt: skip
@click.option("--max-class-drop", type=float, help="Largest loss of any class's recall, a share.")
@click.option(
    "--max-latency-ms",
    type=float,
    help="Largest p95 latency of a sample.  [default: the profile's]",
)
@click.option("--max-size-mib", type=float, help="Largest bundle.  [default: the profile's]")
@click.option("--max-rss-mib", type=float, help="Largest peak memory.  [default: the profile's]")
@click.option(
    "--search", type=click.Choice(SEARCHES), default="first", show_default=True,
    help="first: the first that meets every budget; pareto: try all, smaller networks too, and"
    " take the fastest.",
)  # fmt: skip
@click.option(
    "--time-budget", type=float, metavar="SECONDS", help="Begin nothing new after so long."
)
@click.option(
    "--rung", "rungs", multiple=True, metavar="NAME", help="Try only this; may be repeated."
)
@click.option(
    "--allow", multiple=True, metavar="LACK",
    help="Ship in spite of it, and record it: accuracy, samples, latency, size, memory, speed.",
)  # fmt: skip
@click.option(
    "--learn", default="statistics", show_default=True, metavar="METHOD",
    help="What the device can train besides its statistics: head, last:N, norm, bias, lora, the"
    " last three also :N for the last N blocks; none: it learns nothing.",
)  # fmt: skip
@click.option("--learn-rank", type=int, default=8, show_default=True, help="Rank of that LoRA.")
@click.option(
    "--learn-optimizer", type=click.Choice(OPTIMIZERS), default="adamw", show_default=True,
    help="Optimizer of the training step.",
)  # fmt: skip
@click.option(
    "--learn-projection", type=int, metavar="WIDTH",
    help="Project features to so many, with a ReLU, before their statistics.",
)  # fmt: skip
@click.option(
    "--calibrate/--no-calibrate", default=True, show_default=True,
    help="Fit a temperature on the validation split, which makes scores probabilities.",
)  # fmt: skip
@click.option(
    "--abstain", type=float, metavar="ACCURACY",
    help="Mark answers of low score as abstained, so that the others are so accurate (0.98) on the"
    " validation split, with 95 % confidence.",
)  # fmt: skip
@click.option("--name", default="", help="The bundle's name.  [default: the run's]")
@click.option("--release", type=int, default=1, show_default=True, help="Release counter.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    run: Path, profile: str, output: Path | None, precision: "PrecisionChoice", max_drop: float,
    max_class_drop: float | None, max_latency_ms: float | None, max_size_mib: float | None,
    max_rss_mib: float | None, search: "Search", time_budget: float | None,
    rungs: tuple[str, ...], allow: tuple[str, ...], learn: str, learn_rank: int,
    learn_optimizer: "Optimizer", learn_projection: int | None, calibrate: bool,
    abstain: float | None, name: str, release: int, as_json: bool,
) -> None:  # fmt: skip
    """Turn a run into a bundle: merged, quantized, checked and measured.

    Climbs a ladder of quantized graphs and ships the first that loses no more accuracy than
    --max-drop on the device's arithmetic, is not slower than fp32, and meets every budget. A
    report with all that was tried is written beside the bundle.

    \b
    Examples:
      edgetune export runs/intents --profile raspberry-pi-5
      edgetune export runs/photos --profile x86-64-avx2 --max-drop 0.01 --max-size-mib 4
      edgetune export runs/intents --search pareto --time-budget 1800
      edgetune export runs/intents --learn lora
      edgetune export runs/intents --abstain 0.98

    Exits with 5, and writes no bundle, where no graph answers as the trained model does within
    the budgets.
    """  # noqa: D301
    from edgetune.cli.progress import stage_lines
    from edgetune.export import export

    with stage_lines() as say:
        result = export(
            run, profile=profile, output=output, precision=precision, rungs=rungs,
            max_drop=max_drop, max_class_drop=max_class_drop, max_latency_ms=max_latency_ms,
            max_size_mib=max_size_mib, max_rss_mib=max_rss_mib, search=search,
            time_budget_s=time_budget, allow=allow, learn=learn, learn_rank=learn_rank,
            learn_optimizer=learn_optimizer, learn_projection=learn_projection,
            calibrate=calibrate, abstain=abstain, name=name, release=release, on_stage=say,
        )  # fmt: skip
    if as_json:
        echo_json(_as_json(result))
        return
    click.echo("candidates, on the validation split:")
    is_value = result.torch.accuracy is None
    echo_table(VALUE_LADDER if is_value else LADDER, ladder_rows(result))
    click.echo()
    echo_comparison(result)
    click.echo(f"\n{result.report.verdict}")
    for line in (*result.notes, *result.report.overrides):
        click.echo(f"note: {line}")
    if result.chosen.cost.basis == "estimate":
        click.echo(
            f"note: latency and memory are estimates ({result.chosen.cost.note}), not"
            f" {result.profile}'s; measure there with: edgetune bench {result.bundle}"
            " --target ssh://USER@HOST"
        )
    click.echo(f"report: {result.report_path}\nbundle: {result.bundle}")


LADDER = (
    "candidate",
    "result",
    "accuracy",
    "lost at most",
    "agreement",
    "size MiB",
    "p50 ms",
    "p95 ms",
)
COMPARISON = ("model", "accuracy", "95 % interval", "size MiB", "latency p50 ms")
# of a regression: R2 on the ladder, the mean absolute error with its interval beside
VALUE_LADDER = tuple("R2" if name == "accuracy" else name for name in LADDER)
VALUE_COMPARISON = tuple("MAE" if name == "accuracy" else name for name in COMPARISON)


def ladder_rows(result: "ExportResult") -> list[tuple[object, ...]]:
    """Return one row for each candidate that was tried, marked as in the report."""
    states = {a.rung: a.status for a in result.report.attempts}
    rows: list[tuple[object, ...]] = []
    for candidate in result.candidates:
        found, facts = candidate.comparison, candidate.facts()
        about = "~" if facts.estimated else ""
        rows.append(
            (
                candidate.rung.name, states[candidate.rung.name], f"{facts.accuracy:.4f}",
                "" if found is None else f"{100 * found.bound:.2f} points",
                "" if found is None else f"{100 * found.agreement:.1f} %",
                round(facts.size_mib, 1), f"{about}{facts.latency_p50_ms:.2f}",
                f"{about}{facts.latency_p95_ms:.2f}",
            )
        )  # fmt: skip
    return rows


def echo_comparison(result: "ExportResult") -> None:
    """Print torch, the fp32 graph and the bundle side by side."""
    shown = result.torch.split
    click.echo(f"on {len(shown.labels)} {shown.name} samples:")
    echo_table(comparison_titles(result), comparison_rows(result))


def comparison_titles(result: "ExportResult") -> tuple[str, ...]:
    """Return the titles of `comparison_rows`."""
    return COMPARISON if result.torch.accuracy is not None else VALUE_COMPARISON


def comparison_rows(result: "ExportResult") -> list[tuple[object, ...]]:
    """Return one row for torch, fp32 and the bundle each: accuracy or MAE, size, latency."""
    torch = _headline(result.torch)
    rows: list[tuple[object, ...]] = [
        (
            "fp32 torch", round(torch.value, 4), f"{torch.low:.4f} to {torch.high:.4f}",
            round(result.torch_size_bytes / 2**20, 1), round(result.torch_latency_ms, 2),
        )
    ]  # fmt: skip
    return rows + [_row(c) for c in result.candidates if c.answers is not None]


def _headline(answers: "AnyAnswers") -> "Interval | Metric":
    found = answers.accuracy
    if found is None:
        return answers.evaluation().metrics["mae"]
    return found


def _row(candidate: "Candidate") -> tuple[object, ...]:
    assert candidate.answers is not None
    accuracy = _headline(candidate.answers)
    return (
        f"{candidate.rung.name} onnx", round(accuracy.value, 4),
        f"{accuracy.low:.4f} to {accuracy.high:.4f}",
        round(candidate.size_bytes / 2**20, 1), round(candidate.cost.latency_p50_ms, 2),
    )  # fmt: skip


def _as_json(result: "ExportResult") -> dict[str, object]:
    from edgetune.runtime.records import to_mapping

    return {
        "bundle": str(result.bundle),
        "precision": result.precision,
        "chosen": result.chosen.rung.name,
        "profile": result.profile,
        "parity": result.parity,
        "candidates": [
            dict(zip(comparison_titles(result), row, strict=True))
            for row in comparison_rows(result)
        ],
        "search": to_mapping(result.report),
        "report": str(result.report_path),
        "calibration": result.calibration and to_mapping(result.calibration),
        "abstention": result.abstention and to_mapping(result.abstention),
        "notes": list(result.notes),
    }
