"""FLOPs against a count by hand, rates against a clock that the test sets."""

import time

import pytest
import torch
from lightning.pytorch import Callback

from imagen_lightning.callbacks import RunCSVLogger, Throughput
from imagen_lightning.callbacks import throughput as module
from imagen_lightning.callbacks.throughput import matmul_rate, uncounted
from imagen_lightning.networks.attention import TextAttention, key_mask
from imagen_lightning.networks.flops import count_flops
from imagen_lightning.types import Conditioning, InputError, Text


class Small(torch.nn.Module):
    """A convolution, then attention of a 4x4 map to itself and 3 tokens."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.attention = TextAttention(8, text_dim=5, head_dim=4, groups=2)

    def forward(self, x_t, time, conditioning):
        x = self.conv(x_t)
        key_values = self.attention.text_key_values(conditioning.text.states)
        return self.attention(x, key_values, key_mask(conditioning.text.mask, 16, x.dtype))


def test_flops_are_those_of_a_count_by_hand():
    text = Text(torch.zeros(2, 3, 5), torch.tensor([[True] * 3, [True, False, False]]), torch.zeros(2, 5))
    network = Small()
    network.compile()
    state = torch.get_rng_state()
    found = count_flops(network, torch.zeros(2, 3, 4, 4), torch.zeros(2), Conditioning(text))
    conv = 2 * 16 * 8 * 3 * 9
    linear = 2 * 16 * 8 * (8 + 16 + 8)  # to_q, to_kv, to_out
    to_text = 2 * 3 * 5 * 16
    products = 2 * 2 * (16 * 19 * 8)  # queries by keys, weights by values
    forward = conv + linear + to_text + products
    backward = 2 * forward - conv  # the image needs no gradient, the normalised text does
    assert found == forward + backward
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_network_that_looks_at_values_only_warns(caplog):
    class Looks(torch.nn.Linear):
        def forward(self, x_t, time, conditioning):
            return super().forward(x_t) if x_t.max() > 0 else x_t

    assert count_flops(Looks(4, 4), torch.ones(2, 4), torch.ones(2), Conditioning()) is None
    assert "FLOPs are not logged" in caplog.text


class Log(RunCSVLogger):
    def __init__(self, folder):
        super().__init__(str(folder))
        self.seen = {}

    def log_metrics(self, metrics, step=None):
        self.seen.setdefault(step, {}).update(metrics)


def test_rates_by_the_clock(fit, tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    class Pass(Callback):
        """A batch takes 2 s, one validation batch 50 s, something else 70 s."""

        def on_before_optimizer_step(self, *_):
            clock[0] += 1.5

        def on_train_batch_start(self, *_):
            clock[0] += 0.5

        def on_validation_batch_end(self, *_):
            clock[0] += 50

        def on_train_batch_end(self, trainer, *_):
            with uncounted(trainer):
                clock[0] += 70

    throughput, log = Throughput(every_n_steps=2, measure_matmul=False), Log(tmp_path)
    throughput.matmul_rate = 1e6
    validation = {"limit_val_batches": 1, "val_check_interval": 3, "check_val_every_n_epoch": None}
    fit([Pass(), throughput], steps=6, logger=log, num_sanity_val_steps=0, **validation)
    for step in (1, 3, 5):
        assert log.seen[step]["throughput/images_per_second"] == pytest.approx(2.0)
        assert log.seen[step]["throughput/seconds_per_step"] == pytest.approx(2.0)
        assert log.seen[step]["throughput/flops_per_second"] == pytest.approx(2 * throughput.flops_per_image)
        assert log.seen[step]["throughput/matmul_share"] == pytest.approx(2e-6 * throughput.flops_per_image)
    assert throughput.flops_per_image > 1e5


def test_training_is_the_same_to_the_bit(fit, make_base):
    without, _ = fit([], stage=make_base(dropout=0.5))
    with_it, _ = fit([Throughput(every_n_steps=1)], stage=make_base(dropout=0.5))
    for name, value in without.state_dict().items():
        assert torch.equal(value, with_it.state_dict()[name])
    assert "predict" not in vars(with_it)


def test_matmul_rate_is_that_of_its_product(monkeypatch):
    clock = iter([0.0, 0.0, 0.0, 0.004, 0.05, 0.05, 0.052, 0.2])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    assert matmul_rate(torch.device("cpu"), torch.float32) == pytest.approx(2 * 1024**3 / 0.002)


def test_refuses_no_steps():
    with pytest.raises(InputError, match="every_n_steps 0"):
        Throughput(0)
