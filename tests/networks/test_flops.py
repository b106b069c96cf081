"""What is counted: a forward pass, and a backward pass to the weights, or of a frozen network to its text."""

import torch
from torch import nn

from imagen_lightning.networks.flops import count_flops
from imagen_lightning.types import Conditioning, Text


class OfText(nn.Module):
    """Two layers over the text's states, of as many FLOPs each."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))

    def forward(self, x_t, t, conditioning):
        return self.layers(conditioning.text.states) * x_t.sum()


def test_a_frozen_networks_backward_pass_is_that_to_its_text():
    network, text = OfText(), Text(torch.zeros(2, 5, 8), None, torch.zeros(2, 8))
    given = torch.zeros(2, 3, 4, 4), torch.zeros(2), Conditioning(text)
    layer = 2 * 5 * 8 * 8  # of one image's pass in one direction
    # Forward twice; back to both layers' weights and to what is between them.
    assert count_flops(network, *given) == 5 * layer
    network.requires_grad_(False)
    assert count_flops(network, *given) == 4 * layer
    assert not text.states.requires_grad
