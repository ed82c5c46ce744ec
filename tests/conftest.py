"""What every test shares: one thread, since tensors here are too small to share out and tests may fork."""

import torch

torch.set_num_threads(1)
