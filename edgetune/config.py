"""The training config: one strict record that TOML files and command-line flags share.

Every field is a key of the file and, with dashes, a flag. `help`, choices and bounds
stand beside the field, so that the command line and the docs are made from them.
"""

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from edgetune.errors import ConfigError
from edgetune.runtime.records import from_mapping

Method = Literal[
    "full", "head", "freeze", "lora", "dora", "rslora", "adalora", "ia3", "bitfit", "norm", "qlora"
]
QuantType = Literal["nf4", "int8"]
LossName = Literal["auto", "cross_entropy", "bce", "focal", "mse", "huber"]
ClassWeights = Literal["none", "balanced"]
OptimizerName = Literal["adamw", "adam", "sgd", "lion", "adamw_8bit"]
ScheduleName = Literal[
    "cosine", "linear", "constant", "exponential", "step", "plateau", "one_cycle"
]
Augmentation = Literal["none", "flip", "standard", "randaugment", "augmix"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
SelectionMetric = Literal["auto", "accuracy", "f1_macro", "loss", "mae", "r2"]
ActivationCache = Literal["auto", "off", "memory", "disk"]
Compile = Literal["auto", "off", "on"]
Sharding = Literal["auto", "off", "on"]
Tracker = Literal["tensorboard", "mlflow", "wandb"]

# methods that put adapters of a rank beside frozen weights
LORA_METHODS: tuple[Method, ...] = ("lora", "dora", "rslora", "adalora", "qlora")


def _key(
    default: Any,
    help_text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """Declare a key: its default, its help and its bounds (`low` <= x <= `high`, x > `above`)."""
    return dataclasses.field(
        default=default,
        metadata={"help": help_text, "low": low, "high": high, "above": above},
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a training run depends on. Keys and flags are the same words."""

    # what
    task: str = _key(
        "",
        "text- or image-classification, -multilabel-classification or -regression, such as"
        " text-classification",
    )
    model: str = _key("", "hub id, local transformers folder, torchvision:NAME or timm:NAME")
    weights: str = _key(
        "default",
        "torchvision and timm only: 'default' (published weights), 'none' (random), or a local"
        " .safetensors / .pth file",
    )
    data: str = _key("", "folder of class folders, or a CSV / TSV / JSONL / Parquet file")
    val: str = _key("", "validation data; else a val/ folder, else a share of the training data")
    test: str = _key("", "test data; else a test/ folder where there is one")
    output: str = _key("", "run folder to write; it must not exist")

    # data
    input_column: str = _key("", "column with the text or image path (default: text or image)")
    label_column: str = _key("label", "column with the label")
    label_separator: str = _key("|", "multilabel: what stands between two labels of a sample")
    val_fraction: float = _key(
        0.15,
        "share of the training data held out where no validation data is named",
        above=0.0,
        high=0.9,
    )
    min_per_class: int = _key(2, "fewest training samples a class may have", low=1)
    allow: tuple[str, ...] = _key((), "data problems to accept, by kind (see: edgetune data check)")
    max_length: int = _key(128, "text: longest sequence in tokens; longer is cut", low=4)
    image_size: int | None = _key(None, "image: side in pixels (default: the model's)", low=16)
    augment: Augmentation = _key(
        "standard",
        "image: none, flip, standard (crop + flip), randaugment or augmix (each after standard)",
    )
    augment_views: int = _key(
        0, "image: different augmentations of a sample; 0 for a new one every epoch", low=0
    )
    mixup: float = _key(0.0, "image: mixup, alpha of its beta distribution; 0 for none", low=0.0)
    cutmix: float = _key(0.0, "image: CutMix, alpha of its beta distribution; 0 for none", low=0.0)
    token_dropout: float = _key(
        0.0, "text: share of the tokens left out of a training sample", low=0.0, high=0.9
    )

    # method
    method: Method = _key(
        "lora",
        "full, head, freeze, lora, dora, rslora, adalora, ia3, bitfit (biases), norm or qlora",
    )
    last_blocks: int | None = _key(None, "freeze: train only the last N blocks and the head", low=1)
    train_patterns: tuple[str, ...] = _key(
        (), "freeze: train parameters whose name matches one of these patterns (fnmatch)"
    )
    unfreeze_every: int = _key(
        0,
        "full, freeze: begin with the head and free one more block every N epochs, from the"
        " output down; 0 frees all at once",
        low=0,
    )
    layer_decay: float = _key(
        1.0, "factor of the learning rate from block to block, from the output down",
        above=0.0, high=1.0,
    )  # fmt: skip
    lora_r: int = _key(8, "lora and its kin: rank", low=1)
    lora_alpha: float = _key(
        16.0, "lora and its kin: scale numerator (scale = alpha / r; rslora: / sqrt r)", above=0.0
    )
    lora_dropout: float = _key(
        0.05, "lora and its kin: dropout on the adapter's input", low=0.0, high=0.95
    )
    lora_targets: tuple[str, ...] = _key(
        (), "lora and its kin, ia3: module names (default: the family's row)"
    )
    quant_type: QuantType = _key("nf4", "qlora: how the frozen weights are kept, nf4 or int8")
    double_quant: bool = _key(True, "qlora, nf4: quantize the scales too")

    # loss
    loss: LossName = _key(
        "auto",
        "cross_entropy, bce (each label for itself), focal, mse or huber; auto goes by the task",
    )
    class_weights: ClassWeights = _key("none", "none, or balanced: inverse to a class's frequency")
    label_smoothing: float = _key(0.0, "share of a label given to all classes", low=0.0, high=0.9)
    focal_gamma: float = _key(2.0, "focal: how far easy samples count less", low=0.0)
    huber_delta: float = _key(
        1.0, "huber: error from which it grows linearly, in units of the target", above=0.0
    )

    # optimization
    epochs: int = _key(10, "passes over the training data", low=1)
    time_budget: float = _key(
        0.0, "minutes that training may take; epochs and schedule are fitted; 0 for no limit",
        low=0.0,
    )  # fmt: skip
    batch_size: int = _key(
        32, "samples a batch, over all processes; 0 finds the largest that fits in memory", low=0
    )
    lr: float | None = _key(
        None, "peak learning rate (default: by method and optimizer)", above=0.0
    )
    find_lr: bool = _key(False, "find the learning rate first, by a range test (lr_finder.png)")
    optimizer: OptimizerName = _key("adamw", "adamw, adam, sgd, lion or adamw_8bit")
    momentum: float = _key(0.9, "sgd: momentum", low=0.0, high=0.999)
    nesterov: bool = _key(False, "sgd: Nesterov's momentum")
    beta1: float = _key(0.9, "adam, adamw, lion: decay of the first moment", low=0.0, high=0.9999)
    beta2: float = _key(
        0.999, "adam, adamw, lion: decay of the second moment", low=0.0, high=0.99999
    )
    weight_decay: float = _key(0.01, "on weights of two or more dimensions", low=0.0)
    schedule: ScheduleName = _key(
        "cosine",
        "cosine, linear, constant, exponential, step, plateau or one_cycle, after the warm-up",
    )
    warmup_fraction: float = _key(
        0.06, "share of the steps that warm up (one_cycle: that rise)", low=0.0, high=0.9
    )
    schedule_gamma: float = _key(
        0.1, "step, plateau: factor at each drop; exponential: factor over the whole run",
        above=0.0, high=1.0,
    )  # fmt: skip
    schedule_epochs: int = _key(
        3, "step: epochs between drops; plateau: epochs without a better metric before one", low=1
    )
    grad_clip: float = _key(1.0, "largest gradient norm; 0 for none", low=0.0)
    grad_accumulation: int = _key(1, "batches a step", low=1)
    ema_decay: float = _key(
        0.0, "exponential moving average of the weights, which is measured and kept; 0 for none",
        low=0.0, high=0.99999,
    )  # fmt: skip
    metric: SelectionMetric = _key(
        "auto",
        "what picks the best checkpoint: accuracy, f1_macro, loss, mae or r2; auto goes by the"
        " task: accuracy, f1_macro (multilabel) or loss (regression)",
    )
    patience: int = _key(4, "epochs without a better metric before stopping; 0 for never", low=0)

    # machine
    precision: Precision = _key("auto", "auto, fp32, bf16 or fp16")
    seed: int = _key(0, "seed of every random choice", low=0)
    workers: int | None = _key(None, "data loading processes (default: by the machine)", low=0)
    cpu: bool = _key(False, "train on the CPU even where there is a GPU")
    checkpoint_minutes: float = _key(5.0, "longest time between two checkpoints", above=0.0)
    checkpoint_steps: int = _key(0, "steps between two checkpoints; 0 goes by time", low=0)
    activation_cache: ActivationCache = _key(
        "auto",
        "keep what the frozen layers hand over, so that later epochs skip them: auto, off,"
        " memory or disk",
    )
    cache_gib: float = _key(4.0, "most that kept activations may take, GiB", above=0.0)
    compile: Compile = _key("auto", "torch.compile: auto (where it pays back), off or on")
    sharding: Sharding = _key(
        "auto", "several GPUs: shard the model (FSDP2): auto (where it does not fit), off or on"
    )
    track: tuple[Tracker, ...] = _key((), "report to tensorboard, mlflow or wandb")

    def __post_init__(self) -> None:
        """Check the bounds.

        Raises:
            ConfigError: a value lies outside its bounds, or two keys contradict.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                _check_bounds(field.name, value, field.metadata)
        for given, methods, words in (
            (self.last_blocks or self.train_patterns, ("freeze",), "last_blocks, train_patterns"),
            (self.unfreeze_every, ("full", "freeze"), "unfreeze_every"),
            (self.lora_targets, (*LORA_METHODS, "ia3"), "lora_targets"),
        ):
            if given and self.method not in methods:
                raise ConfigError(
                    f"{words} belong to method {', '.join(map(repr, methods))}, got {self.method!r}"
                )
        if self.method == "freeze" and not (self.last_blocks or self.train_patterns):
            raise ConfigError("method 'freeze' needs last_blocks or train_patterns, got neither")
        if (self.mixup or self.cutmix) and self.loss == "focal":
            raise ConfigError(
                "mixup and cutmix make soft labels, which loss 'focal' has not; use cross_entropy"
                " or bce"
            )


# what people call a key elsewhere
ALIASES: Mapping[str, str] = {
    "learning_rate": "lr",
    "rank": "lora_r",
    "r": "lora_r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "lora_targets",
    "batch": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "warmup_ratio": "warmup_fraction",
    "lr_scheduler_type": "schedule",
    "scheduler": "schedule",
    "gradient_accumulation_steps": "grad_accumulation",
    "max_grad_norm": "grad_clip",
    "max_seq_length": "max_length",
    "text_column": "input_column",
    "image_column": "input_column",
    "imgsz": "image_size",
    "output_dir": "output",
    "train": "data",
    "validation": "val",
    "num_workers": "workers",
    "early_stopping_patience": "patience",
    "unfreeze": "train_patterns",
}

REQUIRED = ("task", "model", "data", "output")


def load_config(path: Path | None, overrides: Mapping[str, object]) -> TrainConfig:
    """Read a TOML config and lay `overrides` (flags) over it.

    Args:
        path: the file, or None for the defaults.
        overrides: keys given elsewhere; None means not given.

    Raises:
        ConfigError: the file is absent or no TOML, a key is unknown, ill-typed or out of
            bounds, or a required key (task, model, data, output) is missing.
    """
    values: dict[str, object] = {}
    if path is not None:
        values.update(read_toml(path))
    values.update({k: v for k, v in overrides.items() if v is not None})
    where = str(path) if path is not None else "flags"
    config = from_mapping(TrainConfig, values, where=where, aliases=ALIASES)
    missing = [k for k in REQUIRED if not getattr(config, k)]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: not given; set them in a config file or as"
            f" {' '.join('--' + k for k in missing)}"
        )
    return config


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
        ConfigError: the file is absent, unreadable or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is no valid TOML: {error}") from error


def choices(name: str) -> tuple[str, ...]:
    """Return the words that key `name` may have, or () where it is free."""
    hint = get_type_hints(TrainConfig)[name]
    if get_origin(hint) is tuple:
        hint = get_args(hint)[0]
    return tuple(a for a in get_args(hint) if isinstance(a, str))


def _check_bounds(name: str, value: float, bounds: Mapping[str, Any]) -> None:
    low, high, above = bounds.get("low"), bounds.get("high"), bounds.get("above")
    if low is not None and value < low:
        raise ConfigError(f"{name}: expected at least {low:g}, got {value:g}")
    if above is not None and value <= above:
        raise ConfigError(f"{name}: expected more than {above:g}, got {value:g}")
    if high is not None and value > high:
        raise ConfigError(f"{name}: expected at most {high:g}, got {value:g}")
