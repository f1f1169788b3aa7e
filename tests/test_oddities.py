"""What a model is shown otherwise than people see it: EXIF orientations, 16 bits, transparency; and HEIC."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diptych.checkpoint import layouts
from diptych.checkpoint.formats import native
from diptych.config import from_dict, to_dict
from diptych.decode import decode, find_oddities
from diptych.embed.bulk.folder import load_features
from diptych.embed.images import embed_images
from diptych.errors import PictureWarning
from diptych.image import Preprocess, open_picture
from diptych.image_file import SUFFIXES
from samples import TINY_VIT, encode, make_loaded, noise
from test_cli import call

HEIC = Path(__file__).parent / "fixtures" / "two_halves.heic"


def turned(format: str, orientation: int = 6, size: tuple[int, int] = (300, 200)) -> bytes:
    """As a phone writes a portrait: it lies on its side, and says so."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(noise(size), format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    (folder / "a.jpg").write_bytes(turned("JPEG"))
    (folder / "b.jpg").write_bytes(turned("JPEG", 1))
    (folder / "c.png").write_bytes(encode(Image.new("I;16", (40, 40)), "PNG"))
    (folder / "d.png").write_bytes(encode(noise(channels=4), "PNG"))
    native.save(folder / "model", make_loaded(TINY_VIT))
    return folder


@pytest.mark.parametrize("way", ["pixels", "quick_pixels"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_turned_picture_is_turned_where_it_is_asked_for(format, way):
    data = turned(format)
    upright = encode(open_picture(data).transpose(Image.Transpose.ROTATE_270), "PNG")
    plain = Preprocess(image_size=32)
    exact = plain.pixels(open_picture(upright)).astype(int)

    def distance(preprocess: Preprocess) -> int:
        found = preprocess.quick_pixels(data) if way == "quick_pixels" else preprocess.pixels(open_picture(data))
        return int(np.abs(found - exact).max())

    assert find_oddities(data) == ("turned",)
    assert distance(replace(plain, turn=True)) <= 2
    assert distance(plain) > 20


@pytest.mark.parametrize(
    ("image", "format", "found"),
    [
        (noise(), "JPEG", ()),
        (noise(), "PNG", ()),
        (Image.new("I;16", (9, 9)), "PNG", ("16-bit",)),
        (Image.new("I;16", (9, 9)), "TIFF", ("16-bit",)),
        (noise(channels=4), "PNG", ("transparent",)),
        (noise(channels=4), "WEBP", ("transparent",)),
        (Image.new("LA", (9, 9)), "PNG", ("transparent",)),
    ],
)
def test_oddities_are_found_in_the_header(image, format, found):
    assert find_oddities(encode(image, format)) == found


def test_a_picture_that_lacks_its_colours_has_no_oddities():
    whole = encode(Image.new("P", (9, 9)), "PNG")
    start = whole.index(b"PLTE") - 4
    size = int.from_bytes(whole[start : start + 4], "big")
    assert find_oddities(whole[:start] + whole[start + 12 + size :]) == ()


def test_what_pillow_turns_itself_is_not_turned_again():
    data = turned("TIFF")
    assert find_oddities(data) == ()
    assert open_picture(data).size == (200, 300)
    found = [Preprocess(image_size=32, turn=turn).pixels(open_picture(data)) for turn in (False, True)]
    np.testing.assert_array_equal(*found)


def test_a_palette_that_is_not_there_costs_that_picture_alone(tmp_path, capsys):
    """Pillow asserts that there is one when it is asked for transparency."""
    data = encode(noise().convert("P"), "PNG")
    at = data.index(b"PLTE")
    size = int.from_bytes(data[at - 4 : at], "big")
    (tmp_path / "a.png").write_bytes(data[: at - 4] + data[at + size + 8 :])
    (tmp_path / "b.png").write_bytes(encode(noise(), "PNG"))
    assert find_oddities((tmp_path / "a.png").read_bytes()) == ()
    layouts.save(make_loaded(TINY_VIT), tmp_path / "model")
    call("classify", tmp_path, "--labels", "cat", "dog", "--model", tmp_path / "model")
    assert "b.png" in capsys.readouterr().out


def test_damaged_metadata_is_no_oddity():
    data = turned("JPEG").replace(b"Exif\0\0MM", b"Exif\0\0??").replace(b"Exif\0\0II", b"Exif\0\0??")
    assert b"Exif\0\0??" in data
    assert find_oddities(data) == ()
    assert find_oddities(b"Exif") == ()


def test_an_equal_preprocessing_is_written_as_it_was():
    plain = Preprocess(image_size=32)
    assert "turn" not in to_dict(plain)
    assert from_dict(Preprocess, to_dict(replace(plain, turn=True))).turn


def test_python_is_warned_once_with_a_count(folder):
    pictures = [path for path in sorted(folder.iterdir()) if path.is_file()]
    loaded = make_loaded(TINY_VIT)
    with pytest.warns(PictureWarning) as caught:
        plain = embed_images(loaded, [*pictures, pictures[0]])
    told = sorted(str(one.message) for one in caught)
    assert [message.rpartition(": ")[2] for message in told] == ["1", "2 (--turn, or Loaded.turned(), applies it)", "1"]
    with pytest.warns(PictureWarning) as caught:
        upright = embed_images(loaded.turned(), pictures)
    assert len(caught) == 2
    assert (plain[:4] == upright).all(dim=1).tolist() == [False, True, True, True]


def test_classify_and_embed_say_so_and_turn(folder, tmp_path, capsys):
    answers = []
    for more in ([], ["--turn"]):
        assert (
            call("classify", folder / "a.jpg", "--labels", "a", "b", "--model", folder / "model", "--json", *more) == 0
        )
        printed = capsys.readouterr()
        answers.append(json.loads(printed.out)["labels"])
        warned = "warning: pictures with an EXIF orientation that is not applied" in printed.err
        assert warned == (not more)
        assert "PictureWarning" not in printed.err
    assert answers[0] != answers[1]
    for out, more in (("plain", []), ("turned", ["--turn"])):
        arguments = ["embed", folder / "model", folder / "a.jpg", "--out", tmp_path / out, "--precision", "exact"]
        assert call(*arguments, *more) == 0
        assert ("warning: pictures with an EXIF" in capsys.readouterr().err) == (not more)
    features = [load_features(tmp_path / out).features for out in ("plain", "turned")]
    assert not np.array_equal(*features)
    assert call(*arguments) == 2  # the folder was made of turned pictures
    assert "other settings" in (error := capsys.readouterr().err) or "another model" in error


def test_evaluate_says_so_and_turns(folder, tmp_path, capsys):
    for name in "ab":
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "x.jpg").write_bytes(turned("JPEG", 6 if name == "a" else 8))
    (tmp_path / "mine.toml").write_text(f"[data]\npath = '{tmp_path / 'set'}'\n")
    for more in ([], ["--turn", "--redo"]):
        arguments = ["evaluate", "--model", folder / "model", "--suite", tmp_path / "mine.toml"]
        call(*arguments, "--out", tmp_path / "results", *more)
        found = "warning: pictures with an EXIF orientation that is not applied" in capsys.readouterr().err
        assert found == (not more)


def test_without_the_extra_heic_is_counted_and_the_message_names_it(tmp_path):
    (tmp_path / "a.heic").write_bytes(HEIC.read_bytes())
    script = (
        "import sys; sys.modules['pillow_heif'] = None\n"
        "from diptych.cli import main\nfrom diptych.decode import decode\nfrom diptych.errors import PictureError\n"
        "try:\n    decode(open(sys.argv[1] + '/a.heic', 'rb').read())\n"
        "except PictureError as error:\n    print(error)\n"
        "main(['classify', sys.argv[1], '--labels', 'a', 'b'])"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "HEIC is not read without the extra `heic` (pip install '.[heic]')" in ended.stdout
    assert "other files: .heic 1; HEIC is read with the extra `heic`: pip install '.[heic]'" in ended.stderr


@pytest.mark.skipif("HEIF" not in SUFFIXES, reason="the extra `heic` is not installed")
def test_with_the_extra_heic_is_read_everywhere(folder, tmp_path, capsys):
    image = decode(HEIC.read_bytes()).convert("RGB")
    assert image.size == (64, 32)
    np.testing.assert_allclose(image.getpixel((5, 16)), (200, 0, 0), atol=12)
    np.testing.assert_allclose(image.getpixel((60, 16)), (255, 255, 255), atol=12)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.HEIC").write_bytes(HEIC.read_bytes())
    assert call("classify", tmp_path / "set", "--labels", "a", "b", "--model", folder / "model", "--json") == 0
    assert call("embed", folder / "model", tmp_path / "set", "--out", tmp_path / "features") == 0
    assert "1 feature" in capsys.readouterr().out
