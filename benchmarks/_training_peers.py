"""The contenders of training_step.py: each a process that does one step when told to.

    python _training_peers.py serve CONTENDER --folder FOLDER --threads N --spin 0
    python _training_peers.py artifacts FOLDER        with onnxruntime-training's own Python

FOLDER holds what all contenders share (`case.json`, `data.npz`) and each one's own files. A
contender answers every line on stdin with one JSON line on stdout: "go" does a step, anything else
ends. Between lines it sleeps in a read. Nothing but the standard library is imported at the top:
what a contender imports is part of its memory, and onnxruntime-training's Python has no edgetune.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

# one step: nothing -> the loss before the update
Step = Callable[[], float]
# import and construction are apart, so that memory can be read between the two
Build = Callable[[], Step]

LR, WEIGHT_DECAY, BETAS, EPS = 5e-4, 0.01, (0.9, 0.999), 1e-8
LORA = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["query", "value"]}


def main() -> None:
    """Serve steps, or write onnxruntime-training's artifacts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser("serve")
    serving.add_argument("contender", choices=CONTENDERS)
    serving.add_argument("--folder", type=Path, required=True)
    serving.add_argument("--threads", type=int, default=1)
    serving.add_argument("--spin", type=int, choices=(0, 1), default=0)
    writing = commands.add_parser("artifacts")
    writing.add_argument("folder", type=Path)
    given = parser.parse_args()
    if given.command == "artifacts":
        write_artifacts(given.folder)
    else:
        serve(given)


# -- the process ---------------------------------------------------------------------------


def serve(given: argparse.Namespace) -> None:
    """Build a contender's step and do it as often as stdin asks.

    Memory, MiB: `start` before anything of the contender is imported, `imported` right before it
    is built, `built` and `build_peak` after; at the end `peak` of the whole process, and
    `step_peak`, the largest since it was built (the kernel's mark is reset in between).
    """
    # libraries print to stdout too: answers get a copy of it, the rest goes to stderr
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    memory = {"start": _status("VmRSS")}
    build = CONTENDERS[given.contender](given)
    memory["imported"] = _status("VmRSS")
    step = build()
    memory |= {"built": _status("VmRSS"), "build_peak": _status("VmHWM")}
    _reset_peak()
    print(json.dumps(memory), file=answers)
    for line in sys.stdin:
        if line.strip() != "go":
            break
        begin = time.perf_counter()
        loss = step()
        ms = 1e3 * (time.perf_counter() - begin)
        print(json.dumps({"ms": ms, "loss": loss}), file=answers)
    step_peak = _status("VmHWM")
    peak = max(step_peak, memory["build_peak"])
    print(json.dumps({"peak": peak, "step_peak": step_peak}), file=answers)


def _status(key: str) -> float:
    """Return an entry of /proc/self/status in MiB; NaN where this system has none."""
    try:
        with Path("/proc/self/status").open() as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith(key))
    except OSError:
        return float("nan")


def _reset_peak() -> None:
    """Set VmHWM back to VmRSS (proc(5), clear_refs 5); where that is forbidden, it stays."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


# -- what all of them read -----------------------------------------------------------------


def case_of(folder: Path) -> dict[str, Any]:
    """Return `case.json`: kind, classes, names of the batch's inputs, names of the trainable."""
    case: dict[str, Any] = json.loads((folder / "case.json").read_text())
    return case


def arrays_of(folder: Path, *names: str) -> dict[str, Any]:
    """Return arrays of `data.npz`, of which no others are read."""
    import numpy as np

    with np.load(folder / "data.npz") as stored:
        return {name: stored[name] for name in names}


def network_of(case: dict[str, Any], folder: Path, *, attention: str = "sdpa") -> Any:
    """Return the torch model in evaluation mode, `requires_grad` on what trains.

    MiniLM as its package has it with peft's LoRA injected, or MobileNetV3-small with the weights
    in `frozen.safetensors`; then the trainable tensors' values from `data.npz`.
    """
    import torch

    network: Any
    if case["kind"] == "text":
        from peft import LoraConfig, inject_adapter_in_model
        from transformers import AutoModelForSequenceClassification

        network = AutoModelForSequenceClassification.from_pretrained(
            case["model"], num_labels=case["classes"], attn_implementation=attention
        )
        inject_adapter_in_model(LoraConfig(**LORA), network)
    else:
        import torchvision
        from safetensors.torch import load_file

        network = torchvision.models.mobilenet_v3_small(num_classes=case["classes"])
        if case["batchnorm"] == "folded":
            fold_batchnorm(network)
        network.load_state_dict(load_file(folder / "frozen.safetensors"))
    network.eval()
    values = arrays_of(folder, *case["trainable"])
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in values)
        if name in values:
            parameter.data.copy_(torch.from_numpy(values[name]))
    return network


def fold_batchnorm(network: Any) -> None:
    """Fold each BatchNorm into the convolution before it, in place."""
    import torch

    network.eval()
    for module in network.modules():
        children = list(module.named_children())
        for (name, conv), (norm_name, norm) in itertools.pairwise(children):
            if isinstance(conv, torch.nn.Conv2d) and isinstance(norm, torch.nn.BatchNorm2d):
                setattr(module, name, torch.nn.utils.fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, torch.nn.Identity())


# -- torch ---------------------------------------------------------------------------------


def torch_eager(given: argparse.Namespace) -> Build:
    """Return torch's ordinary loop: forward, backward, fused AdamW, gradients set to None."""
    import torch

    case = case_of(given.folder)
    # imported here, not where the model is built, so that it counts as import
    if case["kind"] == "text":
        import peft  # noqa: F401
        from transformers import AutoModelForSequenceClassification  # noqa: F401
    else:
        import torchvision  # noqa: F401
        from safetensors.torch import load_file  # noqa: F401
    torch.set_num_threads(given.threads)

    def build() -> Step:
        network = network_of(case, given.folder)
        parameters = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
        )
        arrays = arrays_of(given.folder, *case["inputs"], "labels")
        labels = torch.from_numpy(arrays.pop("labels"))
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}

        def step() -> float:
            optimizer.zero_grad(set_to_none=True)
            output = network(**batch) if case["kind"] == "text" else network(*batch.values())
            logits = output.logits if case["kind"] == "text" else output
            loss = torch.nn.functional.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        return step

    return build


# -- onnxruntime-training ------------------------------------------------------------------


def _training_api() -> None:
    """Make onnxruntime.training importable without what its `__init__` pulls in.

    That one imports optimizers for ORTModule, which import torch, of which learning on a device
    uses nothing. Empty packages with the right path stand in for it, so only the modules asked
    for are read: this is as little memory as the training API can be had for in Python.
    """
    import onnxruntime

    stand_in = ModuleType("onnxruntime.training")
    stand_in.__path__ = [str(Path(onnxruntime.__path__[0]) / "training")]
    sys.modules[stand_in.__name__] = stand_in
    onnxruntime.training = stand_in


def onnxruntime_training(given: argparse.Namespace) -> Build:
    """Return the on-device API's loop: train step, optimizer step, lazy reset of the gradients."""
    import numpy as np
    import onnxruntime as ort

    _training_api()
    from onnxruntime.training.api import CheckpointState, Module, Optimizer

    def build() -> Step:
        case, artifacts = case_of(given.folder), given.folder / "ort-training"
        options = ort.SessionOptions()
        options.intra_op_num_threads = given.threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", str(given.spin))
        state = CheckpointState.load_checkpoint(artifacts / "checkpoint")
        module = Module(artifacts / "training_model.onnx", state, session_options=options)
        optimizer = Optimizer(artifacts / "optimizer_model.onnx", module)
        optimizer.set_learning_rate(LR)
        arrays = arrays_of(given.folder, *case["inputs"], "labels")
        batch = [arrays[name] for name in module.input_names()]
        module.train()

        def step() -> float:
            loss = module(*batch)
            optimizer.step()
            module.lazy_reset_grad()
            return float(np.asarray(loss))

        return step

    return build


def write_artifacts(folder: Path) -> None:
    """Make onnxruntime-training's files of `forward.onnx`; in its own Python, offline."""
    import onnx

    _training_api()
    from onnxruntime.training import artifacts, onnxblock

    case, target = case_of(folder), folder / "ort-training"
    target.mkdir(exist_ok=True)
    model = onnx.load(folder / "forward.onnx")
    artifacts.generate_artifacts(
        model,
        # what is not named stays a constant in the graph, so it is folded and packed like one
        requires_grad=case["trainable"],
        loss=artifacts.LossType.CrossEntropyLoss,
        optimizer=onnxblock.optim.AdamW(betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY),
        artifact_directory=target,
    )


# -- the plain road ------------------------------------------------------------------------


def plain_road(given: argparse.Namespace) -> Build:
    """Return stock onnxruntime's run of the step that torch traced; state stays OrtValues."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import numpy as np
    import onnxruntime as ort

    def build() -> Step:
        case = case_of(given.folder)
        session = _session(ort, given.folder / "plain.onnx", given)
        arrays = arrays_of(given.folder, *case["inputs"], "targets", *case["trainable"])
        for name in case["trainable"]:
            for moment in (f"{name}.m", f"{name}.v"):
                arrays[moment] = np.zeros_like(arrays[name])
        numbers = {"lr": LR, "weight_decay": WEIGHT_DECAY, "eps": EPS}
        arrays |= {name: np.array(value, np.float32) for name, value in numbers.items()}
        feeds = {name: ort.OrtValue.ortvalue_from_numpy(a) for name, a in arrays.items()}
        outputs = [output.name for output in session.get_outputs()]
        steps = 0

        def step() -> float:
            nonlocal steps
            steps += 1
            feeds["t"] = ort.OrtValue.ortvalue_from_numpy(np.array(steps, np.float32))
            loss, *state = session.run_with_ort_values(outputs, feeds)
            feeds.update(
                (name.removesuffix(".out"), value)
                for name, value in zip(outputs[1:], state, strict=True)
            )
            return float(loss.numpy())

        return step

    return build


def _session(ort: Any, path: Path, given: argparse.Namespace, *, patterns: bool = True) -> Any:
    options = ort.SessionOptions()
    options.enable_mem_pattern = patterns
    options.intra_op_num_threads = given.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", str(given.spin))
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


# -- edgetune ------------------------------------------------------------------------------


def edgetune(precision: str, *, kept: bool = False) -> Callable[[argparse.Namespace], Build]:
    """Return what runs edgetune's step, as the device's trainer does.

    Args:
        precision: of the frozen part, "fp32" or "int8".
        kept: the frozen part's results are kept from an earlier epoch; else they are part of
            every step.
    """

    def contender(given: argparse.Namespace) -> Build:
        import edgetune.runtime.ort  # noqa: F401  (switches telemetry off)

        def build() -> Step:
            return edgetune_step(given.folder / f"edgetune-{precision}", given, kept=kept)

        return build

    return contender


def edgetune_step(folder: Path, given: argparse.Namespace, *, kept: bool) -> Step:
    """Open train.onnx, and model.onnx where it hands something over, and return the step."""
    import numpy as np

    from edgetune.runtime.ort import onnxruntime as ort

    session = _session(ort, folder / "train.onnx", given, patterns=False)
    shapes = {i.name: i.shape for i in session.get_inputs()}
    trainable = [name.removesuffix(".m") for name in shapes if name.endswith(".m")]
    case = case_of(given.folder)
    raw = arrays_of(given.folder, *case["inputs"], "targets")
    size = len(raw["targets"])
    with np.load(folder / "trainable.npz") as stored:
        feeds = {name: stored[name] for name in trainable}
    for name in trainable:
        for suffix in ("grad", "m", "v"):
            feeds[f"{name}.{suffix}"] = np.zeros_like(feeds[name])
    feeds["sample_weight"] = np.ones(size, np.float32)
    numbers = {"lr": LR, "weight_decay": WEIGHT_DECAY, "weight_sum": size}
    feeds |= {name: np.array(value, np.float32) for name, value in numbers.items()}
    feeds |= {name: raw[name] for name in raw if name in shapes}
    latents = json.loads((folder / "latents.json").read_text())
    frozen = _session(ort, folder / "model.onnx", given) if latents else None
    # the frozen part has the names of edgetune's own inputs
    inputs = {"image": raw["pixels"]} if "pixels" in raw else {}

    only = ort.RunOptions()
    only.only_execute_path_to_fetches = True

    def look() -> None:
        # one sample at a time, as the trainer does: it needs less memory
        parts = [
            frozen.run(latents, {n: v[i : i + 1] for n, v in inputs.items()}, only)
            for i in range(size)
        ]
        feeds.update(zip(latents, map(np.concatenate, zip(*parts, strict=True)), strict=True))

    if frozen is not None:
        look()
    feeds = {name: array for name, array in feeds.items() if name in shapes}
    outputs = ["loss", *(f"{n}{s}.out" for n in trainable for s in ("", ".m", ".v"))]
    steps = 0

    def step() -> float:
        nonlocal steps
        steps += 1
        if frozen is not None and not kept:
            look()
        feeds["t"] = np.array(steps, np.float32)
        loss, *state = session.run(outputs, feeds, only)
        feeds.update(zip((o.removesuffix(".out") for o in outputs[1:]), state, strict=True))
        return float(loss) / size

    return step


CONTENDERS: dict[str, Callable[[argparse.Namespace], Build]] = {
    "torch eager": torch_eager,
    "onnxruntime-training": onnxruntime_training,
    "plain road": plain_road,
    "edgetune fp32": edgetune("fp32"),
    "edgetune int8": edgetune("int8"),
    "edgetune int8, kept": edgetune("int8", kept=True),
}


if __name__ == "__main__":
    main()
