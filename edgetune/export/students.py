"""Students: networks of less work, or made ready for int8, taught by the fine-tuned model."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from edgetune.errors import ConfigError
from edgetune.export.cache import code_key, key_of
from edgetune.export.workshop import Workshop
from edgetune.models.families import blocks
from edgetune.models.prune import prune
from edgetune.profile import DeviceProfile
from edgetune.tasks import TaskModel
from edgetune.train.distill import DistillSettings, distill, student_of, taylor_of
from edgetune.train.events import Event
from edgetune.train.fake_quant import Scheme, finish, prepare

# image sides are multiples of the first, which five halvings leave whole; small ones of the other
IMAGE_STEPS = (32, 8)
SMALL_IMAGE = 128


@dataclass(frozen=True, kw_only=True)
class Student:
    """One row.

    depth: share of the blocks to keep.
    image: factor on the image's side.
    widths: `prune`'s ratios of heads, feed-forwards and channels.
    trainable: quantization-aware with all weights, or with low-rank changes; "" without.
    epochs, lr: of the distillation.
    """

    depth: float = 1.0
    image: float = 1.0
    widths: Mapping[str, float] = field(default_factory=dict)
    trainable: Literal["", "all", "lora"] = ""
    epochs: int = 5
    lr: float = 2e-4


STUDENTS: dict[str, Student] = {
    "qat": Student(trainable="all", epochs=3, lr=2e-5),
    "qat-lora": Student(trainable="lora", epochs=3, lr=5e-4),
    "depth-67": Student(depth=0.67),
    "depth-50": Student(depth=0.5, epochs=8),
    "depth-33": Student(depth=0.34, epochs=10),
    "width-50": Student(widths={"ffn_ratio": 0.5, "head_ratio": 0.5}, epochs=8),
    "image-86": Student(image=0.86, lr=1e-4),
    "image-71": Student(image=0.71, lr=1e-4, epochs=8),
    "image-57": Student(image=0.57, lr=1e-4, epochs=10),
    "channels-75": Student(widths={"channel_ratio": 0.75}, epochs=8),
    "channels-50": Student(widths={"channel_ratio": 0.5}, epochs=12),
    "image-71-channels-75": Student(image=0.71, widths={"channel_ratio": 0.75}, epochs=12),
}


def student(shop: Workshop, name: str, *, seconds: float) -> TaskModel:
    """Return the trained student of that name, trained now or gone on with from the cache.

    Args:
        shop: whose run is the teacher.
        name: a key of `STUDENTS`.
        seconds: training stops after so long; infinity for no limit.

    Raises:
        ConfigError: the model's family has no such parts, or a sample has not one class.
    """
    row = STUDENTS[name]
    teacher, family = shop.run.task, shop.run.family
    if teacher.target != "classes":
        raise ConfigError("students are only taught where each sample has one class")
    pruning: dict[str, Any] = dict(row.widths)
    if row.depth < 1:
        count = len(blocks(teacher.network, family))
        pruning["keep_blocks"] = max(1, min(count - 1, round(row.depth * count)))
    shop.say(f"student {name}: pruning" if pruning else f"student {name}")
    saliency = taylor_of(teacher, shop.dataset.splits["train"]) if row.widths else None
    network = prune(teacher.network, family, saliency=saliency, **pruning)
    made = student_of(teacher, network, image_size=_image_side(teacher, row.image))
    if row.trainable:
        prepare(network, scheme(shop.profile, family.int8, row.trainable))
    else:
        network.requires_grad_(True)
    for module in network.modules():
        if isinstance(module, nn.Embedding):
            # the teacher's serve, and a step over a whole vocabulary takes longer than the rest
            module.weight.requires_grad_(False)
    settings = DistillSettings(
        epochs=row.epochs, lr=row.lr, seconds=seconds if math.isfinite(seconds) else None
    )
    state = dataclasses.asdict(dataclasses.replace(settings, seconds=None))
    key = key_of(
        code_key(), shop.run_key, shop.data_key, name, dataclasses.asdict(row), state,
        shop.profile.cpu.int8 if row.trainable else "",
    )  # fmt: skip
    splits = shop.dataset.splits

    def show(event: Event) -> None:
        if event.kind == "epoch":
            values = event.values
            shop.say(
                f"student {name}: epoch {values['epoch']} of {row.epochs}, accuracy"
                f" {values['val_accuracy']:.4f}"
            )

    distill(
        made, teacher, splits["train"], splits["val"], settings, output=family.output,
        checkpoint=shop.folder("student", key), on_event=show,
    )  # fmt: skip
    if row.trainable:
        finish(network)
    network.cpu().eval().requires_grad_(False)
    return made


def scheme(profile: DeviceProfile, int8: str, trainable: Literal["all", "lora"]) -> Scheme:
    """Return the fake quantization that does in training what the profile's rungs do."""
    if int8 == "static":
        return Scheme(weights="s8", inputs="static", trainable=trainable)
    weights: Literal["s8", "u8"] = "s8" if profile.cpu.int8 == "exact" else "u8"
    return Scheme(weights=weights, inputs="dynamic", trainable=trainable)


def _image_side(teacher: TaskModel, factor: float) -> int | None:
    if factor == 1.0:
        return None
    preprocess = getattr(teacher, "preprocess", None)
    if preprocess is None:
        raise ConfigError("a smaller image: this task has no images")
    side = int(preprocess.spec.input_size)
    step = IMAGE_STEPS[0] if side >= SMALL_IMAGE else IMAGE_STEPS[1]
    smaller = max(step, round(factor * side / step) * step)
    if smaller >= side:
        raise ConfigError(f"a smaller image: {side} pixels times {factor:g} is {smaller}")
    return smaller
