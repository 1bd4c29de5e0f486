"""Pretrained models: where they come from, what family they are of, which tensors to train."""

import logging

# wherever bitsandbytes is installed, peft and accelerate load it, and it warns of kernels that it
# did not find and does without
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
