"""`edgetune doctor`: what this machine has and what is wrong with it."""

import click

from edgetune.bench.doctor import ONNXRUNTIMES, Diagnosis, collect_facts, diagnose
from edgetune.cli.output import echo_json, echo_table
from edgetune.errors import ConfigError


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Say what this machine has and what is wrong; exit 2 if there is a problem."""
    click.echo("looking at this machine", err=True)
    diagnosis = diagnose(collect_facts())
    if as_json:
        echo_json(diagnosis)
    else:
        _echo_machine(diagnosis)
        click.echo()
        _echo_packages(diagnosis)
        click.echo()
        _echo_checks(diagnosis)
    problems = [check.name for check in diagnosis.checks if check.status == "problem"]
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"{count}; not so: {'; '.join(problems)}")


def _echo_machine(diagnosis: Diagnosis) -> None:
    facts = diagnosis.facts
    onnxruntime, torch = facts.imports.get("onnxruntime"), facts.imports.get("torch")
    rows = {
        "edgetune": f"{facts.edgetune}, Python {facts.python} ({facts.executable})",
        "system": f"{facts.system}, {facts.pointer_bits} bits",
        "CPU": f"{facts.cpu_model}, {facts.cores} cores",
        "features": " ".join(facts.cpu_features) or "unknown",
        "int8": diagnosis.int8_meaning,
        "memory": f"{facts.memory_available_mib} of {facts.memory_total_mib} MiB available",
        "disk": f"{facts.disk_free_mib} MiB free here",
        "GPU": "; ".join(facts.gpus) or "none that nvidia-smi knows",
        "torch runs on": torch.said if torch and torch.works else "-",
        "onnxruntime has": onnxruntime.said if onnxruntime and onnxruntime.works else "-",
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        click.echo(f"{name:<{width}}  {value}")


def _echo_packages(diagnosis: Diagnosis) -> None:
    facts = diagnosis.facts
    asked: dict[str, str] = {}
    wanted_by: dict[str, list[str]] = {}
    for group, requirements in facts.requirements.items():
        for requirement in requirements:
            asked[requirement.package] = requirement.versions
            wanted_by.setdefault(requirement.package, []).append(group)
    # what only developing edgetune needs is of no interest here, unless it is an extra's lack
    names = [n for n in wanted_by if wanted_by[n] != ["dev"]]
    names += [n for n in facts.packages if n not in wanted_by]
    echo_table(
        ("package", "installed", "asked for", "by"),
        [
            (
                name,
                facts.packages.get(name, "-"),
                asked.get(name, ""),
                ", ".join(g for g in wanted_by.get(name, []) if g != "dev"),
            )
            for name in sorted(names, key=lambda n: (n not in ONNXRUNTIMES, n))
        ],
    )
    if not diagnosis.extras:
        return
    click.echo()
    echo_table(
        ("extra", "state", "lacks"),
        [
            (extra.name, "incomplete" if extra.lacks else "complete", ", ".join(extra.lacks))
            for extra in diagnosis.extras
        ],
    )


def _echo_checks(diagnosis: Diagnosis) -> None:
    checks = diagnosis.checks
    echo_table(("check", "status", "found"), [(c.name, c.status, c.found) for c in checks])
    for check in checks:
        if check.cure:
            click.echo(f"\n{check.status}: {check.found}\n  cure: {check.cure}")
