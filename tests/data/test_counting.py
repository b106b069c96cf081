"""Nothing is left out without a count: generated folders, zips, tars and tables against independent counts."""

import ast
import csv
import io
import json
import tarfile
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import imagen_lightning
from imagen_lightning.cli.main import main
from imagen_lightning.data.braces import MAX_SHARDS, count_names
from imagen_lightning.data.dataset import Decoder
from imagen_lightning.data.decode import FILE_FORMATS, decode_captions
from imagen_lightning.data.doctor import examine
from imagen_lightning.data.folder import PictureDataset, Pictures
from imagen_lightning.data.index import index_shard, open_index
from imagen_lightning.data.ingest import write_shards
from imagen_lightning.data.ingest.sources import open_source
from imagen_lightning.data.shards import expand_shards
from imagen_lightning.data.skips import Unusable
from imagen_lightning.data.stream import stream_addresses
from imagen_lightning.data.tape import RawSample, SampleReader
from imagen_lightning.errors import InputError
from imagen_lightning.evaluation.prompts import read_prompts
from imagen_lightning.io.lines import lines

SLOW_MACHINES = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}

READ = {"jpg": "JPEG", "jpeg": "JPEG", "jpe": "JPEG", "jfif": "JPEG", "png": "PNG", "webp": "WEBP"}
FILES = {**READ, "bmp": "BMP", "gif": "GIF", "tif": "TIFF", "ppm": "PPM", "tga": "TGA"}
UNREAD = ("heic", "psd", "avif")
BROKEN = b"this is no image"


def encoded(format_, shade=0):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 7, 9)).save(buffer, format_)
    return buffer.getvalue()


IMAGES = {name: encoded(name) for name in set(FILES.values())}

# unicode, spaces, capitals and dots, but neither a first dot nor a last one, nor names that macOS gives its own files
PIECES = st.text("aBé日 _-1", min_size=1, max_size=4).filter(str.strip)
STEMS = st.lists(PIECES, min_size=1, max_size=3).map(".".join)


def case(suffix):
    return st.sampled_from([suffix, suffix.upper()])


# ---- folders and zips


@st.composite
def trees(draw):
    """Files by name, at least one image among them."""
    found = {"first.png": IMAGES["PNG"], "first.txt": b"one"}
    for folder, stem in draw(st.sets(st.tuples(st.sampled_from(["", "sub/", "sub/B é/"]), STEMS), max_size=6)):
        for suffix in draw(st.sets(st.sampled_from([*FILES, *UNREAD, "xyz", "", "json"]), max_size=2)):
            data = BROKEN if draw(st.booleans()) else IMAGES.get(FILES.get(suffix), b"?")
            found[folder + stem + (f".{draw(case(suffix))}" if suffix else "")] = data
        for suffix in draw(st.sets(st.sampled_from([".txt", ".TXT"]), max_size=2)):
            found[folder + stem + suffix] = draw(st.sampled_from([b"a caption", b"two\nlines", b" ", b"\xff\xfe"]))
    return found


def expected(files):
    """Of some files: the images, those that can be used, and how many files are neither images nor their captions."""
    images, used, captions = set(), set(), set()
    for name, data in files.items():
        stem, _, suffix = name.rpartition("/")[2].rpartition(".")
        suffix = suffix.lower()
        if not stem or suffix not in (*FILES, *UNREAD):
            continue
        images.add(name)
        start = name[: -len(suffix)]
        caption = next((start + kind for kind in ("txt", "TXT") if start + kind in files), None)
        captions.add(caption)
        if suffix in FILES and data != BROKEN and caption and files[caption] not in (b" ", b"\xff\xfe"):
            used.add(name)
    return images, used, len(files.keys() - images - captions)


def write_folder(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def check_images(path, files):
    """The law, for the source, for shards made of it, and for training on it as it lies."""
    images, used, others = expected(files)
    source = open_source(path)
    entries = list(source.entries())
    assert sorted(entry.name for entry in entries) == sorted(images)
    assert sum(source.unread().values()) == others
    pictures = Pictures(path)
    dataset = PictureDataset(pictures, None, Decoder(8, formats=FILE_FORMATS))
    samples = [dataset[position] for position in range(len(dataset))]
    assert {sample.key for sample in samples if sample.image is not None} == {f"{path.name}/{name}" for name in used}
    assert {skip.key for sample in samples for skip in sample.skips} == images - used
    assert sum(pictures.source.unread().values()) == others


@given(trees(), trees(), st.data())
@settings(max_examples=15, **SLOW_MACHINES)
def test_folders_with_links_are_counted_whole(files, linked, data):
    """Links to a folder inside, to one outside that links back, to one above, and to nothing."""
    with tempfile.TemporaryDirectory() as root:
        folder = write_folder(Path(root, "set"), files)
        other = write_folder(Path(root, "other"), linked)
        links = data.draw(st.sets(st.sampled_from(["outside", "again", "inside", "self", "above", "nothing"])))
        targets = {"outside": other, "again": other, "inside": folder / "sub", "self": folder, "above": Path(root)}
        (folder / "sub").mkdir(exist_ok=True)
        (other / "back").symlink_to(folder)
        for name in links:
            (folder / name).symlink_to(targets.get(name, "missing.jpg"))
        found = dict(files)
        outside = min(links & {"outside", "again"}, default=None)
        found |= {f"{outside}/{name}": content for name, content in linked.items()} if outside else {}
        found |= dict.fromkeys(links & {"above", "nothing"}, b"")
        check_images(folder, found)


def test_a_link_to_nothing_that_is_named_as_an_image_is_skipped(tmp_path):
    write_folder(tmp_path, {"a.png": IMAGES["PNG"], "a.txt": b"a", "b.txt": b"b"})
    (tmp_path / "b.png").symlink_to("missing")
    written = write_shards(tmp_path, tmp_path.with_name("out"), progress=False)
    assert (written.samples["train"], written.skipped, written.unread) == (1, {"image missing": 1}, {})


@given(trees())
@settings(max_examples=15, **SLOW_MACHINES)
def test_zips_are_counted_whole(files):
    with tempfile.TemporaryDirectory() as root:
        check_images(write_zip(Path(root, "set.zip"), files), files)


@given(trees())
@settings(max_examples=8, **SLOW_MACHINES)
def test_what_is_written_indexed_examined_and_read_agrees(files):
    with tempfile.TemporaryDirectory() as root:
        images, used, others = expected(files)
        out = Path(root, "out")
        written = write_shards(write_folder(Path(root, "set"), files), out, shard_size=3, progress=False)
        assert sum(written.samples.values()) == len(used)
        assert sum(written.skipped.values()) == len(images - used)
        assert sum(written.unread.values()) == others
        assert bool(others) == ("other file" in str(written))
        listed = out / "skipped.jsonl"
        names = [json.loads(line)["key"] for line in lines(listed.read_text())] if listed.exists() else []
        assert sorted(names) == sorted(images - used)
        found = agreed(sorted(map(str, out.glob("*.tar"))))
        assert (len(found[0]), found[1:]) == (len(used), (set(), Counter()))


# ---- tars


@st.composite
def members(draw):
    """Members of a tar in the order of their samples, and by sample those that it has."""
    found = {}
    for stem in draw(st.sets(STEMS, min_size=1, max_size=5)):
        images = draw(st.sampled_from([[], ["jpg"], ["PNG"], ["jfif"], ["gif"], ["heic"], ["gif", "jpg"]]))
        texts = draw(st.sampled_from([[], ["txt"], ["TXT"], ["json"], ["txt", "json"]]))
        found[stem] = [*images, *texts, *draw(st.sampled_from([[], ["cls"], ["xyz"]]))]
    strays = draw(st.sets(st.sampled_from(["README", ".hidden", "._first.jpg"])))
    return found, strays


def sorted_out(found):
    """What is to become of samples: the usable ones, those that cannot be used, and their members that are not read."""
    used, skipped, unread = set(), set(), Counter()

    def has(key, wanted):
        return any(suffix.lower() in wanted for suffix in found.get(key, ()))

    for key, suffixes in found.items():
        short, _, more = key.partition(".")
        image, caption, known = has(key, READ), has(key, ("txt", "json")), has(key, (*READ, "txt", "json"))
        known_short = has(short, (*READ, "txt", "json"))
        for suffix in suffixes:
            lower = suffix.lower()
            further = more and known_short and not (image and caption)
            if lower not in (*READ, "txt", "json"):
                unread[f"{more}.{lower}".lower() if more and (further or not known) else lower] += 1
            elif further:
                unread[f"{more}.{lower}".lower()] += 1
        if not known and not has(key, ("gif", "heic")):
            continue
        if image and caption:
            used.add(key)
        elif not (more and known_short):
            skipped.add(key)
    return used, skipped, unread


def write_tar(path, found, strays=()):
    with tarfile.open(path, "w") as tar:
        ordered = sorted((key.partition(".")[0], key, suffix) for key, suffixes in found.items() for suffix in suffixes)
        for name in [*strays, *(f"{key}.{suffix}" for _, key, suffix in ordered)]:
            suffix = name.rpartition(".")[2].lower()
            data = {"txt": b"a caption", "json": b'{"caption": "one"}'}.get(suffix, IMAGES.get(READ.get(suffix), b"?"))
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def agreed(shards):
    """Keys of usable samples, of others, and unread members, on which index, doctor, DataModule and stream agree."""
    from imagen_lightning.data import LaionDataModule

    indexes = [index_shard(shard) for shard in shards]
    unread = sum((Counter(index.unread) for index in indexes), Counter())
    for shard, index in zip(shards, indexes):
        with tarfile.open(shard) as tar:
            assert sum(index.members.values()) == len(tar.getmembers())
    contents = examine(shards).contents
    assert (contents.unread, len(contents.keys)) == (dict(unread), len(set(contents.keys)))
    used, skipped = set(contents.keys), {skip.key for skip in contents.skips}
    assert len(used) + len(skipped) == len(contents.keys) + len(contents.skips)

    module = LaionDataModule(shards, val=shards, image_size=8, max_skip_share=1.0)
    try:
        dataset = module.validation_set()
    except InputError:  # nothing can be used
        assert not used
    else:
        samples = [dataset[position] for position in range(len(dataset))]
        assert {sample.key.partition("/")[2] for sample in samples if sample.image is not None} == used
        missed = {skip.key for sample in samples for skip in sample.skips} | {
            skip.key for skip in module.val_skips._seen
        }
        assert missed == skipped

    decode, streamed, passed = Decoder(8), set(), set()
    for item in (item for shard in shards for item in SampleReader(shard)):
        try:
            assert isinstance(item, RawSample)
            decode(item.members, np.random.default_rng)
            streamed.add(item.key)
        except (AssertionError, Unusable):  # noqa: PERF203
            passed.add(item.key)
    assert (streamed, passed) == (used, skipped)
    return used, skipped, unread


@given(members())
@settings(max_examples=30, **SLOW_MACHINES)
def test_tars_are_counted_whole(drawn):
    found, strays = drawn
    used, skipped, unread = sorted_out(found)
    unread += Counter({"not KEY.suffix": len(strays)})
    with tempfile.TemporaryDirectory() as root:
        shard = write_tar(Path(root, "shard.tar"), found, sorted(strays))
        if not used and not skipped:
            assert index_shard(shard).unread == dict(unread)
            with pytest.raises(InputError, match="no sample"):
                examine(shard)
            return
        assert agreed([shard]) == (used, skipped, unread)


def test_keys_with_dots_lose_nothing(tmp_path):
    found = {f"p{number}.hd" if number % 2 else f"p{number}": ["jpg", "txt"] for number in range(6)}
    shard = write_tar(tmp_path / "a.tar", {**found, "p0.mask": ["png"]})
    assert agreed([shard]) == (set(found), set(), Counter({"mask.png": 1}))
    assert [line for line in examine(shard).advice() if "not read" in line] == [
        "1 member of the shards not read, by suffix: 1 mask.png; if images or captions are among them, rename them to "
        "KEY.jpg, KEY.txt, …"
    ]


def test_an_index_of_the_first_format_is_made_anew_where_members_were_passed_over(tmp_path, monkeypatch):
    from imagen_lightning.data import index as module

    plain = write_tar(tmp_path / "a.tar", {"p0": ["jpg", "txt"]})
    dotted = write_tar(tmp_path / "b.tar", {"p0.hd": ["jpg", "txt"]})
    with monkeypatch.context() as patch:
        patch.setattr(module, "INDEX_FORMAT", module._FIRST_FORMAT)
        patch.setattr(module, "index_shard", lambda shard, hashes=False: _first(index_shard(shard, hashes)))
        for shard in (plain, dotted):
            open_index(shard, hashes=True)
    assert [len(open_index(shard).keys) for shard in (plain, dotted)] == [1, 1]
    assert [open_index(shard).hashed for shard in (plain, dotted)] == [True, False]


def _first(index):
    """An index as it was made when keys ended at the first dot."""
    from dataclasses import replace

    if list(index.keys) != ["p0.hd"]:
        return index
    held = index.held._replace(
        spans=index.held.spans[:0], key_text=index.held.key_text[:0], key_ends=index.held.key_ends[:0]
    )
    return replace(index, num_samples=0, members={"hd.jpg": 1, "hd.txt": 1}, held=held, hashed=False)


# ---- tables


CAPTIONS = st.text("aé日 \"'.\u2028\x0b\x85,", max_size=8)
TABLES = ("csv", "tsv", "jsonl", "parquet", "arrow")


def write_table(path, rows):
    kind = path.suffix[1:]
    if kind in ("csv", "tsv"):
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            if kind == "csv":
                csv.writer(file).writerows([("image", "caption"), *rows])
            else:
                file.write("".join(f"{image}\t{caption}\n" for image, caption in [("image", "caption"), *rows]))
    elif kind == "jsonl":
        texts = [json.dumps({"image": image, "caption": caption}, ensure_ascii=False) for image, caption in rows]
        path.write_text("\n".join(texts), encoding="utf-8-sig")
    else:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist([{"image": image, "caption": caption} for image, caption in rows])
        if kind == "parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with pyarrow.ipc.new_file(path, table.schema) as writer:
                writer.write(table)
    return path


@given(
    st.sampled_from(TABLES), st.lists(st.tuples(st.sampled_from(["a.png", "b.png", "no.png"]), CAPTIONS), min_size=1)
)
@settings(max_examples=30, **SLOW_MACHINES)
def test_tables_are_counted_whole(kind, rows):
    rows = [("a.png", "first"), *rows]
    with tempfile.TemporaryDirectory() as root:
        write_folder(Path(root), {"a.png": IMAGES["PNG"], "b.png": BROKEN})
        source = open_source(write_table(Path(root, f"t.{kind}"), rows))
        records = [source.read(entry.place) for entry in source.entries()]
        assert len(records) == len(rows)
        assert [record.captions for record in records] == [[caption] for _, caption in rows]
        dataset = PictureDataset(Pictures(Path(root, f"t.{kind}")), None, Decoder(8))
        samples = [dataset[position] for position in range(len(dataset))]
        used = [image == "a.png" and bool(caption.split()) for image, caption in rows]
        assert [sample.image is not None for sample in samples] == used
        assert [len(sample.skips) for sample in samples] == [int(not usable) for usable in used]
        said = [sample.caption for sample in samples if sample.image is not None]
        assert said == [" ".join(caption.split()) for (_, caption), usable in zip(rows, used) if usable]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "t.csv",
            'image,caption\na.png,x\na.png,"open\na.png,y\n',
            r"from row 2 \(byte 22\) on.*close the quotation mark",
        ),
        ("t.csv", 'image,caption\na.png,"x" y\na.png,z"\n', "from row 1 "),
        ("t.csv", "image,caption,caption\na.png,x,y\n", "several columns 'caption'"),
        ("t.tsv", "image\tcaption\timage\na.png\tx\ty\n", "several columns 'image'"),
        ("p.csv", 'prompt\nx\n"open\ny\n', "damaged near line"),
        ("p.csv", "prompt,tag,tag\nx,y,z\n", "several columns 'tag'"),
        ("p.csv", "prompt,tag\na, red dog,x\n", "line 2 has more cells than columns"),
        ("p.csv", "prompt,tag\n,x\n", "line 2 has no prompt"),
        ("p.jsonl", '{"prompt": " "}\n', "line 1 has no prompt"),
    ],
)
def test_tables_that_cannot_be_told_apart_into_rows_are_refused(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words):
        read_prompts(tmp_path / name) if name.startswith("p") else list(open_source(tmp_path / name).entries())


def test_a_row_of_more_cells_than_columns_is_skipped(tmp_path):
    write_folder(tmp_path, {"a.png": IMAGES["PNG"], "t.csv": b"image,caption\na.png,a red, blue dog\na.png,dog,\n"})
    written = write_shards(tmp_path / "t.csv", tmp_path / "out", progress=False)
    assert (written.samples["train"], written.skipped) == (1, {"more cells than columns": 1})


# ---- lines


@given(st.lists(st.text("ab \u2028\u2029\x85\x0b\x0c\x1c", min_size=1).filter(str.strip), min_size=1), st.data())
@settings(max_examples=40, **SLOW_MACHINES)
def test_text_is_cut_at_line_ends_alone(texts, data):
    end = data.draw(st.sampled_from(["\n", "\r\n", "\r"]))
    assert lines(end.join(texts)) == texts == lines("".join(text + end for text in texts))
    said = [" ".join(text.split()) for text in texts]
    assert decode_captions(end.join(texts).encode(), None) == said
    with tempfile.TemporaryDirectory() as root:
        Path(root, "p.txt").write_text(end.join(texts), encoding="utf-8", newline="")
        records = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
        Path(root, "p.jsonl").write_text(end.join(records), encoding="utf-8", newline="")
        assert read_prompts(Path(root, "p.txt")).captions == read_prompts(Path(root, "p.jsonl")).captions == said


NO_USERS_TEXT = (  # messages of errors, and what the system and our own processes print
    *("cascade/local.py", "files.py", "evaluation/processes.py", "evaluation/memory.py", "sweeps/process.py"),
    *("cli/quickstart.py", "cli/verify_resume.py", "cli/sweep.py", "cli/sweep_check.py"),
    *("components.py", "callbacks/loggers.py"),
)


def test_no_text_of_users_is_cut_by_splitlines():
    package = Path(imagen_lightning.__file__).parent
    files = [path for path in package.rglob("*.py") if path.relative_to(package).as_posix() not in NO_USERS_TEXT]
    calls = [
        f"{path}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "splitlines"
    ]
    assert not calls
    assert len(files) > 200


# ---- patterns


@given(st.recursive(st.sampled_from(["a", "{0..4}", "{7..1..2}", "{a..c}", ""]), lambda part: st.one_of(
    st.lists(part, min_size=2, max_size=3).map(lambda parts: "{" + ",".join(parts) + "}"),
    st.lists(part, min_size=1, max_size=3).map("".join),
), max_leaves=5))  # fmt: skip
@settings(max_examples=40, **SLOW_MACHINES)
def test_names_are_counted_before_they_are_expanded(pattern):
    from braceexpand import braceexpand

    assert count_names(pattern) == len(list(braceexpand(pattern)))


@pytest.mark.parametrize("start", ["", "https://host/", "pipe:cat "])
@pytest.mark.parametrize(
    ("braces", "number"),
    [
        ("{0..9999999999}", "10,000,000,000"),
        ("{0..999}{0..1000}", "1,001,000"),
        ("{a,b}" * 40, "1,099,511,627,776"),
        ("{0..1" + "0" * 40 + "}", "more than 1e+30"),
    ],
)
def test_more_shards_than_can_be_read_are_refused_with_the_number(start, braces, number):
    with pytest.raises(InputError) as stop:
        stream_addresses(f"{start}{braces}.tar", allow_pipe=True)
    assert f"name {number} shards; give a pattern of at most {MAX_SHARDS:,}" in str(stop.value)


def test_brackets_stand_for_themselves_first(tmp_path):
    folder = tmp_path / "set [v2]"
    folder.mkdir()
    (folder / "train-0.tar").touch()
    (tmp_path / "set v").mkdir()
    (tmp_path / "set v" / "train-0.tar").touch()
    assert expand_shards(f"{folder}/train-*.tar") == [folder / "train-0.tar"]
    assert expand_shards(f"{tmp_path}/set [uv]/train-[0-9].tar") == [tmp_path / "set v" / "train-0.tar"]
    with pytest.raises(InputError, match=r"match no file; .*\[ \] stands for one of the characters in it"):
        expand_shards(f"{tmp_path}/set [x]/*.tar")


@pytest.mark.parametrize("name", ["num_workers", "batch_size", "num_val"])
@pytest.mark.parametrize("value", [-1, 10**9])
def test_numbers_that_would_never_come_to_an_end_are_refused(name, value):
    from imagen_lightning.data import ShapesDataModule

    with pytest.raises(InputError, match=f"{name} {value} is out of range"):
        ShapesDataModule(**{name: value}).setup("fit")


@pytest.mark.parametrize("command", ["index", "verify", "doctor", "write"])
@pytest.mark.parametrize("workers", ["-1", "1000000000"])
def test_workers_without_measure_are_refused(tmp_path, capsys, command, workers):
    shard = write_tar(tmp_path / "a.tar", {"p0": ["jpg", "txt"]})
    open_index(shard, hashes=True)
    folder = str(write_folder(tmp_path / "set", {"a.png": b""}))
    where = {"write": [folder, f"{folder}-out"], "doctor": [shard, "--out", f"{folder}.html"]}.get(command, [shard])
    assert main(["shards", command, *where, "--workers", workers]) == 2
    assert f"--workers: '{workers}' is outside [0, 1024]" in capsys.readouterr().err


def test_shards_of_other_members_alone_say_what_they_hold(tmp_path):
    from imagen_lightning.data import LaionDataModule

    shard = write_tar(tmp_path / "a.tar", {"p0": ["xyz"], "p1": ["xyz", "cls"]})
    with pytest.raises(InputError, match=r"no samples: the shards hold 2 xyz, 1 cls and no image KEY\.jpg"):
        LaionDataModule(shard).setup("fit")
    with pytest.raises(InputError, match="the 1 shard given hold 2 xyz, 1 cls and no sample"):
        examine(shard)
