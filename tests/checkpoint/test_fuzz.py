"""Random damage to configs and weights: either it loads, or it ends in an error of ours."""

import copy
import functools
import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from diptych import files
from diptych.checkpoint import layouts
from diptych.checkpoint.formats import conventions, native, transformers
from diptych.errors import DiptychError
from samples import SMALL_VOCABULARY, TINY_VIT, make_loaded, small

FOREIGN = Path(__file__).parents[1] / "fixtures" / "checkpoints"
VALUES = [None, [], {}, -1, 0, 7, 1e308, "x", "gelu", True, {"a": 1}, 1 << 70, [0.5, 0.5, 0.5]]
VALUES.append(functools.reduce(lambda inner, _: [inner], range(400), 1))


def iter_places(value, place=()):
    """The way to every value inside a JSON value; of many of one kind, as in a vocabulary, to four."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, inner in items if len(items) < 30 else [*items[:2], *items[-2:]]:
        yield (*place, key)
        yield from iter_places(inner, (*place, key))


def changed(record, place, value):
    record = copy.deepcopy(record)
    holder = record
    for key in place[:-1]:
        holder = holder[key]
    if value is ...:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value
    return record


def load_or_refuse(place) -> bool:
    try:
        layouts.load(place, activation="gelu")
    except DiptychError as error:
        message = str(error)
    else:
        return True
    assert message.isprintable()
    assert len(message) < 700 + len(str(place))
    return False


def write_native(folder, version):
    """A checkpoint as this version of the format wrote it."""
    native.save(folder, make_loaded(small(TINY_VIT)))
    record = json.loads((folder / native.DESCRIPTION).read_text()) | {"version": version}
    if version < 3:
        del record["model"]["logit_bias"]
    if version < 2:
        del record["model"]["vision"]["mlp_ratio"], record["model"]["text"]["mlp_ratio"]
        del record["preprocess"]["resize"], record["preprocess"]["interpolation"]
    describe(folder / native.DESCRIPTION, record)


def describe(path, record):
    """Write a JSON file; the hashes of a native checkpoint are made to fit."""
    if path.name == native.DESCRIPTION and isinstance(record, dict):
        record = {key: value for key, value in record.items() if key != "self"}
        record["self"] = native._fingerprint(record)
    path.write_text(json.dumps(record))
    description = path.with_name(native.DESCRIPTION)
    if path.name != native.DESCRIPTION and description.exists():
        whole = json.loads(description.read_text())
        whole["files"][path.name] = {"bytes": path.stat().st_size, "xxh3": files.xxh3(path)}
        describe(description, whole)


@pytest.mark.parametrize(
    ("layout", "file"),
    [
        ("open_clip", "open_clip_config.json"),
        ("open_clip", "diptych_tokenizer.json"),
        ("transformers", "config.json"),
        ("transformers", "preprocessor_config.json"),
        ("transformers", "tokenizer_config.json"),
        ("transformers", "vocab.json"),
        ("diptych 1", "checkpoint.json"),
        ("diptych 2", "checkpoint.json"),
        ("diptych 3", "checkpoint.json"),
        ("diptych 3", "diptych_tokenizer.json"),
    ],
)
def test_any_value_in_a_config_may_be_anything(tmp_path, layout, file):
    if layout.startswith("diptych"):
        write_native(tmp_path / "m", int(layout[-1]))
    elif layout == "open_clip":
        shutil.copytree(FOREIGN / "open_clip_vit", tmp_path / "m")
    else:
        (tmp_path / "m").mkdir()
        transformers.write(tmp_path / "m", make_loaded(small(TINY_VIT)))
    path = tmp_path / "m" / file
    record = json.loads(path.read_text())
    draw = random.Random(0)
    for place in iter_places(record):
        holds_more = isinstance(functools.reduce(lambda value, key: value[key], place, record), dict | list)
        for value in [*(VALUES if holds_more else draw.sample(VALUES, 4)), 1 << 2000, ...]:
            describe(path, changed(record, place, value))
            load_or_refuse(tmp_path / "m")
    for value in VALUES:
        describe(path, value)
        load_or_refuse(tmp_path / "m")
    describe(path, record)
    assert load_or_refuse(tmp_path / "m")


@pytest.mark.parametrize("kind", ["safetensors", "torchscript", "state_dict"])
def test_any_byte_of_a_description_may_be_anything(tmp_path, kind):
    path = tmp_path / "weights"
    SMALL_VOCABULARY.save(tmp_path)
    if kind == "safetensors":
        shutil.copy(FOREIGN / "open_clip_vit/open_clip_model.safetensors", path)
    elif kind == "torchscript":
        shutil.copy(FOREIGN / "torchscript_vit/model.pt", path)
    else:
        state = conventions.openai_state(make_loaded(small(TINY_VIT)).model.state_dict().items())
        torch.save({"epoch": 1, "state_dict": state, "optimizer": {"a": [1, 2.0, "x", None]}}, path)
    original = path.read_bytes()
    if kind == "safetensors":
        regions = [(0, 8 + int.from_bytes(original[:8], "little"))]
    else:
        pickle = original.index(b"data.pkl")
        regions = [(pickle, pickle + 4000), (original.index(b"PK\x01\x02"), len(original)), (0, len(original))]
    draw = random.Random(0)
    for _ in range(150):
        data = bytearray(original)
        begin, end = draw.choice(regions)
        for _ in range(draw.choice([1, 1, 2, 4])):
            at = draw.randrange(begin, end)
            match draw.randrange(4):
                case 0 | 1:
                    data[at] ^= 1 << draw.randrange(8)
                case 2:
                    del data[at : at + draw.randrange(1, 9)]
                case 3:
                    data[at:at] = draw.randbytes(draw.randrange(1, 9))
        path.write_bytes(data)
        load_or_refuse(path)
    path.write_bytes(original)
    assert load_or_refuse(path)
