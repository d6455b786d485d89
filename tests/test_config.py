"""Settings from YAML and the command line: what is read, what is refused and in which words, and that dumps load back."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, PositiveInt, model_validator

from moe.config import Choice, Settings, dump, load, refuse_idle, schema, wrong
from moe.errors import ConfigError
from moe.yaml_reader import MAX_BYTES, read_text
from tests.choosable import SHAPES, Shape


class Paint(Settings):
    kind: Literal["oil", "water"] = "oil"
    drying: float = Field(default=2.0, gt=0)  # of oil
    coats: PositiveInt = 1
    mix: tuple[float, float] = (0.5, 0.5)

    def idle(self) -> dict[str, str]:
        return {} if self.kind == "oil" else {"drying": f"with paint.kind={self.kind}"}


class Picture(Settings):
    title: str = "untitled"
    signed: bool = False
    note: str | None = None
    tags: list[str] = []
    paint: Paint = Field(default_factory=Paint)
    sketch: Paint | None = None
    shape: Shape = "dot"
    shapes: list[Shape] = []

    def idle(self) -> dict[str, str]:
        return {} if self.signed else {"paint.coats": "in an unsigned picture"}

    @model_validator(mode="after")
    def _fits(self) -> Picture:
        refuse_idle(self)
        if self.title == self.note:
            raise wrong("note", f"note={{{self.note}}} repeats the title; choose another note")
        if "bad" in self.tags:
            raise wrong(f"tags.{self.tags.index('bad')}", "no tag may say bad; choose another")
        return self


@pytest.fixture
def read(tmp_path: Path):
    def read(text: str = "", *overrides: str) -> Picture:
        (tmp_path / "a.yaml").write_text(text)
        os.chdir(tmp_path)
        return load(["a.yaml"], overrides, Picture)

    here = Path.cwd()
    yield read
    os.chdir(here)


def refusal(read, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        read(text, *overrides)
    return str(error.value)


def test_files_merge_left_to_right_and_overrides_come_last(tmp_path):
    (tmp_path / "a.yaml").write_text("title: a\npaint: {coats: 2, drying: 1e-3}\nsigned: true\ntags: [x, y]\n")
    (tmp_path / "b.yaml").write_text("paint: {coats: 3}\ntags: [z]\n")
    picture = load([tmp_path / "a.yaml", tmp_path / "b.yaml"], ["title=c", "paint.mix=[1, 0]", "tags.0=w"], Picture)
    assert picture == Picture(title="c", signed=True, tags=["w"], paint=Paint(coats=3, drying=0.001, mix=(1.0, 0.0)))


def test_an_override_replaces_a_whole_mapping_and_opens_a_null_one(read):
    assert read("sketch: {coats: 3, kind: oil}", "sketch={kind: water}").sketch == Paint(kind="water")
    assert read("sketch: {coats: 3}", "sketch=null").sketch is None
    assert read("sketch: null", "sketch.coats=4").sketch == Paint(coats=4)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-2.5E+4", -25000.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("-7", -7),
        ("0", 0),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("true", True),
        ("~", None),
        ("null", None),
        ("12:30:45", "12:30:45"),
        ("2001-01-01", "2001-01-01"),
        ("'1e-3'", "1e-3"),
        ('"5"', "5"),
        ("-.inf", float("-inf")),
        ("[1, a]", [1, "a"]),
        ("! 5", 5),
        ("1.2.3", "1.2.3"),
        ("", None),
    ],
)
def test_words_of_yaml_mean_what_they_look_like(text, value):
    read, _ = read_text(f"key: {text}", "file")
    assert read == {"key": value}
    assert type(read["key"]) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", ["file:3", "a is given twice", "file:1"]),
        ("a: {b: 1, b: 2}", ["file:1", "a.b is given twice"]),
        ("a: .nan", ["file:1", ".nan"]),
        ("a: 010", ["file:1", "010", "quote"]),
        ("a: 0x1F", ["file:1", "0x1F"]),
        ("a: 1e999", ["file:1", "1e999", "too large"]),
        (f"a: {'9' * 50}", ["file:1", "too large"]),
        ("a: &x 1\nb: *x", ["file:1", "anchors"]),
        ("\na: !!python/object/apply:os.system [ls]", ["file:2", "python/object"]),
        ("a: !!float 3", ["file:1", "float"]),
        ("a: !include other.yaml", ["file:1", "!include"]),
        ("[" * 100_000, ["file:1", "32 levels"]),
        ("\n".join(" " * i + "a:" for i in range(1000)), ["file:32", "32 levels"]),
        ("{a: " * 100_000, ["file:1", "32 levels"]),
        ("a: [1,\nb", ["file:2"]),
        ("a: \0", ["file:1", "x00"]),
        ("? [a]\n: 1", ["file:1", "key"]),
        ("a: 1\n---\nb: 2", ["file:2", "single document"]),
        ('a: "\\ud800"', ["file:1", "whole characters"]),
        ("a: b: c", ["file:1"]),
        ("a:\n\t- b", ["file:2"]),
    ],
)
def test_traps_and_bombs_are_refused_with_their_line(text, words):
    with pytest.raises(ConfigError) as error:
        read_text(text, "file")
    for word in words:
        assert word in str(error.value)
    assert len(str(error.value)) < 400


def test_aliases_cannot_grow_memory():
    bomb = "a: &a [x, x]\n" + "\n".join(f"{b}: &{b} [*{a}, *{a}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    with pytest.raises(ConfigError, match="anchors"):
        read_text(bomb, "file")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("titel: x", "a.yaml:1: titel is not a setting; did you mean title?"),
        ("paint:\n  coat: 2", "a.yaml:2: paint.coat is not a setting; did you mean paint.coats?"),
        ("coats: 2", "a.yaml:1: coats is not a setting; did you mean paint.coats or sketch.coats?"),
        ("zzz: 2", "a.yaml:1: zzz is not a setting; choose from title, signed, note, tags, paint, sketch, shape, shapes"),
        ("sketch: {coat: 2}", "a.yaml:1: sketch.coat is not a setting; did you mean sketch.coats?"),
        ("paint: {coats: 1e3}", "a.yaml:1: paint.coats=1000.0 is not a whole number; write 1000"),
        ("paint: {coats: 0}", "a.yaml:1: paint.coats=0 should be greater than 0"),
        ("paint: {coats: true}", "a.yaml:1: paint.coats=true is not a whole number"),
        ("paint: {drying: '1e-3'}", 'a.yaml:1: paint.drying="1e-3" is not a number; remove the quotes'),
        ("paint: {drying: .inf}", "a.yaml:1: paint.drying=.inf should be a finite number"),
        ("paint: {drying: null}", "a.yaml:1: paint.drying=null is not a number"),
        ("paint: {kind: oli}", "a.yaml:1: paint.kind=oli is not a choice; did you mean oil?"),
        ("paint: 3", "a.yaml:1: paint=3 is not a mapping, such as {name: value}"),
        ("paint: {mix: [1]}", "a.yaml:1: paint.mix.1 is missing; add it"),
        ("paint: {mix: [1, x]}", "a.yaml:1: paint.mix.1=x is not a number"),
        ("signed: no", "a.yaml:1: signed=no is not true or false; write false"),
        ("signed: 1", "a.yaml:1: signed=1 is not true or false"),
        ("title: 007.5", "a.yaml:1: title=7.5 is not text; put it in quotes to read it as text"),
        ("tags: x", "a.yaml:1: tags=x is not a list, such as [a, b]"),
        ("title: {a}\nnote: b", 'a.yaml:1: title={"a": null} is not text; put it in quotes to read it as text'),
        ("title: b\nnote: b", "a.yaml:2: note={b} repeats the title; choose another note"),
        ("tags:\n- a\n- bad", "a.yaml:3: no tag may say bad; choose another"),
        ('paint: {kind: "o\\nil"}', 'a.yaml:1: paint.kind="o\\nil" is not a choice; did you mean oil?'),
        ("paint: {kind: water, drying: 3}", "a.yaml:1: paint.drying=3.0 has no effect with paint.kind=water; leave it out"),
        ("paint:\n  coats: 1", "a.yaml:2: paint.coats=1 has no effect in an unsigned picture; leave it out"),
        ("shape: dott", "a.yaml:1: shape=dott names no shape: there is no dott; did you mean dot?"),
        ("shape: {name: box, widht: 3, width: 1}", "a.yaml:1: shape.widht is not a setting; did you mean shape.width?"),
        ("shape: {name: box}", "a.yaml:1: shape.width is missing; add it"),
        ("shape: {name: box, width: wide}", "a.yaml:1: shape.width=wide is not a whole number"),
        ("shape: {name: box, width: 1, colour: bleu}", "a.yaml:1: shape.colour=bleu is not a choice; did you mean blue?"),
        ("shape: {canvas: 3}", "a.yaml:1: shape.canvas is not a setting; choose from name, copy, limit, at"),
        ("shape: 3", "a.yaml:1: shape=3 must be the name of a shape, or a mapping with its name"),
        ("shape: {name: frame, inner: {name: box, width: 1.5}}", "a.yaml:1: shape.inner.width=1.5 is not a whole number"),
        ("shape: {name: frame, inner: {copi: 1}}", "a.yaml:1: shape.inner.copi is not a setting; did you mean shape.inner.copy?"),
        ("shapes:\n- dot\n- {name: box}", "a.yaml:3: shapes.1.width is missing; add it"),
        ("shapes:\n- dot\n- {name: box, width: 1, hue: 2}", "a.yaml:3: shapes.1.hue is not a setting; choose from name, width, colour"),
        ("shape: missing", "a.yaml:1: shape=missing cannot be used here: No module named 'tests.choosable_but_absent'"),
        ("- 1", "a.yaml:1: a recipe is a mapping of settings, such as `train: {steps: 100}`, not [1]"),
    ],
)
def test_each_mistake_has_its_sentence(read, text, sentence):
    assert refusal(read, text) == sentence


def test_every_mistake_is_told_on_a_line_of_its_own(read):
    lines = refusal(read, "titel: x\npaint: {coats: 0}", "signed=perhaps").splitlines()
    assert [line.split(" ")[0] for line in lines] == ["command", "a.yaml:2:", "a.yaml:1:"]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("paint.coats=x", "command line: paint.coats=x is not a whole number"),
        ("paint.coat=1", "command line: paint.coat is not a setting; did you mean paint.coats?"),
        ("paint.coats=010", "command line: paint.coats: 010 is decimal"),
        ("paint.coats", "command line: 'paint.coats' is no setting; write key=value"),
        ("=3", "command line: '=3' is no setting"),
        ("paint..coats=3", "command line: 'paint..coats=3' is no setting"),
        ("title=", "command line: title is given no value; write title=null"),
        ("title=*x", "command line: title: not readable as YAML"),
        ("title=[1", "command line: title: not readable as YAML"),
        ("tags.3=x", "command line: tags is a list of 2; write tags.0 for its first"),
        ("tags.x=x", "command line: tags is a list of 2; write tags.0 for its first"),
        ("shapes.0.copy=2", "command line: shapes is no list in the files, so that it has no entry 0; set all of it: shapes='[…]'"),
        ("signed.x=2", "command line: signed is true, which has no x"),
    ],
)
def test_overrides_are_refused_with_their_key(read, override, sentence):
    assert refusal(read, "tags: [a, b]\nsigned: true", override).startswith(sentence)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "null", "\ufeff"])
def test_an_empty_file_is_a_recipe_of_defaults(read, text):
    assert read(text) == Picture()


def test_unreadable_files_are_named(tmp_path):
    big, binary = tmp_path / "big.yaml", tmp_path / "binary.yaml"
    big.write_text("# " + "x" * MAX_BYTES)
    binary.write_bytes(b"title: a\nnote: \xff\xfe")
    for path, word in [(big, "larger"), (binary, "binary.yaml:2: byte 0xff"), (tmp_path, "a folder"), (tmp_path / "no.yaml", "absent")]:
        with pytest.raises(ConfigError, match=word):
            load([path], [], Picture)
    with pytest.raises(ConfigError, match="not a file"):
        load(["/dev/zero"], [], Picture)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbftitle: b\n")
    assert load([tmp_path / "a.yaml"], [], Picture).title == "b"


def test_a_choice_becomes_the_mapping_of_all_options(read):
    dot = {"name": "dot", "copy": 1, "limit": float("inf"), "at": (0.0, 0.5)}
    assert read().shape == dot
    assert read("shape: dot").shape == dot
    assert read("shape: {copy: 3}").shape == dot | {"copy": 3}
    assert read("", "shape.at=[1, 2]").shape == dot | {"at": (1.0, 2.0)}
    assert read("shape: {name: frame}").shape == {"name": "frame", "inner": dot, "title": None}
    assert read("shape: frame", "shape.inner=box", "shape.inner.width=2").shape["inner"] == {"name": "box", "width": 2, "colour": "red"}


def test_a_bare_name_replaces_a_mapping_and_options_add_to_a_bare_name(tmp_path):
    for name, text in {"a": "shape: {name: box, width: 3}", "b": "shape: dot", "c": "shape: {copy: 5}"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    shape = load([tmp_path / "a.yaml", tmp_path / "b.yaml", tmp_path / "c.yaml"], [], Picture).shape
    assert shape == {"name": "dot", "copy": 5, "limit": float("inf"), "at": (0.0, 0.5)}


def test_a_place_is_that_of_the_file_which_gave_the_value(tmp_path):
    (tmp_path / "a.yaml").write_text("tags:\n- a\n- 1\npaint: {kind: oil, drying: 1}\n")
    (tmp_path / "b.yaml").write_text("\ntags:\n- a\n- b\n- 2\npaint:\n  kind: water\n")
    with pytest.raises(ConfigError) as error:
        load([tmp_path / "a.yaml", tmp_path / "b.yaml"], [], Picture)
    assert str(error.value).startswith(f"{tmp_path}/b.yaml:5: tags.2=2 is not text")


def test_a_replaced_value_is_no_longer_where_it_was(tmp_path):
    (tmp_path / "a.yaml").write_text("shapes: [{name: box, width: 1}]\n")
    (tmp_path / "b.yaml").write_text("\nshapes: [box]\n")
    with pytest.raises(ConfigError, match=r"b\.yaml:2: shapes\.0\.width is missing"):
        load([tmp_path / "a.yaml", tmp_path / "b.yaml"], [], Picture)
    with pytest.raises(ConfigError, match=r"command line: shapes\.0\.width is missing"):
        load([tmp_path / "a.yaml"], ["shapes=[box]"], Picture)


AWKWARD = ["1e-3", "no", "null", "~", "010", "0x1", ".nan", "-", "a: b", "# c", "", " x ", "two\nlines\n", "\r", "é…\u2028"]
AWKWARD += ["\x07", "*a", "12:30", "1_0", "'", '"', "\ufeff", "😀"]


def random_picture(rng: random.Random) -> Picture:
    def number() -> float:
        return rng.choice([rng.random(), 10.0 ** rng.randint(-300, 300), float(rng.randint(1, 9)), 5e-324])

    def text() -> str:
        return rng.choice(AWKWARD) if rng.random() < 0.6 else "".join(chr(rng.randint(32, 0x2FF)) for _ in range(rng.randint(0, 90)))

    signed, kind = rng.random() < 0.5, rng.choice(["oil", "water"])
    paint = {"kind": kind, "mix": (number(), -number())}
    paint |= {"coats": rng.randint(1, 1 << 62)} if signed else {}
    paint |= {"drying": number()} if kind == "oil" else {}
    shape = rng.choice(["dot", {"at": (number(), number()), "limit": number()}, {"name": "frame", "inner": "dot", "title": text()}])
    sketch = rng.choice([None, Paint(kind="water"), Paint(coats=3)])
    tags = [text() for _ in range(rng.randint(0, 3))]
    return Picture(title=text(), note=None, tags=tags, signed=signed, paint=Paint(**paint), shape=shape, sketch=sketch, shapes=[shape] * 2)


def test_what_is_dumped_loads_back_to_the_same_object(tmp_path):
    path, rng = tmp_path / "dump.yaml", random.Random(0)
    for _ in range(150):
        picture = random_picture(rng)
        path.write_text(dump(picture), encoding="utf-8", newline="")
        assert load([path], [], Picture) == picture
        assert dump(load([path], [], Picture)) == dump(picture)


def test_a_dump_leaves_out_what_has_no_effect():
    text = dump(Picture(paint=Paint(kind="water")))
    assert "drying" not in text.split("sketch")[0]
    assert "coats" not in text.split("sketch")[0]


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Picture().title = "other"


def test_the_schema_offers_each_entry_with_its_own_options():
    shapes = {name: module for name, module in SHAPES.items() if name != "missing"}

    class Page(Settings):
        shape: Choice(shapes, "shape", given=("canvas",)) = "dot"

    described = schema(Page)
    json.dumps(described)
    *entries, bare = described["properties"]["shape"]["oneOf"]
    assert bare == {"type": "string", "enum": ["dot", "box", "frame"]}
    options = {entry["properties"]["name"]["const"]: entry for entry in entries}
    assert set(options["box"]["properties"]) == {"name", "width", "colour"}
    assert options["box"]["required"] == ["name", "width"]
    assert options["box"]["properties"]["colour"]["enum"] == ["red", "blue"]
    assert options["dot"]["properties"]["copy"] == {"type": "integer", "default": 1}
    assert options["dot"]["additionalProperties"] is False


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("run.folder=s3://b/run", "run.folder"),
        ("data.source={name: text, paths: [a.txt, 'gs://b/c.txt']}", r"data\.source\.paths\.1"),
        ("init={from: 'https://b/m'}", "init.from"),
    ],
)
def test_urls_are_no_local_paths(word, key):
    with pytest.raises(ConfigError, match=rf"^command line: {key}=\S+ is a URL, and only local paths .* give a path"):
        load(["configs/debug.yaml"], [word])


def test_a_url_in_a_file_is_named_with_its_line(tmp_path):
    (tmp_path / "a.yaml").write_text("run:\n  folder: s3://b/run\n")
    with pytest.raises(ConfigError, match=r"a\.yaml:2: run\.folder=s3://b/run is a URL"):
        load(["configs/debug.yaml", str(tmp_path / "a.yaml")])
    assert not Path("s3:").exists()
