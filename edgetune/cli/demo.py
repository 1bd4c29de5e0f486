"""`edgetune demo`: real data to a device, start to end."""

from pathlib import Path

import click

from edgetune.cli.output import echo_table


@click.command()
@click.option(
    "--task", default="text-classification", show_default=True,
    help="text-classification or image-classification.",
)  # fmt: skip
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("edgetune-demo"), show_default=True,
    help="Folder for data, run and bundle; must not exist.",
)  # fmt: skip
@click.option("--profile", default="host", show_default=True, help="Device (edgetune profiles).")
def command(task: str, output: Path, profile: str) -> None:
    """Fine-tune a real model, export it to int8, verify it, and answer without torch.

    Text: MiniLM learns 17 kinds of commands to home and industrial devices. Images: a small
    ResNet learns scikit-learn's digits. Takes a few minutes on two CPU cores.
    """
    from edgetune.cli.export import echo_comparison
    from edgetune.cli.progress import TrainingDisplay, stage_lines
    from edgetune.demo import demo

    with TrainingDisplay() as display, stage_lines() as say:
        result = demo(task, output=output, profile=profile, on_event=display.show, on_stage=say)
    click.echo("\nanswers of the device runtime, in a process that cannot import torch:")
    rows = [(Path(x).name if task[0] == "i" else x, y, f"{z:.3f}") for x, y, z in result.answers]
    echo_table(("input", "label", "score"), rows)
    click.echo()
    echo_comparison(result.export)
    for note in result.export.notes:
        click.echo(f"note: {note}")
    bundle = result.export.bundle
    click.echo(f"\nbundle: {bundle}\ntry it: edgetune-rt run {bundle} ", nl=False)
    click.echo('"turn the pump off"' if task[0] == "t" else result.answers[0][0])
