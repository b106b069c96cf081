"""Textual inversion: the new word's vectors are all that is trained, saved, and read in sampling."""

import imagen_lightning.torchvision_mend  # noqa: F401  isort: skip

import lightning
import pytest
import torch
from tiny_stages import CAPTIONS, SIZE, TEXT_DIM, base_stage, generators, make_batch, sr_stage, text_settings

from imagen_lightning.callbacks import EMA
from imagen_lightning.cascade import Cascade, load_weights
from imagen_lightning.components import build
from imagen_lightning.errors import InputError
from imagen_lightning.finetuning import from_cascade
from imagen_lightning.networks import LoRA
from imagen_lightning.stages import Optimization
from imagen_lightning.text import PseudoTokens, T5TextEncoder, TinyTextEncoder, TransformerEncoder
from imagen_lightning.text.token_files import add_tokens, save_tokens
from imagen_lightning.types import Text

CAPTION = "a <zib> left of a red star"
WORD = "tokens.vectors.<zib>"


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    """A base stage of 8 px, and one from 8 to 16 px with a text network."""
    text = text_settings(network=TransformerEncoder(TEXT_DIM, TEXT_DIM, num_layers=1, num_heads=2))
    folder = tmp_path_factory.mktemp("cascade") / "cascade"
    Cascade([base_stage(), sr_stage(text=text, image_size=16, low_res_size=8)]).save(folder)
    return folder


def start(cascade, stage="base", words=("<zib>",), **options):
    made = from_cascade(str(cascade), stage, tokens=PseudoTokens(dict.fromkeys(words, 1), "star"), **options)
    made.log = lambda *args, **kwargs: None
    return made


def batch_of(captions, size=SIZE):
    batch = make_batch(range(len(captions)), size)
    batch.captions = list(captions)
    return batch


def step(stage, captions, lr=0.1):
    optimizer = stage.optimization.make(stage)
    for group in optimizer.param_groups:
        group["lr"] = lr
    stage.training_step(batch_of(captions, stage.image_size), 0).backward()
    optimizer.step()


@pytest.mark.parametrize("stage", ["base", "sr_16"])
def test_a_step_changes_the_vectors_alone(cascade, stage):
    made = start(cascade, stage)
    assert [name for name, parameter in made.named_parameters() if parameter.requires_grad] == [WORD]
    made.tokens.begin(made.text.encoder)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    step(made, [CAPTION, "a dog"])
    changed = [name for name, value in made.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == [WORD]
    assert not any(isinstance(part, TinyTextEncoder) for part in made.modules())


def test_the_gradient_is_that_of_the_loss(cascade):
    made = start(cascade).double()
    made.tokens.begin(made.text.encoder)
    vectors, batch = made.tokens.vectors["<zib>"], batch_of([CAPTION])

    def loss():
        x0, conditioning = made.condition(batch, 0, training=False)
        conditioning.text = conditioning.text.to(torch.float64)
        return made.diffusion_loss(x0.double(), conditioning, batch.positions, 0)[0].sum()

    loss().backward()
    direction = torch.randn(vectors.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    slope, width = (vectors.grad * direction).sum(), 0.1
    assert slope.abs() > 1e-4
    with torch.no_grad():
        vectors += width * direction
        above = loss()
        vectors -= 2 * width * direction
        below = loss()
    torch.testing.assert_close((above - below) / (2 * width), slope, rtol=0.01, atol=0)


def test_batches_without_the_word_and_of_dropped_text_can_be_trained_on(cascade):
    made = start(cascade, text_drop=1.0)
    step(made, [CAPTION])
    made = start(cascade, text_drop=0.0)
    step(made, ["a dog", ""])
    assert (made.tokens.vectors["<zib>"].grad == 0).all()


def test_a_stage_learns_a_word_through_t5(tmp_path):
    import transformers

    sizes = {"d_model": TEXT_DIM, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 384}
    transformers.T5EncoderModel(transformers.T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "t5")
    encoder = T5TextEncoder(str(tmp_path / "t5"), max_tokens=40)
    Cascade([base_stage(text=text_settings(encoder=encoder))]).save(tmp_path / "cascade")
    made = start(tmp_path / "cascade", text_drop=0.0)
    made.tokens.begin(made.text.encoder)
    before = made.tokens.vectors["<zib>"].clone()
    assert torch.allclose(before, encoder.embed("star").mean(dim=0))
    step(made, [CAPTION, "a dog"])
    assert not torch.equal(made.tokens.vectors["<zib>"], before)
    assert not any("encoder" in name for name in made.state_dict())
    captions = ["a dog", "a <word>"]
    drawn = made.eval().sample(captions, generators(1, 2), num_steps=2)
    old = Cascade.load(tmp_path / "cascade").stages[0]
    assert torch.equal(drawn, old.sample(captions, generators(1, 2), num_steps=2))


def test_more_is_trained_where_it_is_named(cascade):
    made = start(cascade, adapter=LoRA(2))
    trained = [name for name, parameter in made.named_parameters() if parameter.requires_grad]
    assert trained.pop(trained.index(WORD))
    assert trained
    assert all(".lora_" in name for name in trained)
    made = start(cascade, optimization=Optimization(train=["tokens.*", "*.bias"]))
    trained = [name for name, parameter in made.named_parameters() if parameter.requires_grad]
    assert WORD in trained
    assert {name.rpartition(".")[2] for name in trained if name != WORD} == {"bias"}


def test_a_word_that_begins_as_another_draws_what_that_draws_and_old_captions_draw_the_same(cascade):
    made, old = start(cascade).eval(), Cascade.load(cascade).stages[0]
    options = {"num_steps": 3, "guidance": 2.0}
    drawn = made.sample([CAPTION], generators(1), **options)
    assert torch.equal(drawn, old.sample([CAPTION.replace("<zib>", "star")], generators(1), **options))
    drawn = made.sample(["a dog"], generators(1), negative=["<zib>"], **options)
    assert torch.equal(drawn, old.sample(["a dog"], generators(1), negative=["star"], **options))
    made.tokens.vectors["<zib>"].data.normal_(generator=torch.Generator().manual_seed(0))
    assert not torch.equal(made.sample(["a dog"], generators(1), negative=["<zib>"], **options), drawn)
    captions = [*CAPTIONS, "an unknown <word>"]
    noise = range(len(captions))
    new = made.sample(captions, generators(*noise), **options)
    assert torch.equal(new, old.sample(captions, generators(*noise), **options))


@pytest.mark.parametrize("null_text", ["zero", "empty_caption"])
def test_the_text_of_no_caption_stays(cascade, null_text):
    made, old = start(cascade, null_text=null_text), Cascade.load(cascade).stages[0]
    old.text.null_text = null_text
    assert torch.equal(made.null(torch.device("cpu")).states, old.null(torch.device("cpu")).states)


def test_stored_states_of_the_word_are_refused(cascade):
    made = start(cascade)
    batch = batch_of(["a dog", CAPTION])
    batch.text = made.text.encoder(batch.captions)
    with pytest.raises(InputError, match="'a <zib> left of a red star' has the pseudo-word '<zib>', which its stored"):
        made.condition(batch, 0, training=True)
    batch.captions[1] = "a cat"
    assert isinstance(made.condition(batch, 0, training=True)[1].text, Text)


# ---- runs and cascades


class Loop(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return batch_of([CAPTION, "a dog", "a <ZIB>"])


def fit(stage, folder, max_steps, ckpt_path=None):
    trainer = lightning.Trainer(
        default_root_dir=folder,
        max_steps=max_steps,
        callbacks=[EMA(0.5)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accelerator="cpu",
    )
    loader = torch.utils.data.DataLoader(Loop(), batch_size=None, collate_fn=lambda batch: batch)
    stage.__dict__.pop("log", None)
    trainer.fit(stage, loader, ckpt_path=ckpt_path, weights_only=True)
    trainer.save_checkpoint(folder / f"step-{max_steps}.ckpt")
    return folder / f"step-{max_steps}.ckpt"


@pytest.fixture(scope="module")
def checkpoint(cascade, tmp_path_factory):
    return fit(start(cascade), tmp_path_factory.mktemp("run"), 4)


def test_a_run_resumes_and_moves_no_old_weight(cascade, checkpoint, tmp_path):
    whole = torch.load(checkpoint, weights_only=True)
    halfway = fit(start(cascade), tmp_path, 2)
    resumed = torch.load(fit(start(cascade), tmp_path, 4, halfway), weights_only=True)
    old = Cascade.load(cascade).stages[0].state_dict()
    for part in ("state_dict", "current_model_state"):
        assert torch.equal(whole[part][WORD], resumed[part][WORD])
        assert whole[part].keys() - old.keys() == {WORD}
        assert all(torch.equal(whole[part][name], value) for name, value in old.items())
    assert not torch.equal(whole["state_dict"][WORD], whole["current_model_state"][WORD])


def test_a_cascade_of_the_run_knows_the_word(cascade, checkpoint, tmp_path):
    made = Cascade.from_checkpoints([checkpoint, f"{cascade}#sr_16"])
    save_tokens(tmp_path / "zib.tokens.safetensors", made.stages[0].tokens, made.stages[0].text.encoder)
    with pytest.raises(InputError, match="stage 'sr_16' does not know the pseudo-word '<zib>', which stage 'base' kn"):
        made.sample([CAPTION], steps=2)
    with pytest.raises(InputError, match="caption 'a <Zib>': stage 'sr_16' does not know"):
        made.sample(["a dog"], negative="a <Zib>", guidance=2, steps=2)
    assert made.sample([CAPTION], steps=2, last_stage="base").images.shape == (1, 3, 8, 8)
    assert made.sample(["a <word>"], steps=2).images.shape == (1, 3, 16, 16)
    assert add_tokens(made.stages, tmp_path / "zib.tokens.safetensors") == ["<zib>"]
    made.save(tmp_path / "cascade")
    again = Cascade.load(tmp_path / "cascade")
    drawn = made.sample([CAPTION], steps=2).images
    assert torch.equal(again.sample([CAPTION], steps=2).images, drawn)
    # The same vectors given to the cascade that the run began from.
    old = Cascade.load(cascade)
    captions = ["a dog", "a red star"]
    before = old.sample(captions, steps=2).images
    add_tokens(old.stages, tmp_path / "zib.tokens.safetensors")
    assert torch.equal(old.sample([CAPTION], steps=2).images, drawn)
    assert torch.equal(old.sample(captions, steps=2).images, before)
    assert torch.equal(made.sample(captions, steps=2).images, before)


def test_a_second_word_is_learned_beside_the_first(cascade, checkpoint, tmp_path):
    made = Cascade.from_checkpoints([checkpoint, f"{cascade}#sr_16"])
    made.save(tmp_path / "cascade")
    second = start(tmp_path / "cascade", words=["<zub>"])
    first = made.stages[0].tokens.vectors["<zib>"].clone()
    step(second, ["a <zib> above a <zub>"])
    assert torch.equal(second.tokens.vectors["<zib>"], first)
    assert not torch.equal(second.tokens.vectors["<zub>"], second.text.encoder.embed("star"))
    with pytest.raises(InputError, match="'<ZIB>' is known to the stage already"):
        start(tmp_path / "cascade", words=["<ZIB>"])


def test_a_stage_with_words_is_described_and_built(cascade):
    made = start(cascade)
    arguments = made.hyperparameters()
    again = type(made)(**{name: build(value) for name, value in arguments.items()})
    again.load_state_dict(made.state_dict())
    assert again.hyperparameters() == arguments
    assert again.text.tokens is again.tokens
    with pytest.raises(InputError, match="belong to another architecture"):
        load_weights(again, f"{cascade}#base")
