"""Times of a table's steps, to hold samplers against those of diffusers."""

import torch

NUM_STEPS = 1000


def times_of(steps, last=0.0):
    """The times of table steps, then `last`."""
    return torch.tensor([*((k + 1) / NUM_STEPS for k in steps), last], dtype=torch.float64)
