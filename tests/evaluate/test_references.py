"""The tables of published numbers: complete, under our ids, and never without their provenance."""

import pytest

from diptych.errors import UsageError
from diptych.evaluate.references import (
    KORNBLITH12,
    PAPER27,
    PAPER_MODELS,
    SHIFTS,
    caveats,
    check_name,
    compare,
    load_caveats,
    load_references,
    published_name,
    reference,
)
from diptych.evaluate.results import ModelFacts, Result

# averages that the tables were published with, rounded to one digit
MEAN27 = {
    "zeroshot": (54.7, 56.2, 57.9, 61.5, 66.1, 57.9, 61.0, 66.8, 67.6),
    "probe": (75.8, 77.4, 78.6, 81.1, 83.0, 78.1, 80.9, 84.2, 85.1),
}
MEAN12 = {
    "zeroshot": (60.2, 63.0, 65.5, 68.8, 72.1, 66.0, 68.7, 75.0, 75.5),
    "probe": (78.3, 80.5, 82.6, 84.8, 87.0, 81.5, 84.9, 88.5, 89.1),
}


def facts(source, name="mine"):
    return ModelFacts(name=name, source=source, space="0", embed_dim=1, image_size=1)


@pytest.mark.parametrize("protocol", ["zeroshot", "probe"])
@pytest.mark.parametrize("number", range(9))
def test_the_tables_have_the_paper_s_averages(protocol, number):
    for datasets, means in ((PAPER27, MEAN27), (KORNBLITH12, MEAN12)):
        values = [reference(d, PAPER_MODELS[number], protocol, profile="paper")[0].value for d in datasets]
        assert 100 * sum(values) / len(values) == pytest.approx(means[protocol][number], abs=0.051)


def test_as_many_cells_are_confirmed_as_were_found_in_public_text():
    def count(protocol):
        cells = [
            r for r in load_references() if r.protocol == protocol and r.profile == "paper" and r.dataset in PAPER27
        ]
        cells = [r for r in cells if r.model in PAPER_MODELS]
        return sum(r.confirmed for r in cells), len(cells)

    assert count("zeroshot") == (59, 243)
    assert count("probe") == (18, 243)


def test_figure_5_agrees_with_table_11():
    """What the deltas imply of ResNet-50 is what OpenAI answered about VOC, and 16 of 27 are positive."""
    deltas = {r.dataset: r for r in load_references() if r.protocol == "zeroshot_minus_resnet50_probe"}
    assert set(deltas) == set(PAPER27)
    assert sum(delta.value > 0 for delta in deltas.values()) == 16
    assert sum(delta.confirmed for delta in deltas.values()) == 12
    [ours] = reference("voc2007", "ViT-L-14-336/openai", "zeroshot", profile="paper")
    [theirs] = reference("voc2007", "ResNet-50", "probe")
    assert ours.value - deltas["voc2007"].value == pytest.approx(theirs.value)


def test_all_shifts_have_a_zero_shot_number_and_no_case_has_two():
    for shift in SHIFTS:
        protocol = "temporal" if shift in ("imagenet_vid_robust", "ytbb_robust") else "zeroshot"
        assert reference(shift, "ViT-L-14-336/openai", protocol, profile="paper"), shift
    cases = [(r.dataset, r.model, r.protocol, r.profile, r.metric) for r in load_references()]
    assert len(cases) == len(set(cases))


def test_every_dataset_of_a_caveat_has_numbers():
    known = {r.dataset for r in load_references()} | {"flickr8k"}
    assert {caveat.dataset for caveat in load_caveats()} <= known
    assert {caveat.kind for caveat in load_caveats()} == {"nobody", "protocol", "degenerate"}


def test_rows_that_nobody_reproduces_are_known():
    for dataset in ("cifar100", "fgvc_aircraft", "mnist", "kitti_distance"):
        assert "nobody" in {c.kind for c in caveats(dataset, "ViT-B-32/openai", "zeroshot")}, dataset
    assert "nobody" in {c.kind for c in caveats("cifar10", "RN50/openai", "zeroshot")}
    assert caveats("cifar10", "RN101/openai", "zeroshot") == []
    assert caveats("mnist", "ViT-B-32/laion2b_s34b_b79k", "zeroshot") == []
    assert {c.kind for c in caveats("sun397", "RN50/openai", "zeroshot")} == {"protocol"}


def test_a_result_is_compared_with_the_number_of_its_own_profile():
    mine = {
        "model": "mine",
        "dataset": "food101",
        "protocol": "zeroshot",
        "metric": "acc1",
        "value": 0.842,
        "images": 9,
    }
    paper = compare(Result(**mine), "ViT-B-32/openai")
    other = compare(Result(**mine, profile="clip_benchmark"), "ViT-B-32/openai")
    assert paper
    assert other
    assert (paper.reference.value, paper.comparable, paper.reference.confirmed) == (pytest.approx(0.844), True, True)
    assert paper.delta == pytest.approx(-0.002)
    assert (other.reference.value, other.comparable) == (pytest.approx(0.840), True)
    laion = compare(Result(**mine), "ViT-B-32/laion2b_s34b_b79k")
    assert laion
    assert not laion.comparable


def test_another_metric_is_never_compared():
    result = Result(model="m", dataset="oxford_pets", protocol="zeroshot", metric="acc1", value=0.5, images=9)
    assert compare(result, "RN50/openai") is None
    both = Result(**{**vars(result), "metrics": {"mean_per_class_recall": 0.4}})
    found = compare(both, "RN50/openai")
    assert found
    assert found.delta == pytest.approx(0.4 - 0.854)
    assert compare(result, None) is None


def test_a_model_is_known_by_what_it_was_loaded_from_not_by_its_name():
    assert published_name(facts("ViT-B-32/openai")) == "ViT-B-32/openai"
    assert published_name(facts("hf-hub:timm/vit_base_patch32_clip_224.openai")) == "ViT-B-32/openai"
    assert published_name(facts("runs/demo", name="RN50")) is None


def test_an_unknown_published_model_is_refused_with_a_suggestion():
    assert check_name("RN50/openai") == "RN50/openai"
    with pytest.raises(UsageError, match="did you mean RN50/openai"):
        check_name("RN50-openai")
