"""XLNet's classifier for rows that are padded on the right."""

import torch
from torch import Tensor
from transformers import XLNetForSequenceClassification as _Classifier
from transformers.models.xlnet.modeling_xlnet import (
    XLNetForSequenceClassificationOutput as _Output,
)


class RightPaddedXLNet(_Classifier):  # type: ignore[no-untyped-call]
    """XLNetForSequenceClassification that reads the last token that is no padding.

    XLNet reads its classification token, the last of a text, and transformers takes the last
    of the row for it, which holds on rows padded on the left only. Positions are relative, so
    a text's hidden states don't depend on the side that it is padded on.
    """

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> _Output:
        """Return logits, (batch, labels), of int64 `input_ids`, (batch, tokens)."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = self.transformer(
            input_ids, attention_mask=attention_mask.float(), use_mems=False
        ).last_hidden_state  # (batch, tokens, width)
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (columns * attention_mask).amax(1)  # (batch,)
        index = last[:, None, None].expand(-1, 1, hidden.shape[2])
        summary = self.sequence_summary(hidden.gather(1, index))
        return _Output(logits=self.logits_proj(summary))
