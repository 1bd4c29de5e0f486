"""Fast dropout: the shares, scales and formulas of torch's own, from a stream that is seeded."""

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from edgetune.train.dropout import Masks, use_fast_dropout


def test_the_share_of_zeros_is_p_and_the_rest_is_scaled():
    x = torch.ones(1_000_000)
    y = Masks().dropout(x, 0.1)
    zeros = int((y == 0).sum())
    # five standard deviations of a binomial: sqrt(1e6 * 0.1 * 0.9) = 300
    assert abs(zeros - 100_000) < 1_500
    torch.testing.assert_close(y[y != 0].unique(), torch.tensor([1 / 0.9]))


def test_neighbouring_elements_are_independent():
    kept = (Masks().dropout(torch.ones(1_000_000), 0.5) != 0).double() - 0.5
    for lag in (1, 2, 3, 4, 8):
        # the mean product of independent signs has a standard deviation of 0.25 / 1000
        assert abs(float((kept[lag:] * kept[:-lag]).mean())) < 5 * 0.25 / 1000


def test_a_seed_gives_its_masks_again():
    masks = Masks()
    masks.seed(7)
    first = masks.dropout(torch.ones(5, 3), 0.4), masks.dropout(torch.ones(64), 0.4)
    masks.seed(7)
    again = masks.dropout(torch.ones(5, 3), 0.4), masks.dropout(torch.ones(64), 0.4)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    masks.seed(8)
    assert not torch.equal(masks.dropout(torch.ones(64), 0.4), first[1])


def test_the_gradient_passes_where_the_value_did():
    x = torch.randn(1000, requires_grad=True)
    y = Masks().dropout(x, 0.25)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (y != 0).float() / 0.75)


def small(**changes: float) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, **changes,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_a_network_predicts_as_before():
    network = small().eval()
    before = network(**batch()).logits
    use_fast_dropout(network)
    torch.testing.assert_close(network(**batch()).logits, before, rtol=0, atol=0)


def test_attention_without_any_probability_dropped_is_torchs():
    # so small a p is rounded to no element at all: only the formula is left
    usual = small(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    ours = small(hidden_dropout_prob=0.0, attention_probs_dropout_prob=1e-7).train()
    use_fast_dropout(ours)
    torch.testing.assert_close(ours(**batch()).logits, usual(**batch()).logits)


def test_training_repeats_with_the_seed_alone():
    network = small().train()
    masks = use_fast_dropout(network)
    masks.seed(1)
    first = network(**batch()).logits
    torch.manual_seed(99)  # torch's own generator has no part in it
    masks.seed(1)
    torch.testing.assert_close(network(**batch()).logits, first, rtol=0, atol=0)
    assert not torch.equal(network(**batch()).logits, first)


def test_other_kinds_of_dropout_are_left_alone():
    network = nn.Sequential(nn.Dropout(0.5), nn.Dropout2d(0.5))
    use_fast_dropout(network)
    assert "forward" in network[0].__dict__
    assert "forward" not in network[1].__dict__
