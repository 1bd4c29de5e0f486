"""Pretrained models: where they come from, what family they are of, which tensors to train."""
