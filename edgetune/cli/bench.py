"""`edgetune bench`: what a bundle costs on this machine, or on a device over ssh."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from edgetune.bench.database import database_path, host_name, record
from edgetune.bench.latency import BenchReport, bench
from edgetune.bench.target import bench_target
from edgetune.cli.output import echo_json, echo_table
from edgetune.errors import EdgetuneError
from edgetune.profile import load_profile
from edgetune.runtime.bundle import open_bundle
from edgetune.runtime.measure import MIN_RUNS, Machine

if TYPE_CHECKING:
    from edgetune.runtime.learn.measure import LearningCost

# options that say nothing without --target
TARGET_OPTIONS = ("target_python", "ssh_options", "wheels", "keep", "profile")


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
@click.option(
    "--target", metavar="ssh://USER@HOST[:PORT]",
    help="Measure on this device, through ssh, instead of here.",
)  # fmt: skip
@click.option(
    "--target-python", default="python3", show_default=True, metavar="PATH",
    help="The Python to use there; with what it lacks, an environment is made.",
)  # fmt: skip
@click.option(
    "--ssh-option", "ssh_options", multiple=True, metavar="KEYWORD=VALUE",
    help="For ssh, as in ssh_config (IdentityFile=...), or -Ffile. Can be repeated.",
)  # fmt: skip
@click.option(
    "--wheels", type=click.Path(path_type=Path), metavar="DIR",
    help="Install what the target lacks from these wheels, without a network.",
)  # fmt: skip
@click.option("--keep", is_flag=True, help="Leave other bundles' copies on the target.")
@click.option("--profile", help="Record the result for this profile (default: the bundle's own).")
@click.option(
    "--watts", type=click.FloatRange(min=0, min_open=True),
    help="With --learn: what the board takes with all cores busy, to estimate energy by."
    "  [default: the profile's cpu.active_watts, if it has any]",
)  # fmt: skip
@click.option("--learn", is_flag=True, help="Measure what learning on the device costs instead.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(
    context: click.Context,
    bundle: Path,
    runs: int,
    warmup: int,
    seconds: float,
    threads: int | None,
    cold_starts: int,
    sample: str | None,
    target: str | None,
    target_python: str,
    ssh_options: tuple[str, ...],
    wheels: Path | None,
    keep: bool,
    profile: str | None,
    watts: float | None,
    learn: bool,
    as_json: bool,
) -> None:
    """Measure a bundle's latency, start and memory, one sample a call, here or on a device.

    The result is recorded for the device's profile, if it is of the bundle's own samples.
    """
    if learn:
        if target is not None:
            raise click.UsageError("--learn measures here; run it on the device itself")
        _bench_learning(bundle, runs, threads, watts, as_json)
        return
    if target is None:
        _refuse_target_options(context)
        report = bench(
            bundle,
            runs=runs,
            warmup=warmup,
            seconds=seconds,
            threads=threads,
            cold_starts=cold_starts,
            sample=sample,
            progress=_say,
        )
        name = host_name()
    else:
        named = load_profile(profile).name if profile else ""  # a wrong name, before the work
        report = bench_target(
            bundle,
            target,
            runs=runs,
            warmup=warmup,
            seconds=seconds,
            threads=threads,
            cold_starts=cold_starts,
            sample=sample,
            python=target_python,
            ssh_options=ssh_options,
            wheels=wheels,
            keep=keep,
            progress=_say,
        )
        name = named or report.profile
        # "host" is whatever machine measures: here the target
        name = host_name(report.measurement.machine.cpu_model) if name == "host" else name
    if sample is None:
        _record(report, bundle, name)
    if as_json:
        echo_json(report)
        return
    for line in _head(report):
        click.echo(line)
    click.echo()
    echo_table(("measured", "value", "of"), _rows(report))
    for line in _notes(report):
        click.echo(f"\nnote: {line}")


def _bench_learning(
    bundle: Path, runs: int, threads: int | None, watts: float | None, as_json: bool
) -> None:
    """Print what learning costs on this machine."""
    from edgetune.bench.learning import bench_learning

    manifest = open_bundle(bundle).manifest
    _say(f"measuring what {manifest.name} takes to learn, in a fresh process")
    cost = bench_learning(bundle, steps=runs, threads=threads)
    if as_json:
        echo_json(cost)
        return
    rows = [
        (
            "take a sample in",
            _ms(cost.add_ms),
            "look at it, screen it not, write it to the journal",
        ),
        ("solve the head", _ms(cost.solve_ms), "from the statistics"),
        (
            "a commit writes",
            f"{cost.commit_bytes / 1024:10.1f} KiB",
            f"{cost.commit_syncs} flushes",
        ),
    ]
    if cost.step_ms is not None:
        what = f"batch of {cost.batch}, {cost.threads} threads, without what is kept of a sample"
        rows.append(("optimizer step", _ms(cost.step_ms), what))
    energy = _energy(cost, manifest.profile, watts)
    if energy is not None:
        rows.append(("energy of a step", f"{energy:10.0f} mJ", "estimate, from CPU time here"))
    for name, mib in (
        ("memory, predicting", cost.base_rss_mib), ("memory peak, learning", cost.peak_rss_mib),
    ):  # fmt: skip
        if mib is not None:
            rows.append((name, f"{mib:10.1f} MiB", ""))
    echo_table(("measured", "value", "of"), rows)


def _energy(cost: "LearningCost", profile: str, watts: float | None) -> float | None:
    """Return mJ a step, where the profile says what its board takes."""
    from edgetune.bench.learning import energy_mj

    try:
        cpu = load_profile(profile).cpu
    except EdgetuneError:  # the profile was a file that is not here
        return None
    watts = watts or cpu.active_watts
    return None if watts is None else energy_mj(cost, watts, cpu.cores)


def _say(line: str) -> None:
    click.echo(line, err=True)


def _refuse_target_options(context: click.Context) -> None:
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if name in TARGET_OPTIONS and given:
            raise click.UsageError(f"{parameter.opts[0]} says nothing without --target")


def _record(report: BenchReport, bundle: Path, name: str) -> None:
    """Keep what was measured; a home that can't be written to costs no measurement."""
    try:
        manifest = open_bundle(bundle).manifest
        record(report.measurement, manifest, profile=name, target=report.target)
    except EdgetuneError as error:
        _say(f"warning: not recorded: {error}")
        return
    if report.target:
        _say(f"recorded for profile {name} in {database_path()}")


def _head(report: BenchReport) -> list[str]:
    measured, machine = report.measurement, report.measurement.machine
    says = f"profile {report.profile} says: {report.profile_threads}"
    threads = f"threads as {says}"
    if measured.threads != report.profile_threads:
        threads = f"threads as asked for: {measured.threads} ({says})"
    return [
        f"{report.bundle}: {report.task}, {report.precision}, {report.size_mib:.1f} MiB",
        *([f"measured on {report.target}"] if report.target else []),
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
    if machine.governor is not None:
        rows.append(("CPU governor", f"{machine.governor:>10}", ""))
    return rows


def _notes(report: BenchReport) -> list[str]:
    machine = report.measurement.machine
    notes = []
    if report.profile != "host" and not report.target:
        notes.append(
            f"measured on this CPU ({machine.cpu_model}), not on a {report.profile}; its latency"
            " and memory have to be measured there"
        )
    if machine.throttled:
        notes.append(
            "the CPU was throttled while it was measured (heat or a weak power supply); these are"
            " the figures of a throttled device"
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
