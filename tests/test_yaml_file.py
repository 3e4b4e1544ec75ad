"""YAML files of anybody: data within bounds, or one message that names the file."""

import os
import time

import pytest
import yaml

from neco.utils.errors import NecoError
from neco.utils.yaml_file import load_yaml

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(f'*{a}' for _ in range(9))}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{','.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)
BAD = {
    "latin-1": ("# käse\na: 1\n".encode("latin-1"), "is not UTF-8"),
    "utf-16": ("a: 1\n".encode("utf-16"), "is not UTF-8"),
    "not yaml": (b"a: 1\nb: [1\nc: 2\n", "line 3: is not valid YAML"),
    "tab": (b"a:\n\tb: 1\n", "line 2: is not valid YAML"),
    "two documents": (b"a: 1\n---\nb: 2\n", "is not valid YAML"),
    "list": (b"- a\n- b\n", "holds a list; it must be a mapping"),
    "text": (b"just text\n", "holds a str; it must be a mapping"),
    "object": (b"a: !!python/object/apply:os.system ['touch canary']\n", "is not valid YAML"),
    "alias bomb": (BOMB.encode(), "stands for more than 100,000 values"),
    "merge bomb": (MERGES.encode(), "stands for more than 100,000 values"),
    "holds itself": (b"a: &a [*a]\n", "levels deep"),
    "deep": (b"[" * 20_000, "levels deep"),
    "deeper than is walked": (b"a: " + b"[" * 70 + b"]" * 70, "levels deep"),
    "large": (b"a: 1\n" * 300_000, "larger than 1 MB"),
    "long number": (b"a: " + b"9" * 5000, "is not valid YAML"),
    "no date": (b"a: 2020-13-45\n", "is not valid YAML"),
    "no key": (b"? {a: 1}\n: 2\n", "is not valid YAML"),
    "null byte": (b"a: \0\n", "is not valid YAML"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_message_that_names_it(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (path := tmp_path / "x.yaml").write_bytes(BAD[name][0])
    start = time.monotonic()
    with pytest.raises(NecoError) as error:
        load_yaml(path)
    said = str(error.value)
    assert said.startswith(str(path)) and BAD[name][1] in said and "\n" not in said and len(said) < 400
    assert time.monotonic() - start < 20 and os.listdir() == ["x.yaml"]


def test_what_is_no_readable_file_is_named(tmp_path, monkeypatch):
    for path, word in ((tmp_path, "Is a directory"), (tmp_path / "none.yaml", "No such file")):
        with pytest.raises(NecoError, match=f"{path}: cannot be read: {word}"):
            load_yaml(path)
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(NecoError, match=r"pipe\.yaml: is a pipe"):
        load_yaml(tmp_path / "pipe.yaml")


def test_sound_files_are_read(tmp_path):
    path = tmp_path / "x.yaml"
    shared = ["a", 1, None]
    for value in ({}, {"a": {"b": [1, 2.5, "x", None, True]}}, {"one": shared, "two": shared}):
        path.write_text(yaml.safe_dump(value))
        assert load_yaml(path) == value
    path.write_text("# a comment alone\n")
    assert load_yaml(path) == {}
    path.write_bytes("\ufeffa: käse\n".encode())
    assert load_yaml(path) == {"a": "käse"}
