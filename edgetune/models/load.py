"""Load a pretrained network with a head for the labels at hand.

A model is named by a hub id, a local transformers folder, or `torchvision:NAME`.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from edgetune.errors import ConfigError, ResourceError
from edgetune.models.families import Family, find_family
from edgetune.models.preprocessing import Preprocessing
from edgetune.runtime.records import nearest

Kind = Literal["text", "image"]
TORCHVISION = "torchvision:"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A network and what comes with it.

    network: returns logits of shape (batch, labels), or an object with such `.logits`.
    tokenizer_json: text only, the bytes of tokenizer.json.
    pad_id: text only, the token id that pads.
    max_tokens: text only, the longest sequence that the network takes.
    """

    network: nn.Module
    family: Family
    preprocessing: Preprocessing | None = None
    tokenizer_json: bytes = b""
    pad_id: int = 0
    max_tokens: int = 0


def load_model(
    model: str, *, kind: Kind, labels: Sequence[str], weights: str = "default"
) -> Loaded:
    """Load `model` with a fresh head for `labels`.

    Args:
        model: hub id, local folder, or torchvision:NAME.
        kind: "text" or "image".
        labels: names of the classes, in the order of the logits.
        weights: torchvision only: "default", "none", or a local .safetensors / .pth file.

    Raises:
        ConfigError: there is no such model, it is of no known family, or its weights do not fit.
        ResourceError: the published weights cannot be fetched.
    """
    if model.startswith(TORCHVISION):
        if kind != "image":
            raise ConfigError(f"{model}: torchvision models classify images, the task is {kind}")
        return _load_torchvision(model.removeprefix(TORCHVISION), len(labels), weights)
    if weights != "default":
        raise ConfigError(f"weights belongs to torchvision:NAME models, got model {model!r}")
    return _load_transformers(model, kind, labels)


def _load_transformers(model: str, kind: Kind, labels: Sequence[str]) -> Loaded:
    import transformers

    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise ConfigError(f"{model}: expected a transformers folder, it has no config.json")
    if (model.startswith((".", "/", "~")) or model.count("/") > 1) and not Path(model).is_dir():
        raise ConfigError(f"model {model!r}: no such folder")
    auto = {
        "text": transformers.AutoModelForSequenceClassification,
        "image": transformers.AutoModelForImageClassification,
    }[kind]
    with _hub_errors(model):
        config = transformers.AutoConfig.from_pretrained(model)
        family = find_family("transformers", config.model_type)
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
        with _quiet_transformers():
            network = auto.from_pretrained(
                model, config=config, ignore_mismatched_sizes=True, dtype=torch.float32
            )
    _repair_batchnorm(network)
    if kind == "image":
        return Loaded(network=network, family=family, preprocessing=_from_image_processor(model))
    with _hub_errors(model):
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(f"{model}: has no fast tokenizer (tokenizer.json), which devices need")
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"{model}: its tokenizer has no padding token")
    backend.no_truncation()
    backend.no_padding()
    return Loaded(
        network=network,
        family=family,
        tokenizer_json=backend.to_str().encode(),
        pad_id=tokenizer.pad_token_id,
        max_tokens=min(tokenizer.model_max_length, _positions(config)),
    )


def _repair_batchnorm(network: nn.Module) -> None:
    """Give BatchNorm torch's own momentum where a TensorFlow decay was copied in as one.

    transformers' MobileNets have momentum 0.997. TensorFlow means by it that 0.3 % of the
    statistics are new at each step; torch, that 99.7 % are: after training they would be the
    last batch's, and accuracy would depend on which samples that held.
    """
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.momentum or 0) > 0.5:
            module.momentum = 0.1


def _positions(config: Any) -> int:
    """Return how many positions the network embeds; RoBERTa's first two are reserved."""
    positions = getattr(config, "max_position_embeddings", None) or 512
    reserved = 2 if config.model_type in {"roberta", "xlm-roberta"} else 0
    return int(positions) - reserved


def _load_torchvision(name: str, classes: int, weights: str) -> Loaded:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ConfigError(f"torchvision has no model {name!r}{nearest(name, known)}")
    family = find_family("torchvision", name)
    published = torchvision.models.get_model_weights(name).DEFAULT
    network: nn.Module = torchvision.models.get_model(name, weights=None)
    if weights == "default":
        try:
            network.load_state_dict(published.get_state_dict(progress=False, check_hash=True))
        except OSError as error:
            raise ResourceError(
                f"the weights of torchvision:{name} cannot be fetched ({error});"
                " name a local file with --weights, or --weights none to start at random"
            ) from error
    elif weights != "none":
        _load_weights(network, Path(weights))
    _replace_output(network, family, classes)
    transforms = published.transforms()
    interpolation = str(transforms.interpolation.value)
    return Loaded(
        network=network,
        family=family,
        preprocessing=Preprocessing(
            input_size=transforms.crop_size[0],
            resize_size=max(transforms.resize_size[0], transforms.crop_size[0]),
            interpolation="bicubic" if interpolation == "bicubic" else "bilinear",
            mean=tuple(transforms.mean),
            std=tuple(transforms.std),
        ),
    )


def _load_weights(network: nn.Module, path: Path) -> None:
    """Load a state dict from a local file into `network`, all of it."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(state)
    except FileNotFoundError as error:
        raise ConfigError(f"weights {path}: no such file") from error
    except Exception as error:  # safetensors, pickle and torch each raise their own
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"weights {path}: do not fit the model: {first_line}") from error


def _replace_output(network: nn.Module, family: Family, classes: int) -> None:
    """Put a fresh last layer of `classes` outputs in place of the pretrained one."""
    old = network.get_submodule(family.output)
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, classes)
    elif isinstance(old, nn.Conv2d):
        new = nn.Conv2d(old.in_channels, classes, kernel_size=1)
        if hasattr(network, "num_classes"):
            network.num_classes = classes  # type: ignore[assignment]
    else:
        raise ConfigError(f"family {family.name}: output {family.output} is no linear layer")
    network.set_submodule(family.output, new)


def _from_image_processor(model: str) -> Preprocessing:
    """Read a transformers preprocessor_config.json as our own record."""
    from transformers import AutoImageProcessor

    processor: Any = AutoImageProcessor

    with _hub_errors(model):
        settings: dict[str, Any] = processor.from_pretrained(model).to_dict()
    size, crop = settings.get("size") or {}, settings.get("crop_size") or {}
    center = bool(settings.get("do_center_crop")) and bool(crop)
    if "shortest_edge" in size:
        resize = int(size["shortest_edge"])
        side, mode = (int(crop["height"]) if center else resize), "center"
    elif size.get("height") and size.get("height") == size.get("width"):
        side, mode = int(size["height"]), "squash"
        resize = side
    else:
        raise ConfigError(f"{model}: its image size {size} is not one that edgetune reads")
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if not settings.get("do_normalize", True) or mean is None or std is None:
        mean, std = (0.0,) * 3, (1.0,) * 3
    factor = float(settings.get("rescale_factor") or 1 / 255) * 255
    return Preprocessing(
        input_size=side,
        resize_size=resize,
        crop_mode="center" if mode == "center" else "squash",
        # Pillow's numbers: 3 is bicubic, everything else is taken as bilinear
        interpolation="bicubic" if settings.get("resample") == 3 else "bilinear",
        mean=tuple(float(m) / factor for m in mean),
        std=tuple(float(s) / factor for s in std),
    )


@contextlib.contextmanager
def _hub_errors(model: str) -> Iterator[None]:
    """Turn transformers' many ways of saying "not there" into one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        lines = str(error).strip().splitlines()
        first_line = lines[0] if lines else type(error).__name__
        raise ConfigError(
            f"model {model!r}: no local folder of that name, and it cannot be loaded from the"
            f" hub: {first_line}"
            if not Path(model).is_dir()
            else f"model {model!r}: cannot be loaded: {first_line}"
        ) from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence the report on the head that we replace on purpose, and the loading bar."""
    from transformers.utils import logging as untyped

    logging: Any = untyped

    level = logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
