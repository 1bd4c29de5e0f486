"""The `edgetune` command: the table of commands, loaded one at a time, and the one `except`."""

import os
import sys

import click

from edgetune import __version__
from edgetune.errors import MissingExtraError
from edgetune.runtime.cli.lazy import LazyGroup, run_command_line

COMMANDS = {
    "demo": ("edgetune.cli.demo:command", "Take real data to a device, start to end."),
    "data": ("edgetune.cli.data:group", "Look at a data set: what is there, what is wrong."),
    "train": ("edgetune.cli.train:command", "Fine-tune a pretrained model."),
    "tune": ("edgetune.cli.tune:command", "Search for the best training config."),
    "runs": ("edgetune.cli.runs:group", "List, compare and clean training runs."),
    "eval": ("edgetune.cli.eval:command", "Measure a run or a bundle on labelled data."),
    "explain": ("edgetune.cli.explain:command", "Show what a prediction rests on."),
    "export": ("edgetune.cli.export:command", "Turn a run into a bundle for a device."),
    "merge": ("edgetune.cli.merge:command", "Merge what devices learned into a new bundle."),
    "privacy": ("edgetune.cli.privacy:command", "Say what noise on statistics proves."),
    "bench": ("edgetune.cli.bench:command", "Measure a bundle's latency, start and memory."),
    "profiles": ("edgetune.cli.profiles:command", "List the device profiles, or show one."),
    "doctor": ("edgetune.cli.doctor:command", "Say what this machine has and what is wrong."),
}


# what the base install, a device's, does not bring
CLOUD_PACKAGES = (
    "torch", "torchvision", "transformers", "peft", "accelerate", "safetensors", "onnx",
    "onnxscript", "pyarrow", "matplotlib", "rich", "tomli_w",
)  # fmt: skip


@click.group(
    cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="edgetune")
def cli() -> None:
    """Fine-tune a pretrained model, export it for an edge device, and run it there."""


def main() -> None:
    """Run the command line; an edgetune error becomes one line and its exit code."""
    # libraries that report progress or advice of their own would bury ours
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        run_command_line(cli)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in CLOUD_PACKAGES:
            raise
        missing = MissingExtraError(package, "train")
        click.echo(f"error: {missing}", err=True)
        sys.exit(missing.exit_code)


if __name__ == "__main__":
    main()
