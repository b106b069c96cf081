"""T5TextEncoder against transformers itself, on tiny random checkpoints, and its errors."""

import copy
import json
import shutil
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from given_data import copy_tokenizer, given, t5_tokenizer

from imagen_lightning.components import build, describe
from imagen_lightning.text import T5TextEncoder, clean_caption
from imagen_lightning.types import InputError

CAPTIONS = ["a small red star above a large blue circle on a white background", "a cat", ""]
SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.1}


def transformers():
    import transformers

    return transformers


def write_t5(folder: Path, kind: str = "T5") -> Path:
    torch.manual_seed(0)
    library = transformers()
    config = getattr(library, f"{kind}Config")(**SIZES, vocab_size=32128, feed_forward_proj="gated-gelu")
    getattr(library, f"{kind}EncoderModel")(config).save_pretrained(folder)
    copy_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    return write_t5(tmp_path_factory.mktemp("models") / "tiny-t5")


@pytest.fixture(scope="module")
def byt5(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny-byt5"
    # The whole model, as published checkpoints are; only its encoder is to be read.
    config = transformers().T5Config(**SIZES, vocab_size=384, num_decoder_layers=1, decoder_start_token_id=0)
    transformers().T5ForConditionalGeneration(config).save_pretrained(folder)
    transformers().ByT5Tokenizer().save_pretrained(folder)
    return folder


def direct(folder: Path, caption: str, model_class: str = "T5EncoderModel") -> torch.Tensor:
    """One caption, unpadded, through transformers alone: (1, L, D)."""
    tokenizer = transformers().AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers(), model_class).from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**tokenizer(caption, return_tensors="pt")).last_hidden_state


def check_states(encoder: T5TextEncoder, folder: Path, model_class: str = "T5EncoderModel") -> None:
    text = encoder(CAPTIONS)
    assert text.states.shape[1] % 8 == 0
    assert text.states.dtype == torch.float32
    assert not text.states.requires_grad
    assert not text.states.is_inference()
    for row, caption in enumerate(CAPTIONS):
        expected = direct(folder, caption, model_class)[0]
        length = len(expected)
        assert text.mask[row].tolist() == [True] * length + [False] * (text.mask.shape[1] - length)
        torch.testing.assert_close(text.states[row, :length], expected, rtol=1e-4, atol=1e-5)
        assert (text.states[row, length:] == 0).all()
        torch.testing.assert_close(text.pooled[row], expected.mean(0), rtol=1e-4, atol=1e-5)


def test_states_are_those_of_transformers(t5):
    encoder = T5TextEncoder(str(t5))
    assert encoder.dim == 32
    check_states(encoder, t5)


def test_umt5(tmp_path):
    # umT5 has relative positions in every layer: read as plain T5 it would lack tensors.
    folder = write_t5(tmp_path / "tiny-umt5", "UMT5")
    with pytest.raises(InputError, match=r"cannot read the tokenizer .* add its tokenizer\.json"):
        T5TextEncoder(str(folder))(["a cat"])  # transformers wants umT5's in that form alone
    transformers().T5Tokenizer.from_pretrained(t5_tokenizer()).save_pretrained(folder)
    check_states(T5TextEncoder(str(folder)), folder, "UMT5EncoderModel")


def test_mt5(tmp_path):
    folder = write_t5(tmp_path / "tiny-mt5", "MT5")
    # mT5's own tokenizer is of the same kind as T5's; that class reads tokenizer.json alone.
    transformers().T5Tokenizer.from_pretrained(t5_tokenizer()).save_pretrained(folder)
    check_states(T5TextEncoder(str(folder)), folder, "MT5EncoderModel")


def check_padded(folder: Path, model_class: str = "T5EncoderModel") -> None:
    """A batch as transformers pads it itself: to the longest caption and to a fixed length."""
    tokenizer = transformers().AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers(), model_class).from_pretrained(folder).eval()
    for options in ({"padding": True}, {"padding": "max_length", "max_length": 96}):
        given = tokenizer(CAPTIONS, return_tensors="pt", **options)
        with torch.no_grad():
            expected = model(**given).last_hidden_state
        text, mask = T5TextEncoder(str(folder))(CAPTIONS), given["attention_mask"].bool()
        torch.testing.assert_close(text.states[text.mask], expected[mask], rtol=1e-4, atol=1e-5)
        # IF's pipelines hand all of these states to its U-Net, without the mask.
        padded = T5TextEncoder(str(folder), max_tokens=mask.shape[1], padding="attended")(CAPTIONS)
        assert padded.mask is None
        torch.testing.assert_close(padded.states, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(padded.pooled, expected.mean(dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["T5", "UMT5"])
def test_padded_states_are_those_of_transformers(kind, tmp_path):
    folder = write_t5(tmp_path / "tiny", kind)
    transformers().T5Tokenizer.from_pretrained(t5_tokenizer()).save_pretrained(folder)
    check_padded(folder, f"{kind}EncoderModel")


def test_padded_states_of_byt5_are_those_of_transformers(byt5):
    check_padded(byt5)


def test_attended_padding_is_of_another_name(byt5):
    masked, attended = T5TextEncoder(str(byt5)), T5TextEncoder(str(byt5), padding="attended")
    assert attended.name == masked.name + "+padded"
    assert build(describe(attended)).padding == "attended"
    with pytest.raises(InputError, match="padding 'left' is unknown; use 'masked' or 'attended'"):
        T5TextEncoder("google/t5-v1_1-small", padding="left")


def test_byt5_reads_the_encoder_of_a_whole_checkpoint(byt5):
    check_states(T5TextEncoder(str(byt5)), byt5)


def test_padding_and_neighbours_do_not_change_a_caption(t5):
    encoder = T5TextEncoder(str(t5))
    together, alone = encoder(CAPTIONS), encoder(CAPTIONS[1:2])
    short = alone.states.shape[1]
    assert together.states.shape[1] > short
    torch.testing.assert_close(together.states[1, :short], alone.states[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.pooled[1], alone.pooled[0], rtol=1e-4, atol=1e-5)


def test_published_token_numbers(t5, tmp_path):
    reference = json.loads(given("reference", "diffusers_scheduler_expected.json").read_text())["t5_tokenizer"]
    assert reference["cases"]
    folder = shutil.copytree(t5, tmp_path / "t5")
    for file in given("tokenizers", "t5-v1_1").iterdir():
        shutil.copyfile(file, folder / file.name)
    encoder = T5TextEncoder(str(folder))
    for caption, numbers in reference["cases"].items():
        assert encoder._tokenize([caption]) == [numbers]
    assert encoder._tokenize(list(reference["cases"])) == list(reference["cases"].values())


@pytest.mark.parametrize(
    "caption",
    [
        "a  cat ",
        "ﬁne ｆｕｌｌ width",
        "crème brûlée",
        "cafe\u0301",
        "日本語",
        "a\nb\tc",
        "½ cup … “quotes”",
        "zero\u200bwidth",
        "",
    ],
)
def test_tokens_are_those_of_sentencepiece(t5, caption):
    sentencepiece = pytest.importorskip("sentencepiece")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(t5_tokenizer() / "spiece.model"))
    assert T5TextEncoder(str(t5))._tokenize([caption]) == [[*pieces.encode(caption), 1]]


def test_cut_captions_are_counted_and_warned_of(byt5):
    encoder = T5TextEncoder(str(byt5), max_tokens=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(["123456789"])  # nine bytes and the end mark
    with pytest.warns(UserWarning, match="2 of 4 captions so far were cut to 10 tokens"):
        text = encoder(["1234567890", "ok", "a long caption"])
    assert encoder.num_cut == 2
    assert text.states.shape[1] == 10
    assert [row[-1] for row in encoder._tokenize(["1234567890", "ok"])] == [1, 1]
    torch.testing.assert_close(text.states[0], direct(byt5, "123456789")[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_lower_precision(byt5, dtype, tolerance):
    encoder = T5TextEncoder(str(byt5), dtype=dtype)
    text = encoder(["a cat"])
    assert next(encoder._model.parameters()).dtype == getattr(torch, dtype)
    assert text.states.dtype == torch.float32
    torch.testing.assert_close(text.states[0, :6], direct(byt5, "a cat")[0], rtol=tolerance, atol=tolerance)


def test_autocast_outside_does_not_change_states(byt5):
    encoder = T5TextEncoder(str(byt5))
    with torch.autocast("cpu", torch.bfloat16):
        inside = encoder(["a cat"]).states
    assert torch.equal(inside, encoder(["a cat"]).states)


def test_float16_overflow_is_named(byt5):
    encoder = T5TextEncoder(str(byt5), dtype="float16")
    with torch.no_grad():
        encoder._model.encoder.final_layer_norm.weight.fill_(65000)
    with pytest.raises(InputError, match="overflows in float16; set dtype bfloat16"):
        encoder(["a cat"])


def test_clean_captions(byt5):
    caption = "a cat &amp; a dog IMG_1.jpg"
    cleaned = T5TextEncoder(str(byt5), clean_captions=True)
    plain = T5TextEncoder(str(byt5))
    assert torch.equal(cleaned([caption]).states, plain([clean_caption(caption)]).states)
    assert cleaned.name == plain.name + "+clean"


def test_odd_captions(byt5):
    text = T5TextEncoder(str(byt5))(["lone \ud800 surrogate", "\U0001f534", "a\x00b"])
    assert text.states.isfinite().all()


def test_one_copy_of_the_weights(byt5):
    encoder = T5TextEncoder(str(byt5))
    module = torch.nn.Linear(1, 1)
    module.encoder = encoder
    assert copy.deepcopy(module).encoder is encoder
    assert list(module.state_dict()) == ["weight", "bias"]
    encoder(["a"])
    assert not any(p.requires_grad for p in encoder._model.parameters())
    assert not encoder._model.training


def test_name_does_not_depend_on_where_the_folder_lies(byt5, tmp_path):
    moved = tmp_path / "elsewhere" / byt5.name
    shutil.copytree(byt5, moved)
    assert T5TextEncoder(str(moved)).name == T5TextEncoder(str(byt5)).name
    assert T5TextEncoder(str(moved)).name.startswith("tiny-byt5-")
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"d_ff": 64}))
    assert T5TextEncoder(str(moved)).name != T5TextEncoder(str(byt5)).name
    assert T5TextEncoder("google/t5-v1_1-xxl", revision="abc").name == "google/t5-v1_1-xxl@abc"


def test_is_a_component_and_reading_it_loads_nothing():
    code = """if True:
        import sys
        from imagen_lightning.components import build, describe
        from imagen_lightning.text import T5TextEncoder
        encoder = T5TextEncoder("google/t5-v1_1-xxl", max_tokens=77, dtype="bfloat16", revision="main")
        print(describe(build(describe(encoder)))["init_args"], "transformers" in sys.modules)
    """
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    expected = {
        "name_or_path": "google/t5-v1_1-xxl",
        "max_tokens": 77,
        "dtype": "bfloat16",
        "clean_captions": False,
        "revision": "main",
        "padding": "masked",
        "subfolder": None,
        "tokenizer_subfolder": None,
    }
    assert out.strip() == f"{expected} False"
    assert build(describe(T5TextEncoder("google/t5-v1_1-xxl"))).name == "google/t5-v1_1-xxl"


def test_cached_hub_model_needs_no_network(byt5, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--tiny-byt5" / "snapshots" / ("0" * 40)
    shutil.copytree(byt5, snapshot)
    (tmp_path / "models--someone--tiny-byt5" / "refs").mkdir()
    (tmp_path / "models--someone--tiny-byt5" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    encoder = T5TextEncoder("someone/tiny-byt5")
    torch.testing.assert_close(encoder(["a cat"]).states, T5TextEncoder(str(byt5))(["a cat"]).states)


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_hub_model_without_network(monkeypatch, capfd):
    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    waits = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(time, "sleep", waits.append)
    encoder = T5TextEncoder("nobody/no-such-t5")
    with pytest.raises(InputError) as error:
        encoder(["a cat"])
    message = one_line(error)
    assert "config.json of text encoder 'nobody/no-such-t5'" in message
    assert message.endswith("give a local folder as name_or_path ([Errno -2] Name or service not known)")
    assert not waits
    assert capfd.readouterr().err == ""


def test_hub_model_that_is_not_there(monkeypatch):
    monkeypatch.setattr("imagen_lightning.text.hub.reach_hub", lambda *_: None)
    advice = "'nobody/t5' is not listed on 'https://huggingface.co/models'\nIf this is a private repository, log in."

    def load(source, **options):
        raise OSError(advice)

    with pytest.raises(InputError) as error:
        T5TextEncoder("nobody/t5")._load("weights", load)
    assert one_line(error).endswith("('nobody/t5' is not listed on 'https://huggingface.co/models')")


@pytest.mark.parametrize("path", ["/no/such/folder", "./models/t5", "models/google/t5"])
def test_missing_folder(path):
    with pytest.raises(InputError, match=f"folder '{path}' does not exist"):
        _ = T5TextEncoder(path).dim


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "cannot read the config.json"),
        ("config.json", "{", "cannot read the config.json"),
        ("config.json", '{"model_type": "bert"}', "is a 'bert' model; give any kind of T5"),
        ("model.safetensors", None, "cannot read the weights"),
        ("model.safetensors", "junk", "cannot read the weights"),
        ("tokenizer_config.json", "{", "cannot read the tokenizer"),
    ],
)
def test_broken_folder(byt5, tmp_path, file, content, message):
    folder = tmp_path / "t5"
    shutil.copytree(byt5, folder)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        T5TextEncoder(str(folder))(["a cat"])
    one_line(error)


def test_weights_of_another_size_are_refused(byt5, tmp_path):
    folder = tmp_path / "t5"
    shutil.copytree(byt5, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(InputError, match="lack 8 tensors"):
        T5TextEncoder(str(folder))(["a cat"])
    (folder / "config.json").write_text(json.dumps(config | {"d_ff": 64}))
    with pytest.raises(InputError, match="cannot read the weights"):
        T5TextEncoder(str(folder))(["a cat"])


def test_missing_vocabulary_is_refused(t5, tmp_path):
    folder = tmp_path / "t5"
    shutil.copytree(t5, folder)
    (folder / "spiece.model").unlink()
    with pytest.raises(InputError, match=r"cannot read the tokenizer .* no vocabulary; add its spiece\.model"):
        T5TextEncoder(str(folder))(["a cat"])


def test_name_of_a_folder_without_config(tmp_path):
    with pytest.raises(InputError, match=r"has no config\.json"):
        _ = T5TextEncoder(str(tmp_path)).name


def test_bad_arguments():
    with pytest.raises(InputError, match="dtype 'int8' is unknown; use one of float32"):
        T5TextEncoder("google/t5-v1_1-small", dtype="int8")
    with pytest.raises(InputError, match="at least 1, not 0"):
        T5TextEncoder("google/t5-v1_1-small", max_tokens=0)


# ---- a diffusers pipeline's folder


def test_encoder_and_tokenizer_in_subfolders(t5, tmp_path):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(t5, pipeline / "text_encoder", ignore=shutil.ignore_patterns("spiece.model", "*token*"))
    shutil.copytree(t5, pipeline / "tokenizer", ignore=shutil.ignore_patterns("config.json", "model.safetensors"))
    places = {"subfolder": "text_encoder", "tokenizer_subfolder": "tokenizer"}
    encoder, plain = T5TextEncoder(pipeline, **places), T5TextEncoder(t5)
    assert torch.equal(encoder(CAPTIONS).states, plain(CAPTIONS).states)
    assert encoder.name == plain.name.replace("tiny-t5", "pipeline")
    same = {key: value for key, value in plain.identity().items() if key != "encoder"}
    assert {key: value for key, value in encoder.identity().items() if key != "encoder"} == same
    assert same["weights"]
    assert build(describe(encoder)).name == encoder.name
    for absent in ({"subfolder": "text_encoder_2"}, {**places, "tokenizer_subfolder": "tokenizer_2"}):
        with pytest.raises(InputError, match="_2"):
            T5TextEncoder(pipeline, **absent)(CAPTIONS)


def test_a_subfolder_of_a_hub_model_is_named_and_asked_for(monkeypatch):
    asked = []

    def unreachable(*given):
        asked.append(given)
        raise OSError("no network")

    monkeypatch.setattr("imagen_lightning.text.hub.reach_hub", unreachable)
    encoder = T5TextEncoder("some-one/no-such", subfolder="text_encoder", tokenizer_subfolder="tokenizer")
    assert encoder.name == "some-one/no-such/text_encoder"
    with pytest.raises(InputError, match="cannot get the config"):
        _ = encoder.dim
    assert asked == [("some-one/no-such", "text_encoder", None)]


def test_lowercase_reads_prompts_as_deepfloyds_pipelines_do(t5):
    encoder, plain = T5TextEncoder(t5, clean_captions="lowercase"), T5TextEncoder(t5)
    captions = ["  A Photo, of a CAT <b>! ", "a photo, of a cat <b>!"]
    states = encoder(captions).states
    assert torch.equal(states[0], states[1])
    assert torch.equal(states, plain([captions[1]] * 2).states)
    assert encoder.name == plain.name + "+lower"
    assert encoder.identity()["cleaning"] == "lowercase"
    with pytest.raises(InputError, match="clean_captions 'upper' is unknown; use true, false or 'lowercase'"):
        T5TextEncoder(t5, clean_captions="upper")
