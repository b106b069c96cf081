"""YAML of users is read as plain data, bounded, with each key once; anything else is one line."""

import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from imagen_lightning.errors import InputError
from imagen_lightning.io.yaml import MAX_BYTES, MAX_NODES, read_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 8)}]\n" for level in range(1, 30)
)
MERGE_BOMB = "a0: &a0 {k: 1}\n" + "".join(
    f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 8)}]}}\n" for level in range(1, 30)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, f"more than {MAX_NODES:,} values"),
        (MERGE_BOMB, f"more than {MAX_NODES:,} values"),
        ("&a [*a]", "holds itself"),
        ("- " * 100_000 + "a", "nested deeper than 50"),
        ("[" * 100_000, "nest"),
        ("a: " + "b" * (MAX_BYTES + 1), "bytes; at most"),
        ("a: 1\nb: 2\na: 3", "the key 'a' twice in one mapping (line 3)"),
        ('a: {b: 1, "b": 2}', "the key 'b' twice"),
        ("x: 2020-13-45", "not valid YAML"),
        ("x: " + "9" * 5000, "not valid YAML"),
        ("x: !!int ''", "not valid YAML"),
        ("x: !!bool perhaps", "not valid YAML"),
        ("x: !!timestamp soon", "not valid YAML"),
        ("x: !!float half", "not valid YAML"),
        ("? [a]\n: b", "not valid YAML"),
        ("a: *nowhere", "not valid YAML"),
        ("--- a\n--- b", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("x: \x00", "not valid YAML"),
        ("x: \ud800", "not valid YAML"),
        ("%YAML 1.9\n---\na: 1", "not valid YAML"),
    ],
)
def test_what_is_refused_is_one_line_and_soon(text, words):
    start = time.process_time()
    with pytest.raises(InputError) as error:
        read_yaml(text, "sweep file 's.yaml'")
    assert str(error.value).startswith("sweep file 's.yaml' ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert time.process_time() - start < 2


def test_keys_of_different_kinds_and_merged_ones_are_no_duplicates():
    assert read_yaml("1: a\n'1': b", "it") == {1: "a", "1": "b"}
    assert read_yaml("a: &x {b: 1}\nc: {<<: *x, b: 2}\nd: {<<: *x}", "it")["c"] == {"b": 2}
    assert read_yaml("\ufeffa: 1", "it") == {"a": 1}
    assert read_yaml("", "it") is None


@given(st.text(alphabet="ab:-,[]{}&*!<>|?'\"#%~1.e \n\t\u2028\x00é", max_size=40))
def test_any_text_is_read_as_libyaml_reads_it_or_refused(text):
    try:
        found = read_yaml(text, "it")
    except InputError:
        return
    assert repr(found) == repr(yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
