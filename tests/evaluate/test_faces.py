"""The probes of section 7 from pictures to a result, with a small model and drawn pictures."""

import pytest
from recipes.faces import FaceProbe, main

from diptych.checkpoint.layouts import save
from diptych.errors import UsageError
from diptych.evaluate.report.results_table import load_study
from diptych.evaluate.report.tables import build_tables
from diptych.evaluate.results import load_result
from samples import COLOURS, SHAPES, TINY_VIT, draw, encode, make_loaded

RACES = ("White", "Black", "Latino_Hispanic")


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """A model, and twelve pictures in FairFace's layout, of which one is broken and one is not there."""
    folder = tmp_path_factory.mktemp("faces")
    rows = ["file,age,gender,race"]
    for number in range(12):
        picture = draw(list(COLOURS)[number % len(COLOURS)], list(SHAPES)[number % len(SHAPES)])
        (folder / f"{number}.jpg").write_bytes(encode(picture))
        age, gender = ("0-2", "20-29")[number % 2], ("Male", "Female")[number // 6]
        rows.append(f"{number}.jpg,{age},{gender},{RACES[number % 3]}")
    (folder / "3.jpg").write_bytes(b"no picture")
    (folder / "4.jpg").unlink()
    (folder / "table.csv").write_text("\n".join(rows))
    save(make_loaded(TINY_VIT), folder / "model")
    return folder


def probe(faces, out, **fields):
    return FaceProbe(model=str(faces / "model"), table=faces / "table.csv", pictures=faces, out=out, **fields)


def test_faces_become_rates_by_group_with_intervals(faces, tmp_path, capsys):
    result = main(probe(faces, tmp_path, name="tiny"))
    assert "not a reproduction" in capsys.readouterr().out
    assert load_result(tmp_path / "tiny" / "fairface" / "bias.json").details == result.details
    assert (result.images, result.skipped) == (10, {"not_a_picture": 1, "unreadable": 1})
    groups = result.details["groups"]
    assert set(groups) == {
        *("accuracy_of_age", "accuracy_of_gender", "accuracy_of_race"),
        *("non_human", "crime", "non_human_with_child", "crime_with_child"),
    }
    for counted in groups.values():
        assert set(counted) == {"age", "gender", "race", "white"}
        for attribute in counted.values():
            assert sum(rate["pictures"] for rate in attribute.values()) == 10
    race = groups["accuracy_of_race"]
    assert sum(rate["hits"] for rate in race["race"].values()) == round(10 * result.value)
    assert race["white"]["White"] == race["race"]["White"]
    assert groups["crime_with_child"]["race"]["Black"]["hits"] <= groups["crime"]["race"]["Black"]["hits"]
    assert "Latino Hispanic woman" in result.details["classes"]


def test_the_report_shows_them_as_probes(faces, tmp_path):
    main(probe(faces, tmp_path))
    tables = build_tables(load_study(tmp_path))
    assert [table.title for table in tables][-1].startswith("Probe of bias: crime with child")
    assert all("not a reproduction" in table.note for table in tables)


def test_another_folder_is_named(faces, tmp_path):
    with pytest.raises(UsageError, match="none of the 12 files"):
        main(FaceProbe(model=str(faces / "model"), table=faces / "table.csv", pictures=tmp_path, out=tmp_path / "r"))
