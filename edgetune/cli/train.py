"""`edgetune train`: fine-tune, or go on with a run."""

import sys
from pathlib import Path
from typing import Any

import click

from edgetune.cli.options import config_options, given
from edgetune.config import load_config
from edgetune.errors import ConfigError


@click.command()
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    help="TOML file; its keys are the flags below, and a flag wins over the file.",
)
@click.option("--resume", type=click.Path(path_type=Path), help="Run folder to go on with.")
@config_options
def command(config_path: Path | None, resume: Path | None, **flags: Any) -> None:
    """Fine-tune a pretrained model on your data.

    \b
    Examples:
      edgetune train --task text-classification --data intents.csv \\
          --input-column text --label-column intent \\
          --model sentence-transformers/all-MiniLM-L6-v2 --output runs/intents
      edgetune train --task image-classification --data photos/ \\
          --model torchvision:mobilenet_v2 --method freeze --last-blocks 4 \\
          --output runs/photos
      edgetune train --config train.toml --epochs 5
      edgetune train --resume runs/intents
    """  # noqa: D301
    overrides = given(flags)
    if resume is not None and (config_path or overrides):
        raise ConfigError(
            "--resume goes on with the run's own config; leave out --config and "
            + " ".join("--" + k.replace("_", "-") for k in overrides)
        )
    config = None if resume is not None else load_config(config_path, overrides)
    # torch takes seconds to load: say what is wrong with the flags before that
    from edgetune.cli.progress import TrainingDisplay
    from edgetune.train import resume as resume_run
    from edgetune.train import train

    with TrainingDisplay() as display:
        if config is None:
            assert resume is not None
            record = resume_run(resume, on_event=display.show)
        else:
            record = train(config, on_event=display.show)
    if record.status == "interrupted":
        sys.exit(130)
