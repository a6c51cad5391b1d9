"""One torch thread a process: with more, busy cores wait for each other, tens of times slower."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # also for processes that a test starts

import torch

torch.set_num_threads(1)
