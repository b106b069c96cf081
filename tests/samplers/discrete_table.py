"""A discrete schedule as DDPM has it, to hold samplers against those of diffusers."""

import torch

NUM_STEPS = 1000


class DiscreteTable:
    """Step k of a table of betas is t = (k + 1) / 1000; t = 0 is data."""

    def __init__(self, beta_start=1e-4, beta_end=0.02):
        self.alphas_cumprod = torch.cumprod(1 - torch.linspace(beta_start, beta_end, NUM_STEPS, dtype=torch.float64), 0)
        self._table = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod])

    def _at(self, t):
        return self._table[(t * NUM_STEPS).round().long()]

    def alpha(self, t):
        return self._at(t).sqrt()

    def sigma(self, t):
        return (1 - self._at(t)).sqrt()

    def log_snr(self, t):
        return torch.log(self._at(t) / (1 - self._at(t)))

    def network_time(self, t):
        return (NUM_STEPS * t).round() - 1


def times_of(steps, last=0.0):
    """The times of table steps, then `last`."""
    return torch.tensor([*((k + 1) / NUM_STEPS for k in steps), last], dtype=torch.float64)
