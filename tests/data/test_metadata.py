"""Known fields of samples' metadata, from img2dataset's parquet and json, under every name."""

import io
import json
import logging
import os
import sys
import tarfile

import numpy as np
import pytest
from given_data import given

from imagen_lightning.data.filters import Filter, select_rows
from imagen_lightning.data.metadata import (
    ALIASES,
    NUMBERS,
    WORDS,
    column_files,
    find_columns,
    known_fields,
    read_columns,
)
from imagen_lightning.data.shards import METADATA, Shards, index_shard
from imagen_lightning.errors import InputError

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'imagen-lightning[parquet]'")
from pyarrow import parquet  # noqa: E402


def img2dataset_rows(number_of=6):
    """Rows as img2dataset gives them for LAION-2B-en-aesthetic; every third download failed."""
    for number in range(number_of):
        failed = number % 3 == 2
        yield {
            "similarity": (30 + number) / 100,
            "hash": 1000 + number,
            "punsafe": None if number == 0 else number / 10,
            "pwatermark": 0.5,
            "aesthetic": 5.0 + number,
            "LANGUAGE": "en" if number % 2 else "de",
            "LICENSE": "?",
            "caption": f"number {number}",
            "url": f"https://example.org/{number}.jpg",
            "key": f"{number:09d}",
            "status": "failed_to_download" if failed else "success",
            "error_message": "HTTP Error 404: Not Found" if failed else None,
            "width": None if failed else 256,
            "height": None if failed else 100 + number,
            "original_width": None if failed else 1024,
            "original_height": None if failed else 4 * (100 + number),
            "exif": None if failed else "{}",
            "sha256": None if failed else f"{number:064x}",
        }


def write_img2dataset(folder, rows, with_parquet=True, with_json=True):
    """00000.tar of the downloads that succeeded, 00000.parquet of all, 00000_stats.json."""
    rows = list(rows)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for row in rows:
            if row["status"] != "success":
                continue
            members = {"jpg": b"image", "txt": row["caption"].encode()}
            if with_json:
                members["json"] = json.dumps(row, indent=4).encode()
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{row['key']}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    if with_parquet:
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text(json.dumps({"count": len(rows), "successes": 4}))
    return folder / "00000.tar"


def read(tar, *files):
    shards = Shards([index_shard(tar)])
    keys = list(shards.indexes[0].keys)
    return keys, read_columns(tar, keys, lambda row: shards.read(0, row, METADATA), files)


def read_keys(tar):
    return list(index_shard(tar).keys)


@pytest.mark.parametrize("with_parquet", [True, False])
@pytest.mark.parametrize("with_json", [True, False])
def test_img2dataset_columns_are_joined_by_key(tmp_path, with_parquet, with_json):
    tar = write_img2dataset(tmp_path, img2dataset_rows(), with_parquet, with_json)
    keys, columns = read(tar)
    assert keys == ["000000000", "000000001", "000000003", "000000004"]
    if not (with_parquet or with_json):
        assert columns == {}
        return
    expected = {
        "width": [256.0] * 4,
        "height": [100.0, 101, 103, 104],
        "original_width": [1024.0] * 4,
        "original_height": [400.0, 404, 412, 416],
        "similarity": [0.30, 0.31, 0.33, 0.34],
        "punsafe": [np.nan, 0.1, 0.3, 0.4],
        "pwatermark": [0.5] * 4,
        "aesthetic": [5.0, 6, 8, 9],
        "language": ["de", "en", "en", "de"],
        "status": ["success"] * 4,
    }  # no licence: "?" is none
    assert columns.keys() == expected.keys()
    for field, values in expected.items():
        np.testing.assert_array_equal(columns[field], np.array(values))
        assert columns[field].dtype.kind == ("U" if field in WORDS else "f")
    mask, counts = Filter({"punsafe_max": 0.3, "language": "en"}).select(columns, 4)
    assert mask.tolist() == [False, True, True, False]
    assert counts.removed == {"punsafe missing": 1, "punsafe_max=0.3": 1, "language missing": 0, "language=en": 0}


@pytest.mark.parametrize(("field", "alias"), [(field, alias) for field, names in ALIASES.items() for alias in names])
@pytest.mark.parametrize("spell", [str.lower, str.upper, str.title])
def test_every_alias_in_any_case(field, alias, spell):
    value = "word" if field in WORDS else 0.25
    if (field, alias) in (("original_width", "width"), ("original_height", "height")):
        known = known_fields({alias: 64, spell(alias): 512} if spell(alias) != alias else {alias: 64})
        assert known == ({alias: 64, field: 512} if spell(alias) != alias else {alias: 64})
    else:
        assert known_fields({spell(alias): value, "other": 1}) == {field: value}


@pytest.mark.parametrize(
    ("release", "columns", "known"),
    [
        (
            "LAION-400M",
            "SAMPLE_ID URL TEXT HEIGHT WIDTH LICENSE NSFW similarity",
            "width height similarity punsafe licence",
        ),
        (
            "LAION-2B-multi",
            "SAMPLE_ID URL TEXT HEIGHT WIDTH LICENSE LANGUAGE NSFW similarity",
            "width height similarity punsafe language licence",
        ),
        (
            "LAION-2B-en joined and aesthetic",
            "URL TEXT WIDTH HEIGHT similarity hash punsafe pwatermark aesthetic",
            "width height similarity punsafe pwatermark aesthetic",
        ),
        (
            "LAION-Aesthetics V2",
            "URL TEXT WIDTH HEIGHT similarity punsafe pwatermark AESTHETIC_SCORE hash __index_level_0__",
            "width height similarity punsafe pwatermark aesthetic",
        ),
        (
            "COYO-700M",
            "id url text width height image_phash text_length word_count num_tokens_bert num_tokens_gpt num_faces "
            "clip_similarity_vitb32 clip_similarity_vitl14 nsfw_score_opennsfw2 nsfw_score_gantman watermark_score "
            "aesthetic_score_laion_v2",
            "width height similarity punsafe pwatermark aesthetic",
        ),
        (
            "DataComp",
            "uid url text original_width original_height clip_b32_similarity_score clip_l14_similarity_score "
            "face_bboxes sha256 detected_language",
            "original_width original_height similarity language",
        ),
        ("PD12M", "id url s3_key caption hash width height mime_type license source", "width height licence"),
        (
            "LAION-2B-en through img2dataset",
            "WIDTH HEIGHT similarity punsafe pwatermark caption url key status error_message width height "
            "original_width original_height exif sha256",
            "width height original_width original_height similarity punsafe pwatermark status",
        ),
    ],
)
def test_the_columns_of_releases_are_known(release, columns, known):
    found = find_columns(columns.split())
    assert set(found) == set(known.split()), release
    assert len(set(found.values())) == len(found)
    if "through" in release:
        assert (found["width"], found["original_width"]) == ("width", "original_width")
    if release == "COYO-700M":
        assert found["similarity"] == "clip_similarity_vitb32"


def test_words_for_safety_are_probabilities():
    for word, value in {"UNLIKELY": 0.0, "unsure": 0.5, " NSFW ": 1.0, "0.25": 0.25}.items():
        assert known_fields({"NSFW": word}) == {"punsafe": value}
    for word in ("UNTAGGED", "", "?", None, [], "nan", "inf"):
        assert known_fields({"NSFW": word}) == {}


def test_what_says_nothing_is_missing():
    nothing = {
        "width": 0,
        "height": -1,
        "similarity": float("nan"),
        "aesthetic": 10**400,
        "language": "?",
        "license": " ",
    }
    assert known_fields(nothing) == {}
    assert known_fields({"width": "512", "watermark": True, 3: 4}) == {"width": 512.0, "pwatermark": 1.0}


def test_numeric_parquet_columns_are_cleaned_as_single_values_are(tmp_path):
    values = {
        "width": [0, -5, 7, None],
        "similarity": [float("nan"), float("inf"), 0.0, None],
        "NSFW": ["NSFW", "?", "0", None],
    }
    rows = [
        {"key": str(n), "status": "success", **{f: v[n] for f, v in values.items()}, "caption": ""} for n in range(4)
    ]
    columns = read(write_img2dataset(tmp_path, rows, with_json=False))[1]
    for number, row in enumerate(rows):
        known = known_fields(row)
        for field in ("width", "similarity", "punsafe"):
            np.testing.assert_equal(columns[field][number], known.get(field, np.nan))


def test_the_first_success_of_a_key_counts_and_keys_may_be_numbers(tmp_path):
    tar = write_img2dataset(tmp_path, img2dataset_rows(2), with_parquet=False, with_json=False)
    rows = [
        {"KEY": 1, "status": "failed_to_resize", "aesthetic": 1.0},
        {"KEY": 1, "status": "success", "aesthetic": 2.0},
        {"KEY": 1, "status": "success", "aesthetic": 3.0},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "00000.parquet")
    np.testing.assert_array_equal(read(tar)[1]["aesthetic"], [np.nan, 2.0])


def test_a_parquet_of_other_samples_is_passed_over(tmp_path, caplog):
    tar = write_img2dataset(tmp_path, img2dataset_rows(2), with_parquet=False)
    for table in ({"key": ["other"], "aesthetic": [1.0]}, {"aesthetic": [1.0]}):
        caplog.clear()
        parquet.write_table(pyarrow.table(table), tmp_path / "00000.parquet")
        with caplog.at_level(logging.WARNING):
            assert read(tar)[1]["aesthetic"].tolist() == [5.0, 6.0]
        assert "names none of the samples" in caplog.text


def test_a_damaged_parquet_is_named(tmp_path):
    tar = write_img2dataset(tmp_path, img2dataset_rows())
    (tmp_path / "00000.parquet").write_bytes((tmp_path / "00000.parquet").read_bytes()[:-10])
    with pytest.raises(InputError, match=r"00000\.parquet' is no parquet file .*move it away"):
        read(tar)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    tar = write_img2dataset(tmp_path, img2dataset_rows())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"needs pyarrow: pip install 'imagen-lightning\[parquet\]'"):
        read(tar)


def test_a_damaged_json_says_nothing(tmp_path):
    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w") as file:
        for number, data in enumerate((b'{"width": 64}', b"{", b"[1]", b"\xff", b"[" * 100_000, b'"text"')):
            info = tarfile.TarInfo(f"{number}.json")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    np.testing.assert_array_equal(read(tar)[1]["width"], [64] + [np.nan] * 5)


def test_columns_are_kept_until_a_file_changes(tmp_path):
    tar = write_img2dataset(tmp_path, img2dataset_rows())
    kept = tmp_path / "kept"
    _, first = read(tar, kept)
    assert sorted(item.name for item in tmp_path.iterdir()) == [
        "00000.parquet",
        "00000.tar",
        "00000_stats.json",
        "kept",
    ]

    def same(a, b):
        assert a.keys() == b.keys()
        for field in a:
            np.testing.assert_array_equal(a[field], b[field])

    table = tmp_path / "00000.parquet"
    status = table.stat()
    changed = [{**row, "aesthetic": 1.0} for row in img2dataset_rows()]
    parquet.write_table(pyarrow.Table.from_pylist(changed), table)
    size = table.stat().st_size
    table.write_bytes(b"x" * status.st_size)  # not read while it looks the same
    os.utime(table, ns=(status.st_atime_ns, status.st_mtime_ns))
    same(read(tar, kept)[1], first)
    parquet.write_table(pyarrow.Table.from_pylist(changed), table)
    assert size == table.stat().st_size
    assert set(read(tar, kept)[1]["aesthetic"]) == {1.0}
    table.unlink()
    same(read(tar, kept)[1], first)  # the json still says it
    write_img2dataset(tmp_path, img2dataset_rows(3), with_parquet=False)
    assert len(read(tar, kept)[1]["aesthetic"]) == 2
    kept.write_bytes(kept.read_bytes()[:100])
    assert len(read(tar, kept)[1]["aesthetic"]) == 2


def test_columns_of_a_read_only_folder_are_kept_in_the_cache(tmp_path, caplog):
    folder, cache = tmp_path / "shards", tmp_path / "cache"
    folder.mkdir()
    tar = write_img2dataset(folder, img2dataset_rows())
    files = column_files(tar, cache)
    folder.chmod(0o555)
    try:
        first = read(tar, *files)[1]
        assert not files[0].exists()
        assert files[1].parent == cache / "indexes"
        (folder / "00000.parquet").chmod(0)  # the kept columns do
        tar.chmod(0o444)
        again = read_columns(tar, read_keys(tar), lambda row: pytest.fail("read again"), files)
        np.testing.assert_array_equal(again["aesthetic"], first["aesthetic"])
        files[1].unlink()
        with caplog.at_level(logging.WARNING):
            (folder / "00000.parquet").chmod(0o444)
            read(tar, files[0])
        assert "can be kept nowhere" in caplog.text
    finally:
        folder.chmod(0o755)


def test_every_number_can_be_limited():
    for field in NUMBERS:
        assert Filter({f"{field}_min": 0.5}).why_not({field: 1.0}) is None
        assert Filter({f"{field}_max": 0.5}).why_not({field: 1.0}) == f"{field}_max=0.5"


@pytest.mark.parametrize(
    ("name", "licence"), [("dcss-tiles-32", "cc0-1.0"), ("flower-photos-128", "CC-BY-2.0"), ("fluent-emoji-3d", "mit")]
)
def test_real_shards_are_filtered_by_licence(name, licence, tmp_path):
    tars = sorted(given(name).glob("train-*.tar"))
    shards = Shards([index_shard(tars[0])])
    rows = [np.arange(len(shards.indexes[0].keys))]
    cache = tmp_path  # and nothing beside the shared shards
    shards.paths_beside = lambda: [tmp_path / tars[0].name]
    kept, counts = select_rows(Filter({"license": licence}), shards, rows, cache)
    assert counts.num_samples == len(rows[0]) > 100
    assert counts.left == len(kept[0]) > 0
    others = [row for row in rows[0] if row not in set(kept[0])]
    for numbers, equal in ((kept[0][:20], True), (others[:20], False)):
        for row in numbers:
            record = json.loads(shards.read(0, int(row), METADATA))
            assert (record.get("license", "").casefold() == licence.casefold()) is equal
    none, counts = select_rows(Filter({"license": "none such"}), shards, rows, cache)
    assert not len(none[0])
    assert counts.removed == {"licence missing": 0, "license=none such": len(rows[0])}
