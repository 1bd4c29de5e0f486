"""`edgetune bench`: what a bundle costs on this machine."""

from pathlib import Path

import click

from edgetune.bench.latency import BenchReport, bench
from edgetune.cli.output import echo_json, echo_table
from edgetune.runtime.measure import MIN_RUNS, Machine


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--runs", type=click.IntRange(min=MIN_RUNS), default=200, show_default=True,
    help="Timed predictions.",
)  # fmt: skip
@click.option(
    "--warmup", type=click.IntRange(min=0), default=20, show_default=True,
    help="Untimed predictions before them.",
)  # fmt: skip
@click.option(
    "--seconds", type=click.FloatRange(min=0, min_open=True), default=10.0, show_default=True,
    help=f"Stop after so long, with fewer runs, but at least {MIN_RUNS}.",
)  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(min=1), help="Threads (default: as the bundle's profile says)."
)
@click.option(
    "--cold-starts", type=click.IntRange(min=0), default=5, show_default=True,
    help="Processes to start for the time to a first answer; 0 for none.",
)  # fmt: skip
@click.option(
    "--sample", metavar="TEXT_OR_FILE",
    help="Predict this instead of the bundle's own samples: an image, a text, or a file with one.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    bundle: Path,
    runs: int,
    warmup: int,
    seconds: float,
    threads: int | None,
    cold_starts: int,
    sample: str | None,
    as_json: bool,
) -> None:
    """Measure a bundle's latency, start and memory on this machine, one sample a call."""
    report = bench(
        bundle,
        runs=runs,
        warmup=warmup,
        seconds=seconds,
        threads=threads,
        cold_starts=cold_starts,
        sample=sample,
        progress=lambda line: click.echo(line, err=True),
    )
    if as_json:
        echo_json(report)
        return
    for line in _head(report):
        click.echo(line)
    click.echo()
    echo_table(("measured", "value", "of"), _rows(report))
    for line in _notes(report):
        click.echo(f"\nnote: {line}")


def _head(report: BenchReport) -> list[str]:
    measured, machine = report.measurement, report.measurement.machine
    says = f"profile {report.profile} says: {report.profile_threads}"
    threads = f"threads as {says}"
    if measured.threads != report.profile_threads:
        threads = f"threads as asked for: {measured.threads} ({says})"
    return [
        f"{report.bundle}: {report.task}, {report.precision}, {report.size_mib:.1f} MiB",
        f"{machine.cpu_model}, {machine.cores} cores; onnxruntime {machine.onnxruntime},"
        f" Python {machine.python}",
        threads,
    ]


def _rows(report: BenchReport) -> list[tuple[str, str, str]]:
    measured, cold = report.measurement, report.cold_start
    runs = f"{measured.runs} runs over {measured.samples} samples, one a call"
    rows = [
        ("latency p50", _ms(measured.latency_p50_ms), runs),
        ("latency p95", _ms(measured.latency_p95_ms), ""),
        ("latency p99", _ms(measured.latency_p99_ms), ""),
        ("latency mean", _ms(measured.latency_mean_ms), ""),
        ("latency min", _ms(measured.latency_min_ms), ""),
        ("throughput", f"{measured.throughput_per_s:10.1f} /s", "one caller"),
    ]
    if cold is not None:
        spread = f"{min(cold.each_ms):.0f} to {max(cold.each_ms):.0f} ms"
        what = f"process start to first answer, median of {len(cold.each_ms)} ({spread})"
        rows.append(("cold start", _ms(cold.median_ms), what))
    if measured.import_ms is not None:
        rows.append(("import", _ms(measured.import_ms), "edgetune.runtime, numpy, onnxruntime"))
    rows += [
        ("load", _ms(measured.load_ms), "open the bundle, make the session"),
        ("first predict", _ms(measured.first_predict_ms), ""),
    ]
    memory = (
        ("memory before load", measured.rss_before_load_mib, "Python, numpy, onnxruntime"),
        ("memory peak", measured.peak_rss_mib, "the process that measured latency"),
        ("memory peak, cold start", cold.peak_rss_mib if cold else None, "one answer"),
    )
    rows += [(name, f"{mib:10.1f} MiB", what) for name, mib, what in memory if mib is not None]
    return rows + _sensors(measured.machine)


def _sensors(machine: Machine) -> list[tuple[str, str, str]]:
    rows = []
    if machine.cpu_mhz is not None:
        top = f"of {machine.cpu_max_mhz:.0f} MHz" if machine.cpu_max_mhz is not None else ""
        rows.append(("CPU clock", f"{machine.cpu_mhz:10.0f} MHz", f"after the last run, {top}"))
    if machine.temperature_c is not None:
        rows.append(("temperature", f"{machine.temperature_c:10.1f} °C", "after the last run"))
    return rows


def _notes(report: BenchReport) -> list[str]:
    machine = report.measurement.machine
    notes = []
    if report.profile != "host":
        notes.append(
            f"measured on this CPU ({machine.cpu_model}), not on a {report.profile}; its latency"
            " and memory have to be measured there"
        )
    if machine.load_average is not None and machine.load_average[0] > machine.cores / 2:
        notes.append(
            f"other work was running (load average {machine.load_average[0]:.1f} on"
            f" {machine.cores} cores), which makes every figure worse; measure again when it is"
            " done"
        )
    return notes


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:10.{3 if milliseconds < 1 else 2}f} ms"
