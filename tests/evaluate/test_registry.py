from itertools import chain

import pytest

from diptych.errors import DatasetError, NotFoundError, UsageError
from diptych.evaluate.datasets.registry import (
    OWN,
    SUITES,
    Dataset,
    Profile,
    known_datasets,
    load_dataset_entry,
    load_own,
    load_suite,
    match_classes,
    match_names,
)
from diptych.templates import fill_template, load_templates

PAPER = [load_dataset_entry(name) for name in known_datasets() if "paper27" in load_dataset_entry(name).suites]


def test_the_suites_have_what_the_paper_evaluates():
    assert {name: len(load_suite([name])) for name in SUITES} == {
        "paper27": 27,
        "kornblith12": 12,
        "shifts": 8,  # the seven, and ImageNet, which they are held against
        "retrieval": 3,
        "clip_benchmark": 41,  # all of its webdatasets.txt
        "made": 3,
    }


def test_classes_and_templates_have_the_counts_of_the_paper():
    counts = {entry.id: (len(entry.classes), len(entry.resolve("paper").templates)) for entry in PAPER}
    assert counts == {
        "birdsnap": (500, 1), "caltech101": (102, 34), "cifar10": (10, 18), "cifar100": (100, 18),
        "clevr_counts": (8, 1), "country211": (211, 5), "dtd": (47, 8), "eurosat": (10, 3), "fer2013": (7, 6),
        "fgvc_aircraft": (100, 2), "flowers102": (102, 1), "food101": (101, 1), "gtsrb": (43, 3),
        "hateful_memes": (2, 1), "imagenet": (1000, 80), "kinetics700": (700, 28), "kitti_distance": (4, 1),
        "mnist": (10, 1), "oxford_pets": (37, 1), "pcam": (2, 1), "rendered_sst2": (2, 1), "resisc45": (45, 18),
        "stanford_cars": (196, 8), "stl10": (10, 2), "sun397": (397, 2), "ucf101": (101, 48), "voc2007": (20, 1),
    }  # fmt: skip


def test_metrics_are_those_of_the_paper():
    special = {entry.id: entry.metric for entry in PAPER if entry.metric != "acc1"}
    assert special == {
        **dict.fromkeys(("caltech101", "fgvc_aircraft", "flowers102", "oxford_pets"), "mean_per_class_recall"),
        "hateful_memes": "roc_auc",
        "kinetics700": "mean_top1_top5",
        "voc2007": "map_11_point",
    }


@pytest.mark.parametrize("name", known_datasets())
def test_every_entry_can_be_used_in_both_profiles(name):
    entry = load_dataset_entry(name)
    for profile in ("paper", "clip_benchmark"):
        used = entry.resolve(profile)
        assert sorted(used.order) == list(range(len(entry.classes)))
        assert all(fill_template(template, "x") for template in used.templates)
        assert all(name or name == "" for name in chain.from_iterable(used.names))
    assert entry.title
    assert entry.licence


def test_only_imagenet_has_classes_of_the_same_name():
    for name in known_datasets():
        entry = load_dataset_entry(name)
        flat = [one for names in entry.names for one in names]
        twice = {one for one in flat if flat.count(one) > 1}
        assert twice == ({"sunglasses", "missile"} if entry.class_list == "imagenet" and not entry.subset else set())


def test_profiles_match_labels_by_name_not_by_place():
    used = load_dataset_entry("clevr_counts").resolve("clip_benchmark")
    assert used.names[0] == ("three",)
    assert [used.dataset.classes[i] for i in used.order] == ["3", "4", "5", "6", "7", "8", "9", "10"]
    pets = load_dataset_entry("oxford_pets").resolve("clip_benchmark")
    spelled = [str(pets.dataset.classes[i]).lower() for i in pets.order]
    assert spelled == [names[0].lower() for names in pets.names]
    assert list(pets.order) != sorted(pets.order)


def test_sources_with_other_orders_and_spellings_are_matched():
    entry = load_dataset_entry("eurosat")
    found = ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop",
             "Residential", "River", "SeaLake"]  # fmt: skip
    order = match_classes(entry, found)
    assert [entry.classes[i] for i in order][:3] == ["annual crop land", "forest", "brushland or shrubland"]
    imagenet = load_dataset_entry("imagenet")
    assert match_classes(imagenet, sorted(imagenet.ids)) == list(range(1000))
    assert match_classes(imagenet, [names[0] for names in imagenet.names]) == list(range(1000))
    by_number = match_classes(load_dataset_entry("imagenet_v2"), sorted(map(str, range(1000))))
    assert by_number[:3] == [0, 1, 10]
    assert match_names(load_dataset_entry("fer2013"), ["Happiness", "smiling"]) == {"Happiness": 3, "smiling": 3}


def make_entry(*classes: str) -> Dataset:
    return Dataset(id="mine", title="mine", metric="acc1", classes=classes, profiles={OWN: Profile()})


@pytest.mark.parametrize(
    ("classes", "found", "order"),
    [
        (("C", "C++", "C#"), ["C", "C#", "C++"], [0, 2, 1]),
        (("C", "C++", "C#"), ["c", "c#", "c++"], [0, 2, 1]),
        (("\u304b", "\u304c"), ["\u304b\u3099", "\u304b"], [1, 0]),  # Japanese ka and ga, the second in two signs
        (("-1", "1", "+1"), ["+1", "-1", "1"], [2, 0, 1]),
        (("Polish", "polish"), ["polish", "Polish"], [1, 0]),
        (("crane", "crane", "dog"), ["crane", "dog", "crane"], [0, 2, 1]),
    ],
)
def test_classes_that_differ_by_signs_or_case_alone_are_told_apart(classes, found, order):
    entry = make_entry(*classes)
    assert match_classes(entry, found) == order
    if len(set(classes)) == len(classes):
        assert match_names(entry, found) == dict(zip(found, order, strict=True))


def test_a_spelling_that_fits_several_classes_is_refused():
    with pytest.raises(DatasetError, match="other classes"):
        match_classes(make_entry("C", "C++"), ["c_", "C++"])
    with pytest.raises(DatasetError, match="'POLISH' names several classes"):
        match_names(make_entry("Polish", "polish"), ["POLISH"])


def test_other_classes_are_named():
    entry = load_dataset_entry("cifar10")
    names = [str(name) for name in entry.classes]
    with pytest.raises(DatasetError, match=r"9 classes, the registry 10; it lacks 'truck'"):
        match_classes(entry, names[:-1])
    with pytest.raises(DatasetError, match=r"only the source has 'lorry'; it lacks 'truck'"):
        match_classes(entry, [*names[:-1], "lorry"])
    with pytest.raises(DatasetError, match="other classes"):
        match_classes(entry, [*names[:-1], names[0]])
    with pytest.raises(DatasetError, match="'lorry' is no class"):
        match_names(entry, ["cat", "lorry"])


def test_counts_that_belong_to_another_profile_are_named():
    sun = load_dataset_entry("sun397").resolve("paper")
    sun.expect("test", 19850)
    sun.expect("val", 5)
    with pytest.raises(DatasetError, match=r"108,754 pictures, the profile paper says 19,850; .* profile clip_benchm"):
        sun.expect("test", 108754)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("titel = 'x'", "unknown key in Dataset 'titel'; did you mean title"),
        ("kind = 'sngle'", "unknown kind 'sngle'; did you mean single"),
        ("metric = 'pm0'", "unknown metric of kind single"),
        ("classes = ['a', 5]", "not one of the values"),
        ("classes = ['a', []]", "a class without a name"),
        ("classes = ['a', 'b']\nprofiles.p.classes = ['a']", "profile p has 1 classes, the dataset 2"),
        ("profiles.p.splits.test = 'many'", "counts of pictures"),
        ("profiles.p.tmplates = ['{}']", "unknown key in Profile"),
        ("profiles.p.templates = 'imagenet_8'", "unknown template list 'imagenet_8'; did you mean imagenet_80"),
        ("classes = ['a', 'b']\naliases.c = 'd'", "unknown class that alias 'c' stands for"),
        ("class_list = 'nothing'", "no list of classes"),
        ("class_list = 'imagenet'\nsubset = [3, 2]", "rising numbers"),
        ("suites = ['paper']", "unknown suite"),
        ("id = 'x'", "no key"),
        ("metric = 'roc_auc'\nclasses = ['a', 'b', 'c']", "two classes"),
        ("title = ", "is no TOML"),
        ("data.layuot = 'wds'", "unknown key in Place 'layuot'; did you mean layout"),
        ("data.layout = 'wsd'", "not one of the values"),
    ],
)
def test_a_toml_that_is_wrong_says_where(tmp_path, text, reason):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UsageError, match=reason) as error:
        load_own(tmp_path / "mine.toml").resolve("paper").templates
    assert "templates" in text or str(tmp_path / "mine.toml") in str(error.value)


def test_suites_are_named_and_may_be_files(tmp_path):
    (tmp_path / "mine.toml").write_text("classes = ['a', 'b']")
    (tmp_path / "suite.toml").write_text("datasets = ['mnist', 'mine.toml']")
    assert [entry.id for entry in load_suite([str(tmp_path / "suite.toml"), "mnist"])] == ["mnist", "mine"]
    (tmp_path / "mnist.toml").write_text("")
    with pytest.raises(UsageError, match="two datasets are called mnist"):
        load_suite(["mnist", str(tmp_path / "mnist.toml")])
    with pytest.raises(UsageError, match="did you mean paper27"):
        load_suite(["paper72"])
    with pytest.raises(NotFoundError, match=r"no such file: .*other\.toml"):
        load_suite([str(tmp_path / "other.toml")])
    (tmp_path / "bad.toml").write_text("datasets = ['mnist']\ntitle = 'x'")
    with pytest.raises(UsageError, match="and nothing else"):
        load_suite([str(tmp_path / "bad.toml")])


def test_imagenet_80_is_the_list_of_the_zero_shot_room():
    assert load_dataset_entry("imagenet").resolve("paper").templates == load_templates("imagenet_80")
