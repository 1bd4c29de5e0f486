"""Load a pretrained network with a head for the labels at hand.

A model is named by a hub id, a local transformers folder, `torchvision:NAME` or `timm:NAME`.
"""

import contextlib
import importlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from edgetune.errors import ConfigError, MissingExtraError, ResourceError
from edgetune.models.families import Family, check_family, find_family
from edgetune.models.preprocessing import Preprocessing
from edgetune.runtime.records import nearest

Kind = Literal["text", "image"]
TORCHVISION = "torchvision:"
TIMM = "timm:"
# models whose own table of positions has no end: what they were pretrained at
UNBOUNDED_TOKENS = 512
# Pillow's numbers of the two kernels that Preprocess has
RESAMPLING: Mapping[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}


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
        model: hub id, local folder, torchvision:NAME or timm:NAME.
        kind: "text" or "image".
        labels: names of the classes, in the order of the logits.
        weights: torchvision and timm only: "default", "none", or a local .safetensors / .pth
            file.

    Raises:
        ConfigError: there is no such model, it is of no known family, or its weights do not fit.
        MissingExtraError: a timm model without timm.
        ResourceError: the published weights cannot be fetched.
    """
    for prefix, load in ((TORCHVISION, _load_torchvision), (TIMM, _load_timm)):
        if model.startswith(prefix):
            if kind != "image":
                raise ConfigError(
                    f"{model}: {prefix.rstrip(':')} models classify images, the task is {kind}"
                )
            return load(model.removeprefix(prefix), len(labels), weights)
    if weights != "default":
        raise ConfigError(
            f"weights belongs to torchvision:NAME and timm:NAME models, got model {model!r}"
        )
    return _load_transformers(model, kind, labels)


def _load_transformers(model: str, kind: Kind, labels: Sequence[str]) -> Loaded:
    import transformers

    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise ConfigError(f"{model}: expected a transformers folder, it has no config.json")
    if (model.startswith((".", "/", "~")) or model.count("/") > 1) and not Path(model).is_dir():
        raise ConfigError(f"model {model!r}: no such folder")
    with _hub_errors(model), _extra("timm"):
        config: Any = transformers.AutoConfig.from_pretrained(model)
    wrapped = config.model_type == "timm_wrapper"
    family = find_family(
        "timm" if wrapped else "transformers",
        config.architecture if wrapped else config.model_type,
    )
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    # a distilled DeiT names a class of two heads that cannot be trained; this asks for the plain
    config.architectures = []
    auto = _network_class(kind, config.model_type)
    with _hub_errors(model), _extra("timm"), _quiet_transformers():
        network = auto.from_pretrained(
            model, config=config, ignore_mismatched_sizes=True, dtype=torch.float32
        )
    if wrapped:
        network = network.timm_model
    check_family(network, family, name=model)
    _repair_batchnorm(network)
    if wrapped:
        published = getattr(config, "pretrained_cfg", None) or network.pretrained_cfg
        preprocessing = _from_timm(published, name=model)
        return Loaded(network=network, family=family, preprocessing=preprocessing)
    if kind == "image":
        return Loaded(network=network, family=family, preprocessing=_from_image_processor(model))
    with _hub_errors(model):
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(f"{model}: has no fast tokenizer (tokenizer.json), which devices need")
    # GPT-2 has no padding token; behind the text and masked, the end token does as well
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad_id is None:
        raise ConfigError(f"{model}: its tokenizer has neither a padding nor an end token")
    network.config.pad_token_id = pad_id  # GPT-2's head finds the end of the text by it
    backend.no_truncation()
    backend.no_padding()
    return Loaded(
        network=network,
        family=family,
        tokenizer_json=backend.to_str().encode(),
        pad_id=pad_id,
        max_tokens=min(tokenizer.model_max_length, _positions(config, family)),
    )


def _network_class(kind: Kind, model_type: str) -> Any:
    """Return the class whose `from_pretrained` loads a classifier."""
    import transformers

    if kind == "image":
        return transformers.AutoModelForImageClassification
    if model_type == "xlnet":
        from edgetune.models.xlnet import RightPaddedXLNet

        return RightPaddedXLNet
    return transformers.AutoModelForSequenceClassification


def _repair_batchnorm(network: nn.Module) -> None:
    """Give BatchNorm torch's own momentum where a TensorFlow decay was copied in as one.

    transformers' MobileNets have momentum 0.997. TensorFlow means by it that 0.3 % of the
    statistics are new at each step; torch, that 99.7 % are: after training they would be the
    last batch's, and accuracy would depend on which samples that held.
    """
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.momentum or 0) > 0.5:
            module.momentum = 0.1


def _positions(config: Any, family: Family) -> int:
    """Return how many tokens the network's table of positions has room for."""
    positions = int(getattr(config, "max_position_embeddings", None) or 0)
    return positions - family.reserved if positions > 0 else UNBOUNDED_TOKENS


def _load_torchvision(name: str, classes: int, weights: str) -> Loaded:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ConfigError(f"torchvision has no model {name!r}{nearest(name, known)}")
    family = find_family("torchvision", name)
    published = torchvision.models.get_model_weights(name).DEFAULT
    with warnings.catch_warnings():
        # Inception and GoogLeNet announce another random start
        warnings.simplefilter("ignore", FutureWarning)
        network: nn.Module = torchvision.models.get_model(name, weights=None)
    check_family(network, family, name=f"torchvision:{name}")
    _drop_unused(network, family)
    if weights == "default":
        try:
            state = published.get_state_dict(progress=False, check_hash=True)
        except OSError as error:
            raise ResourceError(
                f"the weights of torchvision:{name} cannot be fetched ({error});"
                " name a local file with --weights, or --weights none to start at random"
            ) from error
        network.load_state_dict(_used(state, family))
    elif weights != "none":
        _load_weights(network, family, Path(weights))
    _replace_output(network, family, classes)
    transforms = published.transforms()
    interpolation = str(transforms.interpolation.value)
    # Inception and GoogLeNet take what torchvision normalises back to -1..1 before the first
    # layer; so they get it to begin with
    rescales = getattr(network, "transform_input", None) is not None
    return Loaded(
        network=network,
        family=family,
        preprocessing=Preprocessing(
            input_size=transforms.crop_size[0],
            resize_size=max(transforms.resize_size[0], transforms.crop_size[0]),
            interpolation="bicubic" if interpolation == "bicubic" else "bilinear",
            mean=(0.5,) * 3 if rescales else tuple(transforms.mean),
            std=(0.5,) * 3 if rescales else tuple(transforms.std),
        ),
    )


def _load_timm(name: str, classes: int, weights: str) -> Loaded:
    with _extra("timm"):
        timm: Any = importlib.import_module("timm")
    architecture = name.partition(".")[0]  # the rest tells one set of weights from another
    if not timm.is_model(architecture):
        raise ConfigError(f"timm has no model {name!r}{nearest(architecture, timm.list_models())}")
    family = find_family("timm", architecture)
    try:
        network: nn.Module = timm.create_model(name, pretrained=False)
    except RuntimeError as error:  # timm's word for a tag that it does not know
        raise ConfigError(f"timm:{name}: {str(error).splitlines()[0]}") from error
    check_family(network, family, name=f"timm:{name}")
    published: Any = network.pretrained_cfg
    if weights == "default":
        if not (published.get("hf_hub_id") or published.get("url") or published.get("file")):
            raise ConfigError(
                f"timm publishes no weights of {name}; name a local file with --weights, or"
                " --weights none to start at random"
            )
        try:
            network = timm.create_model(name, pretrained=True)
        except Exception as error:  # the hub's, urllib's and torch's own
            raise ResourceError(
                f"the weights of timm:{name} cannot be fetched ({_first_line(error)});"
                " name a local file with --weights, or --weights none to start at random"
            ) from error
    elif weights != "none":
        _load_weights(network, family, Path(weights))
    _repair_batchnorm(network)
    _replace_output(network, family, classes)
    return Loaded(
        network=network, family=family, preprocessing=_from_timm(published, name=f"timm:{name}")
    )


def _drop_unused(network: nn.Module, family: Family) -> None:
    """Take out what the row calls unused: heads halfway up that only help a start at random."""
    for path in family.unused:
        setattr(network, path, None)
        network.aux_logits = False  # type: ignore[assignment]


def _used(state: Mapping[str, torch.Tensor], family: Family) -> dict[str, torch.Tensor]:
    return {n: t for n, t in state.items() if n.partition(".")[0] not in family.unused}


def _load_weights(network: nn.Module, family: Family, path: Path) -> None:
    """Load a state dict from a local file into `network`, all of it that the family uses."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(_used(state, family))
    except FileNotFoundError as error:
        raise ConfigError(f"weights {path}: no such file") from error
    except Exception as error:  # safetensors, pickle and torch each raise their own
        raise ConfigError(f"weights {path}: do not fit the model: {_first_line(error)}") from error


def _replace_output(network: nn.Module, family: Family, classes: int) -> None:
    """Put a fresh last layer of `classes` outputs in place of the pretrained one."""
    old = network.get_submodule(family.output)
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, classes)
    elif isinstance(old, nn.Conv2d):
        new = nn.Conv2d(old.in_channels, classes, kernel_size=1)
    else:
        raise ConfigError(f"family {family.name}: output {family.output} is no linear layer")
    network.set_submodule(family.output, new)
    if hasattr(network, "num_classes"):
        network.num_classes = classes  # type: ignore[assignment]


def _from_image_processor(model: str) -> Preprocessing:
    """Read a transformers preprocessor_config.json as our own record."""
    from transformers import AutoImageProcessor

    processor: Any = AutoImageProcessor

    with _hub_errors(model):
        settings: dict[str, Any] = processor.from_pretrained(model).to_dict()
    input_size, resize_size, mode = _sizes(settings, model)
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if not settings.get("do_normalize") or mean is None or std is None:  # MobileViT says nothing
        mean, std = (0.0,) * 3, (1.0,) * 3
    factor = float(settings.get("rescale_factor") or 1 / 255) * 255
    resample = settings.get("resample", 2)
    if resample not in RESAMPLING:
        raise ConfigError(
            f"{model}: it resizes images with Pillow's filter {resample}; edgetune has"
            " bilinear (2) and bicubic (3)"
        )
    return Preprocessing(
        input_size=input_size,
        resize_size=resize_size,
        crop_mode=mode,
        interpolation=RESAMPLING[int(resample)],
        mean=tuple(float(m) / factor for m in mean),
        std=tuple(float(s) / factor for s in std),
        channel_order="bgr" if settings.get("do_flip_channel_order") else "rgb",
    )


def _sizes(settings: Mapping[str, Any], model: str) -> tuple[int, int, Literal["center", "squash"]]:
    """Return (input size, resize size, crop mode) of an image processor's settings."""
    size, crop = settings.get("size") or {}, settings.get("crop_size") or {}
    cropped = crop.get("height") if settings.get("do_center_crop") else None
    short, share = size.get("shortest_edge"), settings.get("crop_pct")
    if short and share:  # ConvNeXt's: from 384 on nothing is cut off
        return (short, int(short / share), "center") if short < 384 else (short, short, "squash")
    if short:
        return int(cropped or short), int(short), "center"
    if size.get("height") and size.get("height") == size.get("width"):
        return int(cropped or size["height"]), int(size["height"]), "squash"
    raise ConfigError(f"{model}: its image size {size} is not one that edgetune reads")


def _from_timm(published: Mapping[str, Any], *, name: str) -> Preprocessing:
    """Read timm's pretrained_cfg as our own record, as timm's evaluation transform does."""
    resolve: Any = importlib.import_module("timm.data").resolve_data_config
    settings: dict[str, Any] = resolve(pretrained_cfg=dict(published))
    channels, height, width = settings["input_size"]
    mode, interpolation = settings["crop_mode"], settings["interpolation"]
    for what, got, expected in (
        ("images of (channels, height, width)", (channels, height, width), ((3, width, width),)),
        ("crop_mode", mode, ("center", "squash")),
        ("interpolation", interpolation, tuple(RESAMPLING.values())),
    ):
        if got not in expected:
            raise ConfigError(
                f"{name}: it takes {what} {got}; edgetune has {' or '.join(map(str, expected))}"
            )
    return Preprocessing(
        input_size=height,
        resize_size=max(height, math.floor(height / settings["crop_pct"])),
        crop_mode=mode,
        interpolation=interpolation,
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _extra(name: str) -> Iterator[None]:
    """Turn a package that is not there into the extra that brings it."""
    try:
        yield
    except ImportError as error:
        if name not in str(error):
            raise
        raise MissingExtraError(name, name) from error


@contextlib.contextmanager
def _hub_errors(model: str) -> Iterator[None]:
    """Turn transformers' many ways of saying "not there" into one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        first_line = _first_line(error)
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
