"""Commands that the program prints: pasted into a shell they say what was meant."""

import glob
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from neco.config import validate
from neco.sweep.launcher import collect_command, resume_command
from neco.task import finetune, train
from neco.utils.commands import escape_interpolation, format_command, format_override

HARD = (
    "my run, v=1 [x]", "a=b", "a,b", "{y}", "it's", 'say "so"', "both ' and \"", "$HOME", "${seed}", "\\${seed}", "a\\",
    "a\\'", "\\\\'b\\", "~/x", "~", "x#y", "100%", "käse(1)", "-x", "--help", "two\nlines", "tab\t", " x ", "", "null",
    "True", "007", "1e-3", "nan", "!x", "`x`", "*.png", "a;b", "a&b|c>d", "choice(a,b)", "a:b", "@x",
    "${oc.env:HOME}/x", "日本", "$${x}", "}", "${", "a\\\\${seed}\\",
)  # fmt: skip
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))


def read(words: str):
    """What Hydra and OmegaConf make of what a shell makes of a word."""
    (word,) = shlex.split(words)
    parsed = OverridesParser.create().parse_override(word)
    assert not parsed.is_sweep_override()
    again = OverridesParser.create().parse_override(f"key={parsed.get_value_element_as_str()}")  # as -m hands it on
    assert again.value() == parsed.value()
    return OmegaConf.to_container(OmegaConf.create({"key": parsed.value(), "seed": 1}), resolve=True)["key"]


@pytest.mark.parametrize("value", HARD)
def test_hard_values_come_back(value):
    assert read(format_override("key", value)) == value
    assert OmegaConf.create({"key": escape_interpolation(value)}).key == value


@settings(max_examples=300, deadline=None)
@given(TEXT)
@example("\\'")
def test_any_text_comes_back(text):
    if text != "???":  # OmegaConf's word for a value that is missing
        assert read(format_override("key", text)) == text


VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT.filter(lambda t: t != "???")


@settings(max_examples=100, deadline=None)
@given(st.lists(VALUES))
def test_lists_come_back(value):
    assert read(format_override("key", value)) == value


def test_what_needs_no_quotes_has_none():
    assert (
        format_override("checkpoint", "runs/train/2025-01-01_10-00-00") == "checkpoint=runs/train/2025-01-01_10-00-00"
    )
    assert format_override("checkpoint", "/data/my run") == "\"checkpoint='/data/my run'\""
    assert format_command(["task=eval", "eval=[linear]"]) == "python -m neco task=eval 'eval=[linear]'"


def loaded(command: str, python: str = "python") -> validate.Settings:
    """The settings that a printed command gives, as a shell and Hydra read it."""
    words = shlex.split(command)
    assert words[:3] == [python, "-m", "neco"]
    return validate.load(*(word for word in words[3:] if word != "-m"))


@pytest.mark.parametrize("name", ("my run, v=1 [x]", 'käse\'s "$HOME" ${seed}\\', "two\nlines", "-x"))
def test_every_printed_command_names_its_folder(tmp_path, name):
    folder = f"{tmp_path}/{name}"
    _, _, going_on = resume_command(["-m", "task=eval", "++run_dir=old", "seed=1", *typed()], folder).partition(": ")
    assert loaded(going_on).run.run_dir == folder and "old" not in going_on
    assert loaded(collect_command(Path(folder))).run.runs == [f"{glob.escape(folder)}/*"]
    trained = validate.load(
        "task=train", *typed(), "loss.grid=4", "dataset@val_dataset=camvid", "val_dataset.root='a b'"
    )
    command = train.evaluation_command(trained, "camvid", Path(folder))
    again = loaded(command)
    assert again.run.checkpoint == folder and again.choices["dataset"] == "camvid" and again.run.weights == "teacher"
    assert again.config["dataset"]["root"] == "a b" and again.run.data_root == "my data, all"
    again = loaded(train.evaluation_command(trained, None, Path(folder)).replace("=NAME", "=coco"))
    assert again.run.checkpoint == folder
    trained = validate.load("task=finetune", *typed(), "dataset=camvid", "dataset.root='a b'")
    again = loaded(finetune.evaluation_command(trained, Path(folder)))
    assert again.run.checkpoint == folder and again.config["dataset"]["root"] == "a b"


def typed() -> list[str]:
    """Overrides as Hydra took them."""
    return ["data_root='my data, all'", "eval=[overcluster]", "++eval.overcluster.k=[3,4]"]
