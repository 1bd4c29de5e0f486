"""Text classification in the cloud: strings -> token ids -> logits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.config import TrainConfig
from edgetune.data import Split
from edgetune.models.load import Loaded
from edgetune.runtime.bundle import TOKENIZER_NAME
from edgetune.runtime.tasks.text_classification import open_tokenizer
from edgetune.tasks import GraphSpec
from edgetune.tasks.graph import SplitClassifier, logits_of


class TokenSamples:
    """A split of texts, tokenized once."""

    def __init__(self, ids: Sequence[Sequence[int]], labels: Sequence[int]) -> None:
        """Keep token ids and label indices, one a sample."""
        self._ids = ids
        self._labels = labels
        self.lengths: Sequence[int] | None = [len(i) for i in ids]

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._ids)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Return one text's ids and label; every epoch sees the same."""
        return {"ids": self._ids[key[1]], "label": self._labels[key[1]]}


class TextClassification:
    """Encodes with the same tokenizer.json that the bundle will carry."""

    def __init__(self, loaded: Loaded, labels: Sequence[str], config: TrainConfig) -> None:
        """Open the tokenizer and settle the longest sequence."""
        self.network = loaded.network
        self.labels = tuple(labels)
        self.max_length = min(config.max_length, loaded.max_tokens)
        self._pad_id = loaded.pad_id
        self._tokenizer_json = loaded.tokenizer_json
        self._tokenizer = open_tokenizer(loaded.tokenizer_json, self.max_length, where=config.model)

    def samples(self, split: Split, *, training: bool) -> TokenSamples:  # noqa: ARG002
        """Tokenize a split; there is no augmentation."""
        index = {label: i for i, label in enumerate(self.labels)}
        encodings = self._tokenizer.encode_batch(list(split.inputs))
        return TokenSamples([e.ids for e in encodings], [index[label] for label in split.labels])

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad to the longest of the batch: int64 (batch, tokens)."""
        width = max(len(s["ids"]) for s in samples)
        ids = torch.full((len(samples), width), self._pad_id)
        mask = torch.zeros((len(samples), width), dtype=torch.int64)
        for row, sample in enumerate(samples):
            ids[row, : len(sample["ids"])] = torch.tensor(sample["ids"])
            mask[row, : len(sample["ids"])] = 1
        labels = torch.tensor([s["label"] for s in samples])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def logits(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return logits, shape (batch, labels)."""
        return logits_of(
            network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        )

    def graph(self, family_output: str) -> GraphSpec:
        """Return token ids and mask -> logits and features; batch and length are free."""
        ids = torch.full((2, min(16, self.max_length)), self._pad_id)
        mask = torch.ones_like(ids)
        mask[1, ids.shape[1] // 2 :] = 0
        free = {0: "batch", 1: "tokens"}
        return GraphSpec(
            module=_TextGraph(SplitClassifier(self.network, family_output)),
            inputs={"input_ids": ids, "attention_mask": mask},
            free={"input_ids": free, "attention_mask": free},
        )

    def device_options(self) -> dict[str, Any]:
        """Return what the device half needs to encode alike."""
        return {"max_length": self.max_length, "pad_id": self._pad_id}

    def device_files(self) -> dict[str, bytes]:
        """Return the tokenizer."""
        return {TOKENIZER_NAME: self._tokenizer_json}


class _TextGraph(nn.Module):
    """Gives the graph's inputs their order."""

    def __init__(self, classifier: SplitClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.classifier(
            input_ids=input_ids, attention_mask=attention_mask
        )
        return outputs
