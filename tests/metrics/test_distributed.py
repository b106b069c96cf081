"""Two processes: uneven batches, an empty process, padded samples; all compute, nothing hangs, the result is one's."""

import json
import os
import subprocess
import sys

import pytest
import torch

from imagen_lightning.metrics.confidence import bootstrap_mean
from imagen_lightning.metrics.distributed import FeatureStore, gather_by_position
from imagen_lightning.metrics.features import RandomConvFeatures
from imagen_lightning.metrics.frechet import FeatureMoments, frechet_distance
from imagen_lightning.metrics.kid import kernel_distance
from imagen_lightning.metrics.precision_recall import precision_recall

# Positions by process: as many batches as lists.
DEALS = {
    "even": ([[0, 2, 4, 6], [8, 10, 12, 14], [16, 18]], [[1, 3, 5, 7], [9, 11, 13, 15], [17, 19]]),
    "uneven": ([[0, 1, 2], [3, 4, 5, 6, 7], [8], [9, 10, 11]], [[12, 13, 14, 15, 16, 17, 18, 19]]),
    "empty": ([list(range(20))], []),
    "first is empty": ([], [list(range(10)), list(range(10, 20))]),
    "padded": ([list(range(0, 20, 2)), [0, 2]], [list(range(1, 20, 2)), [1, 3]]),
}

WORKER = """
import json, sys
from pathlib import Path
import torch, torch.distributed as dist
sys.path.insert(0, {tests!r})
from test_distributed import DEALS, measure, pictures
from imagen_lightning.metrics.features import RandomConvFeatures
from imagen_lightning.metrics.reference import measure_reference

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
results = {{name: measure(deal[rank]) for name, deal in DEALS.items()}}

# A cache that only one process finds: both measure, with all of the pictures.
extractor = RandomConvFeatures()
folder = Path(sys.argv[3]) / str(rank)
batches = lambda deal: ((pictures()[p], torch.tensor(p)) for p in deal)
for turn in range(2):
    found = measure_reference(extractor, batches(DEALS["uneven"][rank]), "data", 16, cache=folder)
    results[f"reference {{turn}}"] = [found.moments.count, float(found.features.double().sum())]
results["files"] = len(list(folder.glob("*"))) if folder.exists() else 0
shared = Path(sys.argv[3]) / "shared"
measure_reference(extractor, batches(DEALS["empty"][rank]), "data", 16, cache=shared)
dist.barrier()
found = measure_reference(extractor, [], "data", 16, cache=shared)
results["shared"] = [found.moments.count, float(found.features.double().sum())]
print(json.dumps(results))
dist.barrier()
dist.destroy_process_group()
"""


def pictures():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (20, 3, 16, 16), generator=generator, dtype=torch.uint8)


def measure(deal):
    """All metrics of the pictures dealt to this process and to the others."""
    extractor = RandomConvFeatures()
    moments, store = FeatureMoments(extractor.num_features), FeatureStore(extractor.num_features)
    numbers, positions = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, dtype=torch.int64)]
    for batch in deal:
        features = extractor(pictures()[batch])
        moments.update(features)
        store.update(features, torch.tensor(batch))
        numbers.append(features.double().mean(dim=1))
        positions.append(torch.tensor(batch))
    real = extractor(255 - pictures())
    everyone = store.gather()
    means = gather_by_position(torch.cat(numbers), torch.cat(positions))
    found = precision_recall(everyone, real)
    whole = moments.over_processes()
    return {
        "count": whole.count,
        "distance": frechet_distance(whole, FeatureMoments.of(real)),
        "distance of the store": frechet_distance(FeatureMoments.of(everyone), FeatureMoments.of(real)),
        "kernel": kernel_distance(everyone, real).value,
        "precision": found.precision,
        "recall": found.recall,
        "mean": float(means.mean()),
        "interval": list(bootstrap_mean(means)),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "worker.py"
    script.write_text(WORKER.format(tests=os.path.dirname(__file__)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(folder / "meeting"), str(folder / "cache")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


@pytest.mark.parametrize("name", DEALS)
def test_both_processes_find_what_one_does(results, name):
    alone = measure([list(range(20))])
    for found in (result[name] for result in results):
        if name == "padded":
            # Sums cannot tell a sample that comes twice; what is gathered by position can.
            assert found.pop("count") == 24
            found.pop("distance")
        for key in found:
            assert found[key] == pytest.approx(alone[key], rel=1e-6), key
    assert results[0][name] == results[1][name]


def test_references_are_measured_by_all_or_by_none(results):
    expected = [20, pytest.approx(float(RandomConvFeatures()(pictures()).double().sum()), rel=1e-6)]
    for result in results:
        for name in ("reference 0", "reference 1", "shared"):
            assert result[name] == expected
    # only the first process writes
    assert [result["files"] for result in results] == [1, 0]
