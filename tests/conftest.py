"""For all tests: where there is no GPU, Triton interprets its kernels, which must be said before it loads."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
