"""Optimizers that no library has, named by class_path."""

import torch


class BlockwiseMomentum(torch.optim.Optimizer):
    """SGD with momentum of eight bits: a number and its block's scale (the idea of Dettmers et al. 2022)."""

    block = 64

    def __init__(self, params, lr=0.01, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                state, count = self.state[parameter], parameter.numel()
                blocks = -(-count // self.block)
                if not state:
                    state["codes"] = torch.zeros(blocks, self.block, dtype=torch.int8, device=parameter.device)
                    state["scales"] = torch.zeros(blocks, 1, device=parameter.device)
                momentum = (state["codes"] * state["scales"]).flatten()[:count].view_as(parameter)
                momentum = group["momentum"] * momentum + parameter.grad
                padded = torch.nn.functional.pad(momentum.flatten(), (0, blocks * self.block - count))
                padded = padded.view(blocks, self.block)
                state["scales"] = padded.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
                state["codes"] = (padded / state["scales"]).round().to(torch.int8)
                parameter.sub_(group["lr"] * momentum)
        return loss

    def state_bytes(self, sizes):
        return sum(-(-size // self.block) * (self.block + 4) for size in sizes)


class NeedsMemory(BlockwiseMomentum):
    """As compiled kernels are, of no use without memory behind its tensors."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.numpy()
        super().step()
