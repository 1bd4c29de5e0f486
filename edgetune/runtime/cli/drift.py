"""`edgetune-rt drift`: what a watched device has seen of late."""

import json
import time
from pathlib import Path

import click

from edgetune.errors import ConfigError, DataError, GateError
from edgetune.runtime.cli.lazy import printable
from edgetune.runtime.cli.options import JSON
from edgetune.runtime.records import to_mapping
from edgetune.runtime.watch import Summary, read_watch, summarize

SHOWN_CLASSES = 12


@click.command("drift")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    help="Look at this bundle's predictions only, and compare its classes' shares.",
)
@click.option("--fail-on-alarm", is_flag=True, help="Exit with 5 where inputs have drifted.")
@JSON
def command(path: Path, bundle: Path | None, fail_on_alarm: bool, as_json: bool) -> None:
    """Say what a device has predicted of late, by the folder or file PATH that it watched into."""
    digest, shares = _of_bundle(bundle) if bundle else ("", {})
    summaries = summarize(read_watch(path, bundle=digest))
    if not summaries:
        of_bundle = " of this bundle" if bundle else ""
        raise DataError(f"{path}: holds no predictions{of_bundle}")
    if as_json:
        click.echo(json.dumps([to_mapping(s) for s in summaries], indent=2, ensure_ascii=False))
    else:
        for number, summary in enumerate(summaries):
            for line in [*[""] * (number > 0), *_text(summary, shares).splitlines()]:
                click.echo(printable(line))
    last = summaries[-1]
    if fail_on_alarm and not last.baseline:
        raise ConfigError("the bundle has no baseline to tell drift by, so no alarm can come")
    if fail_on_alarm and last.drift_since is not None:
        raise GateError(f"the inputs have drifted since {_when(last.drift_since)}")


def _of_bundle(path: Path) -> tuple[str, dict[str, float]]:
    """Return a bundle's digest and its classes' shares at export, where it knows them."""
    from edgetune.runtime.bundle import open_bundle
    from edgetune.runtime.drift import bundle_baseline

    bundle = open_bundle(path)
    baseline = bundle_baseline(bundle)
    if baseline is None:
        return bundle.manifest.digest, {}
    shares = zip(bundle.manifest.labels, baseline.shares.tolist(), strict=True)
    return bundle.manifest.digest, dict(shares)


def _text(summary: Summary, shares: dict[str, float]) -> str:
    rows = {
        "bundle": summary.bundle[:12],
        "from, to": f"{_when(summary.start)}, {_when(summary.end)}",
        "predictions": f"{summary.predictions:,}",
        "latency": f"p50 {summary.latency_p50_ms:.3g} ms, p95 {summary.latency_p95_ms:.3g} ms",
    }
    if summary.lost:
        rows["lost"] = f"{summary.lost:,} predictions: the file could not be written"
    if summary.windows:
        rows["windows"] = (
            f"{summary.windows:,}, {summary.alarmed:,} with an alarm of the inputs;"
            f" {summary.expected:.1f} would come by chance"
        )
        counted = (f"{name} {count:,}" for name, count in summary.alarms.items())
        rows["alarms"] = ", ".join(counted) or "none"
        rows["inputs"] = _since(summary.drift_since, summary.drift_statistics)
        rows["classes"] = _since(summary.classes_since, ())
    else:
        rows["windows"] = (
            "none is full yet: there is nothing to say of drift"
            if summary.baseline
            else "the bundle has no baseline, so nothing can be said of drift"
        )
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]
    names = list(summary.classes)[:SHOWN_CLASSES]
    wide = max(map(len, names), default=0)
    for name in names:
        share = 100 * summary.classes[name] / max(summary.predictions, 1)
        before = f", {100 * shares[name]:.1f} % at export" if name in shares else ""
        lines.append(f"  {name:<{wide}}  {share:5.1f} %{before}")
    if len(summary.classes) > SHOWN_CLASSES:
        lines.append(f"  ... and {len(summary.classes) - SHOWN_CLASSES} more")
    return "\n".join(lines)


def _since(since: float | None, statistics: tuple[str, ...]) -> str:
    if since is None:
        return "no more alarms of late than chance gives"
    by = f" ({', '.join(statistics)})" if statistics else ""
    return f"DRIFT since {_when(since)}{by}"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
