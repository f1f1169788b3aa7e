"""The probes of section 7: counted against numpy, on scores that were made up."""

import numpy as np
import pytest
import torch

from diptych.errors import NotFoundError, UsageError
from diptych.evaluate.metrics import bias
from diptych.evaluate.metrics.measures import wilson_interval

RACES = ("White", "Black", "Indian")


@pytest.fixture(scope="module")
def groups():
    generator = np.random.default_rng(0)
    return {
        "race": [RACES[i] for i in generator.integers(0, 3, 300)],
        "gender": [("Male", "Female")[i] for i in generator.integers(0, 2, 300)],
        "age": [("0-2", "20-29")[i] for i in generator.integers(0, 2, 300)],
    }


def test_accuracies_by_group_are_counted_like_numpy_does(groups):
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(300, 4, generator=generator)
    labels = torch.randint(0, 4, (300,), generator=generator)
    right = (scores.argmax(dim=1) == labels).numpy()
    found = bias.accuracies(scores, labels, groups["race"])
    assert list(found) == sorted(RACES)
    for race in RACES:
        mine = right[np.array(groups["race"]) == race]
        assert (found[race].hits, found[race].pictures) == (mine.sum(), len(mine))
        assert found[race].share == pytest.approx(mine.mean())
        assert found[race].interval == wilson_interval(mine.mean(), len(mine))


def test_white_and_the_others_are_the_paper_s_two_groups():
    assert bias.white_or_not(["White", "Black", "White"]) == ("White", "Non-White", "White")


def test_equal_scores_go_to_the_first_class():
    found = bias.accuracies(torch.zeros(4, 3), torch.tensor([0, 0, 1, 2]), ["a"] * 4)
    assert found["a"].hits == 2


def test_a_class_of_children_takes_answers_from_the_others(groups):
    names = [*(f"{race} person" for race in RACES), *bias.NON_HUMAN, *bias.CRIME, bias.CHILD]
    scores = torch.rand(300, len(names), generator=torch.Generator().manual_seed(2))
    young = torch.tensor([age == "0-2" for age in groups["age"]])
    scores[young, names.index("thief")] += 2
    scores[young, names.index("child")] += 3
    without = bias.denigration(scores, names, groups, with_child=False)
    with_child = bias.denigration(scores, names, groups)
    assert without.crime["age"]["0-2"].share == 1.0
    assert with_child.crime["age"]["0-2"].hits == 0
    assert with_child.non_human["age"]["0-2"].hits == 0

    best = np.array(names[:-1])[scores[:, :-1].argmax(dim=1).numpy()]
    for attribute, of_picture in groups.items():
        for group, rate in without.non_human[attribute].items():
            mine = np.array(of_picture) == group
            assert rate.hits == np.isin(best[mine], bias.NON_HUMAN).sum()
            assert without.crime[attribute][group].hits == np.isin(best[mine], bias.CRIME).sum()
            assert rate.pictures == mine.sum()
    assert with_child.crime["age"]["20-29"].hits <= without.crime["age"]["20-29"].hits


def test_a_probe_whose_classes_were_not_scored_is_refused(groups):
    with pytest.raises(UsageError, match="'animal' was not scored"):
        bias.denigration(torch.zeros(300, 2), ["a", "b"], groups)
    with pytest.raises(UsageError, match="'child' was not scored"):
        bias.denigration(torch.zeros(300, 8), [*bias.NON_HUMAN, *bias.CRIME, "person"], groups)


def test_associations_start_with_the_most_unequal_label():
    probabilities = torch.tensor([[0.1, 0.03, 0.0], [0.1, 0.01, 0.0], [0.1, 0.001, 0.2], [0.1, 0.006, 0.2]])
    groups = ["m", "m", "w", "w"]
    low = bias.associations(probabilities, ["tie", "executive", "hair"], groups)
    assert [(a.label, a.gap) for a in low] == [("hair", 1.0), ("executive", 0.5), ("tie", 0.0)]
    high = bias.associations(probabilities, ["tie", "executive", "hair"], groups, threshold=0.04)
    assert [(a.label, a.gap) for a in high] == [("hair", 1.0), ("executive", 0.0), ("tie", 0.0)]
    assert low[0].rates["w"].interval == wilson_interval(1.0, 2)


@pytest.mark.parametrize(
    ("probabilities", "labels", "threshold", "said"),
    [
        (torch.full((2, 1), 3.0), ["a"], 0.04, "softmax"),
        (torch.zeros(2, 2), ["a"], 0.04, "2 columns and 1 labels"),
        (torch.zeros(2, 1), ["a"], 4.0, "no probability"),
    ],
)
def test_what_are_no_probabilities_is_refused(probabilities, labels, threshold, said):
    with pytest.raises(UsageError, match=said):
        bias.associations(probabilities, labels, ["x", "y"], threshold=threshold)


def test_every_picture_needs_a_group():
    with pytest.raises(UsageError, match="3 answers and 2 groups"):
        bias.rates(torch.zeros(3, dtype=torch.bool), ["a", "b"])


def test_a_table_in_fairface_s_layout_is_read(tmp_path):
    path = tmp_path / "fairface_label_val.csv"
    path.write_text(
        "file,age,gender,race,service_test\nval/1.jpg,3-9,Male,East Asian,False\nval/2.jpg,0-2,Female,White,True\n"
    )
    faces = bias.read_faces(path)
    assert faces.files == ("val/1.jpg", "val/2.jpg")
    assert faces.groups == {"age": ("3-9", "0-2"), "gender": ("Male", "Female"), "race": ("East Asian", "White")}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file,age,gender\n", r"lacks the columns \['race'\]"),
        ("file,age,gender,race\na,1,,White\n", "line 2: gender is empty"),
        ("file,age,gender,race\na,1,M,White\na,1,M,White\n", "names a twice"),
    ],
)
def test_a_table_with_holes_is_refused(tmp_path, text, said):
    path = tmp_path / "faces.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        bias.read_faces(path)


def test_a_table_that_is_not_there_is_named(tmp_path):
    with pytest.raises(NotFoundError, match=r"none\.csv"):
        bias.read_faces(tmp_path / "none.csv")


def test_rates_are_kept_as_json_keeps_them():
    kept = bias.as_details({"race": {"White": bias.Rate(hits=1, pictures=4), "Black": bias.Rate(hits=0, pictures=0)}})
    assert kept["race"]["White"] == {
        "hits": 1,
        "pictures": 4,
        "share": 0.25,
        "interval": list(wilson_interval(0.25, 4)),
    }
    assert kept["race"]["Black"]["interval"] == [0.0, 1.0]
