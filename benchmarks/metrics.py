"""Throughput of features and of the Fréchet distance, against torchmetrics and torch-fidelity in the same run.

    python benchmarks/metrics.py [--out figures.json]

All share Inception's network with one set of random weights (speed does not depend on them) and the same features. They
are measured in turns in one process; figures are medians over the rounds. Printed for each:

- distance: seconds from the state that a program keeps (sums or moments) to the distance, at 2048 features. "few" is
  1000 samples against a reference of more than 2048, "full" more than 2048 in both;
- sums: features a second that are added to that state, in batches;
- features: images a second through Inception, resize included;
- relative: the distance's difference from torchmetrics' in the same row's task.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import machine

# isort: split
import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from turns import write

from imagen_lightning.metrics.features import InceptionFeatures
from imagen_lightning.metrics.features.inception import build_inception
from imagen_lightning.metrics.frechet import FeatureMoments, frechet_distance

Tasks = dict[tuple[str, str], Callable[[], Any]]  # by task and program


class _Identity(nn.Module):
    """torchmetrics takes features through an extractor."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def random_inception() -> dict[str, Tensor]:
    """Weights for torch-fidelity's Inception that do not shrink its features away."""

    class Bare(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: Any, **__: Any) -> Any:
            return None

    torch.manual_seed(0)
    network = Bare("inception-v3-compat", ["2048"], feature_extractor_weights_path=_file({}))
    for parameter in network.parameters():
        if parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter)
    return dict(network.state_dict())


def distance_tasks(
    case: str, num_generated: int, num_real: int, num_features: int
) -> tuple[Tasks, Callable[[], float]]:
    """Programs that give the distance of the same features, and the distance of torchmetrics."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(num_features, num_features, generator=generator) / num_features**0.5
    real = torch.randn(num_real, num_features, generator=generator) @ mixing
    generated = 1.1 * torch.randn(num_generated, num_features, generator=generator) @ mixing + 0.05
    theirs = FrechetInceptionDistance(feature=_Identity(num_features), compute_with_cache=False)
    theirs.update(real, real=True)
    theirs.update(generated, real=False)
    ours = [FeatureMoments.of(features) for features in (generated, real)]
    statistics_ = [fid_features_to_statistics(features.double()) for features in (generated, real)]
    tasks: Tasks = {
        (f"distance, {case}", "ours"): lambda: frechet_distance(*ours),
        (f"distance, {case}", "torchmetrics"): lambda: float(theirs.compute()),
        (f"distance, {case}", "torch-fidelity"): lambda: fid_statistics_to_metric(*statistics_, False)[
            "frechet_inception_distance"
        ],
    }
    return tasks, lambda: float(theirs.compute())


def sum_tasks(batch: int, num_features: int, num_batches: int = 10) -> Tasks:
    features = torch.rand(batch, num_features, generator=torch.Generator().manual_seed(0))
    ours = FeatureMoments(num_features)
    theirs = FrechetInceptionDistance(feature=_Identity(num_features))
    return {
        ("sums", "ours"): lambda: [ours.update(features) for _ in range(num_batches)],
        ("sums", "torchmetrics"): lambda: [theirs.update(features, real=False) for _ in range(num_batches)],
    }


def feature_tasks(batch: int, size: int) -> Tasks:
    state = random_inception()
    extractor = InceptionFeatures()
    extractor.__dict__["_loaded"] = (build_inception(state, "2048"), "random")  # no file of such weights is published
    fidelity = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=_file(state))
    metrics = NoTrainInceptionV3("x", ["2048"], feature_extractor_weights_path=_file(state), antialias=False)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, size, size), generator=generator, dtype=torch.uint8)
    return {
        ("features", "ours"): lambda: extractor(images),
        ("features", "torchmetrics"): lambda: metrics(images),
        ("features", "torch-fidelity"): lambda: fidelity(images),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16, help="images and features at once (default 16)")
    parser.add_argument("--size", type=int, default=64, help="pixels along a side of the images (default 64)")
    parser.add_argument("--num-features", type=int, default=2048, help="of the distance (default 2048)")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each (default 5)")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    dim = arguments.num_features
    full, expected_full = distance_tasks("full", dim + 2000, dim + 3000, dim)
    few, expected_few = distance_tasks("few", max(2, dim // 2 - 24), dim + 3000, dim)
    expected = {"distance, full": expected_full(), "distance, few": expected_few()}
    tasks = {**full, **few, **sum_tasks(arguments.batch, dim), **feature_tasks(arguments.batch, arguments.size)}
    with torch.no_grad():
        seconds, results = take_turns(tasks, arguments.rounds)
    counts = {"sums": 10 * arguments.batch, "features": arguments.batch}
    rows = []
    for (task, program), times in seconds.items():
        median = statistics.median(times)
        result = results[task, program]
        rows.append(
            {
                "task": task,
                "program": program,
                "seconds": round(median, 4),
                "least": round(min(times), 4),
                "per_second": round(counts[task] / median, 1) if task in counts else None,
                "times_ours": round(median / statistics.median(seconds[task, "ours"]), 2),
                "relative": f"{result / expected[task] - 1:.1e}" if task in expected else None,
            }
        )
    write({"machine": machine(), "arguments": _plain(arguments), "rows": rows}, arguments.out)


def take_turns(tasks: Tasks, rounds: int) -> tuple[dict[tuple[str, str], list[float]], dict[tuple[str, str], Any]]:
    """Seconds of each task, turn by turn after one that does not count, and what it gave."""
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in tasks}
    results = {key: run() for key, run in tasks.items()}
    for _ in range(rounds):
        for key, run in tasks.items():
            time.sleep(0.3)  # until the threads of the one before have stopped waiting for more
            start = time.perf_counter()
            run()
            seconds[key].append(time.perf_counter() - start)
    return seconds, results


def _file(state: dict[str, Tensor]) -> Any:
    """What the peers read weights from; their annotations say str."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def _plain(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(arguments).items() if name != "out"}


if __name__ == "__main__":
    main()
