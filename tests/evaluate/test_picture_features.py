import os
import subprocess
import sys

import jobs
import pytest
import torch
from exams import NAMES, pictures, write_shapes, write_wds

from diptych.decode import decode
from diptych.embed.cache import FeatureCache
from diptych.embed.images import ImageTower, embed_images, image_space, project
from diptych.errors import DatasetError
from diptych.evaluate.datasets.layouts import open_samples
from diptych.evaluate.datasets.registry import Place
from diptych.evaluate.models import features
from diptych.evaluate.models.features import Embedder, cut_border
from diptych.evaluate.models.open import clip_image_model
from samples import TINY_RESNET, TINY_VIT, draw, encode, make_loaded


@pytest.fixture
def shapes(tmp_path):
    return open_samples(Place(), write_shapes(tmp_path / "shapes"), "test", "single")


def embedder(tmp_path, config=TINY_VIT, loaded=None):
    return Embedder(clip_image_model(loaded or make_loaded(config), "exact"), FeatureCache(tmp_path / "cache"), 4)


@pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET])
def test_joint_features_are_those_of_embed_images(tmp_path, shapes, config):
    found = embedder(tmp_path, config).embed(shapes)
    expected = embed_images(make_loaded(config), [data for *_, data in pictures()])
    torch.testing.assert_close(found.joint, expected, atol=2e-6, rtol=0)
    assert found.kept == tuple(range(24))


def test_pooled_features_are_what_is_projected():
    """A ViT's are those behind the last norm, a ResNet's the output of attention pooling."""
    for config, width in ((TINY_VIT, 32), (TINY_RESNET, 24)):
        loaded = make_loaded(config)
        pixels = torch.stack([torch.from_numpy(loaded.preprocess.pixels(draw("red", shape))) for shape in NAMES])
        pooled = ImageTower(loaded, "exact", pooled=True)
        assert pooled.embed_dim == width
        features = pooled.encode(pixels)
        assert features.shape == (4, width)
        plain = ImageTower(loaded, "exact").encode(pixels)
        torch.testing.assert_close(project(loaded, features), plain, atol=2e-6, rtol=0)
        assert image_space(loaded, "exact") != image_space(loaded, "exact", pooled=True)


def test_nothing_is_computed_twice(tmp_path, shapes, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 10)
    first = embedder(tmp_path).embed(shapes)
    second = embedder(tmp_path)
    monkeypatch.setattr(second.tower, "encode", lambda _: pytest.fail("computed again"))
    again = second.embed(shapes)
    assert torch.equal(first.pooled, again.pooled)


def test_an_image_is_computed_once_however_often_it_comes(tmp_path, monkeypatch):
    """Again in its chunk, in a later one, and as a broken one in each."""
    monkeypatch.setattr(features, "CHUNK", 4)
    one, two = encode(draw("red", "dot")), encode(draw("blue", "dot"))
    contents = [one, one, two, b"", one, two, b"", b"", one, two]
    samples = [(f"{i}", b"0", data) for i, data in enumerate(contents)]
    ours, seen = embedder(tmp_path), []
    encode_pixels = ours.tower.encode
    monkeypatch.setattr(ours.tower, "encode", lambda pixels: (seen.append(len(pixels)), encode_pixels(pixels))[1])
    found = ours.embed(open_samples(Place(), write_wds(tmp_path / "set", samples), "test", "single"))
    assert sum(seen) == 2
    assert (found.kept, found.skipped) == ((0, 1, 2, 4, 5, 8, 9), {"empty": 3})
    red, blue = found.pooled[0], found.pooled[2]
    assert torch.equal(found.pooled, torch.stack([red, red, blue, red, blue, red, blue]))


def test_what_was_computed_before_a_failure_is_kept(tmp_path, shapes, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 4)
    ours, calls = embedder(tmp_path), []
    monkeypatch.setattr(type(ours.tower), "streams", 1)
    encode_pixels = ours.tower.encode

    def fail_later(pixels):
        calls.append(len(pixels))
        if len(calls) == 5:
            raise RuntimeError("no memory")
        return encode_pixels(pixels)

    monkeypatch.setattr(ours.tower, "encode", fail_later)
    with pytest.raises(RuntimeError, match="no memory"):
        ours.embed(shapes)
    calls.clear()
    monkeypatch.setattr(ours.tower, "encode", lambda pixels: (calls.append(len(pixels)), encode_pixels(pixels))[1])
    ours.embed(shapes)
    assert 4 <= sum(calls) < 24


def test_broken_pictures_are_counted_and_the_others_computed_once(tmp_path, monkeypatch):
    samples = [(key, str(number).encode(), data) for key, number, data in pictures()]
    for i, data in ((2, b""), (9, b"not a picture"), (17, samples[17][2][:300]), (18, b"not a picture")):
        samples[i] = (*samples[i][:2], data)
    opened = open_samples(Place(), write_wds(tmp_path / "broken", samples), "test", "single")
    ours, seen = embedder(tmp_path), []
    encode_pixels = ours.tower.encode
    monkeypatch.setattr(ours.tower, "encode", lambda pixels: (seen.append(len(pixels)), encode_pixels(pixels))[1])
    found = ours.embed(opened)
    assert found.skipped == {"empty": 1, "not_a_picture": 2, "truncated": 1}
    assert found.kept == tuple(i for i in range(24) if i not in (2, 9, 17, 18))
    assert sum(seen) == 20
    whole = embed_images(make_loaded(TINY_VIT), [samples[i][2] for i in found.kept])
    torch.testing.assert_close(found.joint, whole, atol=2e-6, rtol=0)


def test_features_that_are_no_numbers_are_refused_by_name(tmp_path, shapes):
    loaded = make_loaded(TINY_VIT)
    with torch.no_grad():
        loaded.model.visual.ln_post.weight[3] = float("nan")
    with pytest.raises(DatasetError, match=r"NaN or infinity for 24 of 24 pictures \(first: red-circle\)"):
        embedder(tmp_path, loaded=loaded).embed(shapes)


def test_a_border_is_cut_before_preprocessing(tmp_path, shapes):
    ours = embedder(tmp_path)
    plain, cut = ours.embed(shapes), ours.embed(shapes, border=5)
    assert not torch.equal(plain.pooled, cut.pooled)
    expected = embed_images(make_loaded(TINY_VIT), [cut_border(decode(data), 5) for *_, data in pictures()])
    torch.testing.assert_close(cut.joint, expected, atol=2e-6, rtol=0)
    small = [("a", b"0", encode(draw("red", "dot", 8))), ("b", b"0", encode(draw("red", "dot", 40)))]
    opened = open_samples(Place(), write_wds(tmp_path / "small", small), "test", "single")
    assert ours.embed(opened, border=5).skipped == {"too_small": 1}


def test_ranks_share_the_pictures_and_all_have_the_features(tmp_path, shapes):
    """Two processes over loopback give what one gives, each with the pictures of its chunks alone."""
    alone = embedder(tmp_path).embed(shapes)
    code = (
        "import sys, torch; sys.path[:0] = ['tests', 'tests/evaluate']\n"
        "from pathlib import Path\n"
        "from diptych import ranks\n"
        "from diptych.embed.cache import FeatureCache\n"
        "from diptych.evaluate.models import features\n"
        "from diptych.evaluate.models.open import clip_image_model\n"
        "from diptych.evaluate.datasets.registry import Place\n"
        "from diptych.evaluate.datasets.layouts import open_samples\n"
        "from samples import TINY_VIT, make_loaded\n"
        "features.CHUNK = 5\n"
        "root, job = Path(sys.argv[1]), ranks.connect(60, 'cpu')\n"
        "cache = FeatureCache(root / f'cache{job.rank}')\n"
        "ours = features.Embedder(clip_image_model(make_loaded(TINY_VIT), 'exact'), cache, 4, job)\n"
        "seen = []\n"
        "found = ours.embed(open_samples(Place(), root / 'shapes', 'test', 'single'), on_pictures=seen.append)\n"
        "torch.save((found.pooled, found.kept, sum(seen)), root / f'rank{job.rank}.pt')\n"
        "ranks.disconnect(job)\n"
    )
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(jobs.free_port())}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env={**env, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    counts = []
    for rank in range(2):
        pooled, kept, seen = torch.load(tmp_path / f"rank{rank}.pt")
        torch.testing.assert_close(pooled, alone.pooled, atol=1e-6, rtol=0)
        assert kept == alone.kept
        counts.append(seen)
    assert counts == [14, 10]
