"""Other models as baselines: functions, modules of the user, and timm behind its documented interface."""

import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import made_up_results as made
from diptych.embed.images import encode_each
from diptych.errors import DownloadError, PictureError, UsageError
from diptych.evaluate.models.baselines import Baseline, BaselineTower, baseline, describe, is_baseline, load_baseline
from diptych.evaluate.report.figures.size import probe_over_size
from diptych.evaluate.report.results_table import load_study
from diptych.evaluate.results import save_model
from diptych.image import Preprocess

TIMM = """
import types
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.head = nn.Linear(4, num_classes) if num_classes else nn.Identity()

    def forward(self, x):
        return self.head(self.convolution(x).mean(dim=(2, 3)))

def list_models():
    return ["resnet50", "resnet18"]

def is_model(name):
    return name in list_models()

def create_model(name, pretrained=False, num_classes=1000):
    if pretrained and name == "resnet18":
        raise OSError("no network")
    torch.manual_seed(len(name))
    return Tiny(num_classes)

def _resolve(model):
    half = (0.5,) * 3
    return {"input_size": (3, 32, 32), "interpolation": "bicubic", "mean": half, "std": half, "crop_pct": 1.0}

def _transform(input_size, interpolation, mean, std, crop_pct, is_training):
    assert not is_training
    def apply(image):
        import numpy
        small = numpy.asarray(image.resize(input_size[1:]), dtype=numpy.float32) / 255
        return torch.from_numpy((small - mean[0]) / std[0]).permute(2, 0, 1).float()
    return apply

data = types.SimpleNamespace(resolve_model_data_config=_resolve, create_transform=_transform)
"""


@pytest.fixture
def pictures():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(5)]


@pytest.fixture
def timm(tmp_path, monkeypatch):
    """A stand-in module with the part of timm's interface that is documented and used."""
    (tmp_path / "timm.py").write_text(textwrap.dedent(TIMM))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("timm", None)


def average_colour(images):
    return images.mean(dim=(2, 3)).numpy()


def test_a_function_becomes_a_baseline_and_embeds_in_order(pictures):
    found = baseline("colour", average_colour, image_size=32)
    assert isinstance(found, Baseline)
    features = torch.stack(list(encode_each(BaselineTower(found, "cpu"), pictures, 2)))
    preprocess = Preprocess(image_size=32)
    expected = torch.stack([preprocess(picture).mean(dim=(1, 2)) for picture in pictures])
    assert torch.allclose(features, expected, atol=1e-6)


def test_broken_pictures_keep_their_places(pictures):
    tower = BaselineTower(baseline("colour", average_colour, image_size=32), "cpu")
    found = list(encode_each(tower, [pictures[0], b"no picture", pictures[1], b""], 2))
    assert [isinstance(one, PictureError) for one in found] == [False, True, False, True]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda images: images.mean(dim=(2, 3))[:0], r"\[0, 3\] for 1 pictures"),
        (lambda images: images, "for 1 pictures"),
    ],
)
def test_features_that_are_none_are_refused(function, said):
    with pytest.raises(UsageError, match=said):
        BaselineTower(baseline("odd", function, image_size=32), "cpu")


def test_other_weights_or_versions_are_another_space():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5))
    first = baseline("net", module, image_size=4)
    assert first.space == baseline("net", module, image_size=4).space
    with torch.no_grad():
        module[1].bias.add_(1)
    assert first.space != baseline("net", module, image_size=4).space
    versions = {baseline("colour", average_colour, image_size=32, version=version).space for version in "112"}
    assert len(versions) == 2


def test_timm_s_model_comes_without_its_head_with_size_and_operations(timm, pictures):
    found = load_baseline("timm:resnet50")
    assert (found.name, found.image_size, found.parameters) == ("resnet50", 32, 4 * 3 * 3 * 3)
    assert found.gflops == pytest.approx(2 * 4 * 27 * 32 * 32 / 1e9, rel=1e-2)
    features = torch.stack(list(encode_each(BaselineTower(found, "cpu"), pictures)))
    assert features.shape == (5, 4)
    assert found.space != load_baseline("timm:resnet18", pretrained=False).space
    facts = describe(found, "timm:resnet50", 4)
    assert (facts.baseline, facts.embed_dim, facts.source) == (True, 4, "timm:resnet50")


def test_timm_s_errors_are_ours(timm):
    with pytest.raises(UsageError, match="did you mean resnet50"):
        load_baseline("timm:resnet5O")
    with pytest.raises(DownloadError, match="no network"):
        load_baseline("timm:resnet18")


def test_without_timm_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match=r"nms does not exist.*'\.\[timm\]'"):
        load_baseline("timm:resnet50")


def test_a_module_of_the_user_may_hold_a_baseline_or_a_function_that_makes_one(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "from diptych.evaluate.models.baselines import baseline\n"
        "ready = baseline('ready', lambda images: images.mean(dim=(2, 3)), image_size=8)\n"
        "def make():\n    return ready\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_baseline("python:my_models:ready").name == "ready"
    assert load_baseline("python:my_models:make").image_size == 8
    with pytest.raises(UsageError, match="is a int and no baseline"):
        load_baseline("python:my_models:number")
    with pytest.raises(UsageError, match="has no other"):
        load_baseline("python:my_models:other")
    with pytest.raises(UsageError, match="PYTHONPATH"):
        load_baseline("python:not_there_at_all:x")


@pytest.mark.parametrize("source", ["resnet50", "python:module", "python:module:"])
def test_sources_that_name_nothing_are_refused(source):
    with pytest.raises(UsageError, match=r"timm:NAME|MODULE:NAME"):
        load_baseline(source)


def test_baselines_are_told_from_clips():
    assert [is_baseline(source) for source in ("timm:resnet50", "python:a:b", "RN50/openai", "runs/x")] == [
        *(True, True),
        *(False, False),
    ]


def test_a_baseline_stands_beside_clip_in_figure_10(tmp_path, timm):
    found = load_baseline("timm:resnet50")
    save_model(tmp_path, describe(found, "timm:resnet50", 4))
    save_model(tmp_path, made.facts("clip", "runs/clip", 9.0))
    for model, value in (("resnet50", 0.6), ("clip", 0.7)):
        made.save(tmp_path, model, "cifar10", "probe", value, details={"train_images": 9})
    panel = probe_over_size(load_study(tmp_path)).panels[0]
    drawn = {one.name: [(mark.label, mark.y) for mark in one.marks] for one in panel.series[:2]}
    assert drawn == {"CLIP": [("clip", 0.7)], "baselines": [("resnet50", 0.6)]}
