"""How much memory does each fine-tuning method take?

    python benchmarks/training_memory.py           BERT-base's shape, six methods, 6 minutes
    python benchmarks/training_memory.py --quick   a small model: does it work

A model of BERT-base's shape with random weights (memory does not depend on their values) and
MiniLM's tokenizer trains on Banking77's texts, cut or padded to nothing: batches are of like
length. Every method runs in a process of its own. Progress goes to stderr, Markdown to stdout.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from _common import (
    BANKING77,
    SHARED,
    print_heading,
    print_table,
    say,
    shared_data,
    text_model,
    warn_if_busy,
    workplace,
)

TEXT = """\
What a training step needs, by method: a model of BERT-base's shape (random weights), Banking77's
longest batch of the size given, AdamW, float32 on the CPU. *weights* is what the network's
parameters take (of nf4 and int8: their codes and scales); *trained* what of them the optimizer
moves; *step* the most resident memory while the step runs, less that of the process before the
model was loaded, so it holds weights, gradients, optimizer state and activations."""

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "freeze, last 2 blocks": {"method": "freeze", "last_blocks": 2},
    "lora, r 8": {"method": "lora"},
    "dora, r 8": {"method": "dora"},
    "qlora, nf4": {"method": "qlora"},
    "qlora, int8": {"method": "qlora", "quant_type": "int8"},
    "head": {"method": "head"},
}
SHAPE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
         "intermediate_size": 3072}  # fmt: skip
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 128}  # fmt: skip


def main() -> None:
    """Run every method and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shared", type=Path, default=SHARED, help=f"shared data [{SHARED}]")
    parser.add_argument("--batch", type=int, default=16, help="samples a batch [16]")
    parser.add_argument("--quick", action="store_true", help="a small model; no usable figures")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(json.loads(given.one))))
        return
    data = shared_data(given.shared, *BANKING77)
    warn_if_busy()
    print_heading("Memory of fine-tuning methods", TEXT)
    with workplace(None) as folder:
        model = make_model(folder / "model", SMALL if given.quick else SHAPE)
        rows = []
        for name, keys in METHODS.items():
            config = {
                "task": "text-classification", "model": str(model), "cpu": True, "epochs": 1,
                "data": str(data / BANKING77[0]), "label_column": "category",
                "output": str(folder / name.replace(" ", "-")), "batch_size": given.batch,
                "val_fraction": 0.02, "time_budget": 0.05, "activation_cache": "off", **keys,
            }  # fmt: skip
            found = alone(config)
            say(f"{name}: {found['step_mib']:.0f} MiB")
            rows.append(
                (
                    name,
                    f"{100 * found['trainable'] / found['parameters']:.2f}",
                    f"{found['weights_mib']:.0f}",
                    f"{found['trained_mib']:.0f}",
                    f"{found['step_mib']:.0f}",
                )
            )
    print_table(("method", "trained %", "weights MiB", "trained MiB", "step MiB"), rows)


def make_model(folder: Path, shape: dict[str, int]) -> Path:
    """Write a random BERT of `shape` with MiniLM's tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(text_model())
    tokenizer.save_pretrained(folder)
    config = BertConfig(vocab_size=len(tokenizer), **shape)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def alone(config: dict[str, Any]) -> dict[str, float]:
    """Measure in a fresh process."""
    command = [sys.executable, __file__, "--one", json.dumps(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(keys: dict[str, Any]) -> dict[str, float]:
    """Train for a moment as `keys` say; return sizes in MiB."""
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import psutil
    import torch
    from transformers.models.bert import modeling_bert  # noqa: F401

    from edgetune.config import TrainConfig
    from edgetune.train import Event, train
    from edgetune.train import engine as engines

    networks: list[torch.nn.Module] = []

    class Seen(engines.Engine):
        """An engine whose network can be looked at."""

        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)
            networks[:] = [self.plain]

    import edgetune.train.loop as loop

    loop.Engine = Seen  # type: ignore[misc]
    before = psutil.Process().memory_info().rss
    plan: dict[str, Any] = {}

    def watch(event: Event) -> None:
        if event.kind == "plan":
            plan.update(event.values)

    train(TrainConfig(**keys), on_event=watch)
    stored = {id(t): t for t in networks[0].state_dict().values() if isinstance(t, torch.Tensor)}
    trained = [p for p in networks[0].parameters() if p.requires_grad]
    return {
        "trainable": plan["trainable"],
        "parameters": plan["parameters"],
        "weights_mib": sum(t.numel() * t.element_size() for t in stored.values()) / 2**20,
        "trained_mib": sum(p.numel() * p.element_size() for p in trained) / 2**20,
        "step_mib": plan["memory_mib"] - before / 2**20,
    }


if __name__ == "__main__":
    main()
