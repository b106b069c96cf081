"""Drawing once: the chain's own images, kept, gone on with, and shared by processes."""

import json
import threading

import pytest
import torch

from imagen_lightning.errors import InputError
from imagen_lightning.evaluation.data import load_evaluation_set
from imagen_lightning.evaluation.drawing import Chain, Drawing, Part, chains
from imagen_lightning.images import downsample, to_float, to_uint8
from imagen_lightning.io.locks import locked

NUM = 5


@pytest.fixture
def data():
    return load_evaluation_set("shapes", NUM, 16)


@pytest.fixture
def draw(cascade, data, tmp_path):
    def make(folder="samples", **options):
        return Drawing(cascade, data, tmp_path / folder, identity="abc", seed=3, batch_size=2, **options)

    return make


def whole(cascade):
    return Chain(0, 1, tuple(cascade.settings()))


def test_a_chain_is_what_the_cascade_samples(cascade, data, draw):
    drawing = draw()
    drawn = drawing.draw(whole(cascade))
    expected = cascade.sample(data.captions, seed=3, batch_size=2)
    assert torch.equal(drawn.images[:], expected.images)
    assert torch.equal(drawn.given[:], expected.stages[0])
    assert drawn.seconds_per_image > 0
    assert drawn.peak_memory_bytes > 0
    assert len(list(drawn.folder.glob("*.png"))) == NUM


def test_a_stage_on_real_input_is_given_the_reduced_images(cascade, data, draw):
    drawn = draw().draw(Chain(1, 1, tuple(cascade.settings()[1:])))
    small = to_uint8(downsample(to_float(data.images[:]), 8))
    assert torch.equal(drawn.given[:], small)
    expected = cascade.sample(data.captions, seed=3, images=small, start_stage=1, batch_size=2)
    assert torch.equal(drawn.images[:], expected.images)


def test_what_is_drawn_is_not_drawn_again(cascade, draw):
    evaluations = []
    drawing = draw(progress=lambda done, what: evaluations.append(what))
    chain = whole(cascade)
    assert drawing.evaluations(chain) == 3 * 2  # three batches of 2 steps
    assert drawing.evaluations(chain.before()) == 3 * 3
    first = drawing.draw(chain)
    assert len(evaluations) == 15
    (first.folder / "00003.png").unlink()  # as if it had been stopped there
    again = draw(progress=lambda done, what: evaluations.append(what))
    assert again.evaluations(chain) == 2
    assert torch.equal(again.draw(chain).images[:], first.images[:])
    assert len(evaluations) == 17
    guided = Chain(0, 1, tuple(cascade.settings(guidance=[None, 1.5])))
    again.draw(guided)
    assert len(evaluations) == 17 + 6  # the base's images are shared


def test_names_tell_what_images_depend_on(cascade, data, draw):
    drawing, other = draw(), draw("elsewhere")
    names = [drawing.name(chain) for chain in chains(cascade.settings())]
    assert [name.rsplit("-", 1)[0] for name in names] == ["base-text", "sr_16-chain", "sr_16-real"]
    assert names == [other.name(chain) for chain in chains(cascade.settings())]
    assert drawing.name(Chain(0, 0, tuple(cascade.settings(guidance=3.0)[:1]))) != names[0]
    other.seed = 4
    assert other.name(whole(cascade)) != names[1]


def test_processes_draw_their_parts_and_read_all(cascade, draw):
    chain = whole(cascade)
    alone = draw("alone").draw(chain)
    parts = [draw("shared", part=Part(rank, 2)) for rank in range(2)]
    for part in parts:  # in turns instead of at once: each stage's images are all there before they are read
        for step in (chain.before(), chain):
            given = None if step.first == step.last else alone.given
            part._draw_missing(step, part.name(step), given)
    assert all(torch.equal(part.draw(chain).images[:], alone.images[:]) for part in parts)
    costs = {path.name for path in parts[0].draw(chain).folder.glob("cost-*")}
    assert costs == {"cost-00000.json", "cost-00002.json", "cost-00004.json"}
    assert Part(1, 2).batches(NUM, 2) == [slice(2, 4)]


def test_a_drawing_that_was_killed_while_it_wrote_knows_its_cost(cascade, draw):
    chain = Chain(0, 0, tuple(cascade.settings()[:1]))
    first = draw().draw(chain)
    for number in (2, 3, 4):  # killed with the first batch's images behind it and the second's cost
        (first.folder / f"{number:05d}.png").unlink()
    (first.folder / "cost-00004.json").unlink()
    again = draw().draw(chain)
    assert torch.equal(again.images[:], first.images[:])
    costs = [json.loads(path.read_text()) for path in sorted(first.folder.glob("cost-*.json"))]
    assert [cost["images"] for cost in costs] == [2, 2, 1]  # each image's once
    assert again.seconds_per_image == pytest.approx(sum(cost["seconds"] for cost in costs) / NUM)


def test_a_damaged_image_is_named(cascade, draw):
    drawn = draw().draw(Chain(0, 0, tuple(cascade.settings()[:1])))
    path = drawn.folder / "00001.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=r"00001.png cannot be read .*; delete it and run the same command again"):
        drawn.images[:]


def test_images_are_not_held(cascade, draw):
    drawn = draw().draw(whole(cascade))
    before = drawn.images[:]
    (drawn.folder / "00000.png").write_bytes((drawn.folder / "00001.png").read_bytes())
    assert torch.equal(drawn.images[:][0], before[1])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_another_evaluation_waits_whatever_its_number_of_processes(cascade, draw, tmp_path, world_size):
    chain = Chain(0, 0, tuple(cascade.settings()[:1]))
    first = draw(part=Part(0, world_size))
    drawing = threading.Thread(target=first.draw, args=(chain,))
    with locked(tmp_path / "samples" / f".{first.name(chain)}.lock", "as another evaluation has it"):
        drawing.start()
        drawing.join(0.3)
        assert drawing.is_alive()
        assert not (tmp_path / "samples" / first.name(chain)).exists()
        draw(part=Part(1, 2))._draw_missing(chain, first.name(chain), None)  # of that evaluation: it does not wait
    drawing.join(60)
    assert not drawing.is_alive()


def test_the_first_process_lets_the_others_draw_and_holds_the_lock_until_all_have(cascade, draw, tmp_path):
    chain = Chain(0, 0, tuple(cascade.settings()[:1]))
    barrier, held = threading.Barrier(2), []
    lock = tmp_path / "samples" / f".{draw().name(chain)}.lock"

    def meet():
        barrier.wait(60)
        try:
            with locked(lock, "it"):
                held.append(False)
        except InputError:
            held.append(True)
        barrier.wait(60)

    parts = [draw(part=Part(rank, 2), meet=meet) for rank in range(2)]
    threads = [threading.Thread(target=part.draw, args=(chain,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert held == [True] * 4
    assert len(list((tmp_path / "samples").glob("base-*/*.png"))) == NUM
