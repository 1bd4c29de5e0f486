"""Text classification and regression in the cloud: strings -> token ids -> logits.

What the labels are, one class, several labels or a number, is data: `target`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgetune.config import TrainConfig
from edgetune.data import Scale, Split, Target
from edgetune.models.load import Loaded
from edgetune.runtime.bundle import TOKENIZER_NAME
from edgetune.runtime.tasks.text_classification import open_tokenizer
from edgetune.tasks import GraphSpec
from edgetune.tasks.augment import drop_tokens
from edgetune.tasks.graph import SplitClassifier, logits_of
from edgetune.tasks.targets import scale_options, target_tensor


class TokenSamples:
    """A split of texts, tokenized once and kept as one array, so that a batch is one gather."""

    def __init__(
        self,
        ids: Sequence[Sequence[int]],
        labels: Sequence[int] | Tensor,
        *,
        pad_id: int,
        token_dropout: float = 0.0,
        special: frozenset[int] = frozenset(),
        seed: int = 0,
    ) -> None:
        """Keep token ids and labels, one a sample.

        Args:
            ids: token ids of each text.
            labels: index of each text's label, or what else `target_tensor` gives.
            pad_id: id that fills a batch's shorter rows.
            token_dropout: share of a text's tokens left out, drawn anew every epoch.
            special: ids that are never left out.
            seed: of the token dropout.
        """
        lengths = np.array([len(i) for i in ids], np.int64)
        self.lengths: Sequence[int] | None = lengths.tolist()
        self.views: int | None = None if token_dropout else 1
        self._lengths = torch.from_numpy(lengths)
        self._starts = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)[:-1]]))
        flat = np.fromiter((t for i in ids for t in i), np.int64, count=int(lengths.sum()))
        self._flat = torch.from_numpy(flat)
        self._labels = torch.as_tensor(labels)
        self._pad_id = pad_id
        self._token_dropout, self._special, self._seed = token_dropout, special, seed

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._labels)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Return one text's ids, int64 (tokens,), and its label."""
        return {"ids": self._ids(*key), "label": self._labels[key[1]]}

    def view(self, epoch: int, index: int) -> int:  # noqa: ARG002
        """Return 0 where every epoch sees the same, else the epoch."""
        return epoch if self._token_dropout else 0

    def batch(
        self, indices: Sequence[int], *, epoch: int = 0, view: int | None = None
    ) -> dict[str, Tensor]:
        """Return int64 `input_ids` and `attention_mask` (batch, tokens), `labels` (batch, ...)."""
        if self._token_dropout:
            number = epoch if view is None else view
            ids = [self._ids(number, int(i)) for i in indices]
            return pad(ids, self._pad_id) | {"labels": self._labels[torch.as_tensor(indices)]}
        chosen = torch.as_tensor(indices)
        lengths = self._lengths[chosen]
        columns = torch.arange(int(lengths.max()))
        mask = columns < lengths[:, None]  # (batch, tokens)
        where = (self._starts[chosen][:, None] + columns).clamp_(max=len(self._flat) - 1)
        return {
            "input_ids": self._flat[where].masked_fill_(~mask, self._pad_id),
            "attention_mask": mask.to(torch.int64),
            "labels": self._labels[chosen],
        }

    def outline(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the batch: tokens cost nothing."""
        return self.batch(indices)

    def _ids(self, epoch: int, index: int) -> Tensor:
        start = int(self._starts[index])
        ids = self._flat[start : start + int(self._lengths[index])]
        if not self._token_dropout:
            return ids
        rng = np.random.default_rng((self._seed, epoch, index))
        kept = drop_tokens(ids.numpy(), rng, self._token_dropout, keep=self._special)
        return torch.from_numpy(kept)


def pad(ids: Sequence[Tensor], pad_id: int) -> dict[str, Tensor]:
    """Return int64 `input_ids` and `attention_mask`, (batch, tokens), as wide as the longest."""
    width = max(len(i) for i in ids)
    tokens = torch.full((len(ids), width), pad_id)
    mask = torch.zeros((len(ids), width), dtype=torch.int64)
    for row, sample in enumerate(ids):
        tokens[row, : len(sample)] = sample
        mask[row, : len(sample)] = 1
    return {"input_ids": tokens, "attention_mask": mask}


class TextClassification:
    """Encodes with the same tokenizer.json that the bundle will carry; for every target."""

    def __init__(
        self,
        loaded: Loaded,
        labels: Sequence[str],
        config: TrainConfig,
        *,
        target: Target = "classes",
        scale: Scale | None = None,
    ) -> None:
        """Open the tokenizer and settle the longest sequence."""
        self.network = loaded.network
        self.labels = tuple(labels)
        self.target, self.scale = target, scale
        self.max_length = min(config.max_length, loaded.max_tokens)
        self._pad_id = loaded.pad_id
        self._token_dropout, self._seed = config.token_dropout, config.seed
        self._tokenizer_json = loaded.tokenizer_json
        self._tokenizer = open_tokenizer(loaded.tokenizer_json, self.max_length, where=config.model)

    def samples(self, split: Split, *, training: bool) -> TokenSamples:
        """Tokenize a split; tokens are left out only where `training`."""
        encodings = self._tokenizer.encode_batch(list(split.inputs))
        return TokenSamples(
            [e.ids for e in encodings],
            target_tensor(split, self.labels, self.scale),
            pad_id=self._pad_id,
            token_dropout=self._token_dropout if training else 0.0,
            special=frozenset(
                t for e in encodings for t, s in zip(e.ids, e.special_tokens_mask, strict=True) if s
            ),
            seed=self._seed,
        )

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad to the longest of the batch: int64 (batch, tokens)."""
        labels = torch.stack([torch.as_tensor(s["label"]) for s in samples])
        return pad([s["ids"] for s in samples], self._pad_id) | {"labels": labels}

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
        own = {"max_length": self.max_length, "pad_id": self._pad_id}
        return own | scale_options(self.scale)

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
