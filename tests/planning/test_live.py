"""Memory and FLOPs that are counted against those known by hand, and against torch's own allocator and counter."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from imagen_lightning.cascade.description import without_weights
from imagen_lightning.planning.kernels import FLOAT, LOWER, Kernels
from imagen_lightning.planning.live import Live, num_bytes


def test_memory_counts_once_until_nothing_holds_it():
    with Live() as live:
        first = torch.zeros(10, device="meta")  # 40 bytes
        view = first[:5]
        assert (live.now, live.peak) == (40, 40)
        second = first * 2
        first.add_(1)
        assert live.now == 80
        del first
        assert live.now == 80  # the view holds it
        del view
        assert (live.now, live.peak) == (40, 80)
        live.restart()
        assert live.peak == 40
        del second
        assert live.now == 0
    with Live(block=512) as live:
        held = [torch.zeros(1, device="meta"), torch.zeros(129, device="meta")]
        assert live.now == 512 + 1024
        assert num_bytes([*held, held[0]]) == 4 + 516


def test_what_the_graph_holds_counts_until_the_backward_pass():
    weight = torch.zeros(4, 4, device="meta", requires_grad=True)
    with Live() as live:
        out = torch.zeros(2, 4, device="meta") @ weight
        loss = out.exp().sum()  # keeps exp's result and the product's input
        del out
        assert live.now == 32 + 32 + 4
        torch.autograd.backward([loss])
        del loss
        assert live.now == 64
        assert weight.grad.is_meta


def test_flops_are_those_of_torchs_counter():
    def run(device):
        conv, linear = nn.Conv2d(3, 8, 3, padding=1, device=device), nn.Linear(8, 5, device=device)
        x = torch.zeros(2, 3, 4, 4, device=device)
        loss = linear(conv(x).mean((2, 3))).sum()
        torch.autograd.backward([loss])

    with FlopCounterMode(display=False) as counter:
        run("cpu")
    with Live() as live:
        run("meta")
    assert live.flops == counter.get_total_flops() > 0


def test_fused_attention_keeps_no_matrix_of_all_pairs():
    def run(device):
        query, key, value = (torch.zeros(2, 3, 50, 8, device=device, requires_grad=True) for _ in range(3))
        torch.autograd.backward([F.scaled_dot_product_attention(query, key, value).sum()])

    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        run("cpu")
    with Kernels("cuda"), Live() as live:
        query = torch.zeros(2, 3, 50, 8, device="meta", requires_grad=True)
        before = live.now
        out = F.scaled_dot_product_attention(query, query, query, attn_mask=torch.ones(2, 1, 1, 50, device="meta") > 0)
        assert live.now - before == out.nbytes + 2 * 3 * 50 * 4 + 2 * 50  # the output, a number a query, the mask
        before = live.flops
        run("meta")
    assert live.flops - before == pytest.approx(counter.get_total_flops(), rel=0.2)  # its backward computes one again


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtypes_of_torchs_on_a_cpu(dtype):
    def run(device):
        conv, norm, linear = nn.Conv2d(4, 4, 3, device=device), nn.GroupNorm(2, 4, device=device), nn.Linear(4, 4)
        linear = linear.to(device)
        x = torch.zeros(1, 4, 5, 5, device=device)
        found = [conv(x)]
        found.append(norm(found[-1]))
        found.append(F.silu(found[-1]))
        found.append(linear(found[-1].flatten(2).transpose(1, 2).reshape(-1, 4)))
        found.append(found[-1] @ found[-1].T)
        found.append(found[-1].softmax(-1))
        found.append(found[-1] + torch.zeros(1, device=device))
        found.append(F.mse_loss(found[-2], found[-2]))
        found.append(F.scaled_dot_product_attention(*[torch.zeros(1, 1, 3, 4, device=device)] * 3))
        return [value.dtype for value in found]

    with torch.autocast("cpu", dtype):
        expected = run("cpu")
        with Kernels("cpu"):
            assert run("meta") == expected


def test_a_gpu_norms_in_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16), Kernels("cuda"):
        x = torch.zeros(1, 4, 2, 2, device="meta", dtype=torch.bfloat16)
        assert F.group_norm(x, 2).dtype == F.softmax(x, -1).dtype == x.exp().dtype == x.sum().dtype == torch.float32
        assert F.silu(x).dtype == (x * x).dtype == torch.bfloat16
        assert F.interpolate(x, scale_factor=2.0).dtype == torch.float32


def test_the_lists_are_those_of_torchs_header():
    header = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    if not header.exists():
        pytest.skip("this torch has no headers")
    text = header.read_text()

    def names(macro):
        body = text.split(f"#define {macro}(_)")[1].split("\n\n")[0]
        found = {line.split("(")[1].split(",")[0].split(")")[0] for line in body.splitlines()[1:] if "_(" in line}
        return {name.removeprefix("linalg_") for name in found}

    ours = {name.strip("_").removeprefix("r") if name.startswith("__") else name for name in LOWER}
    assert ours <= names("AT_FORALL_LOWER_PRECISION_FP")
    theirs = names("AT_FORALL_FP32") | names("AT_FORALL_FP32_SET_OPT_DTYPE")
    ours = {name.strip("_").replace("rpow", "pow") for name in FLOAT["cuda"]} - {"interpolate"}
    assert ours <= theirs
    assert {"upsample_nearest2d", "upsample_bilinear2d"} <= theirs  # what interpolate calls


def test_weightless_modules_have_shapes_and_all_else_is_as_usual():
    with without_weights():
        layer = nn.Linear(1000, 1000)
        table = torch.arange(3)
    assert layer.weight.is_meta
    assert layer.bias.is_meta
    assert not table.is_meta
    assert not nn.Linear(2, 2).weight.is_meta
