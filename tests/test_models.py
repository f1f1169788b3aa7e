import json

import pytest

from diptych.cli import main
from diptych.cli.models import parse_count
from diptych.errors import UsageError


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["models", *map(str, arguments)])
    return caught.value.code


def names(capsys, *arguments) -> set[str]:
    assert call(*arguments, "--json") == 0
    return {one["name"] for one in json.loads(capsys.readouterr().out)["published"]}


def test_every_published_name_and_every_preset_is_listed_in_columns(capsys):
    assert call() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "family", "px", "languages", "parameters", "loads", "where", "it", "lies"]
    (line,) = [line for line in lines if line.startswith("ViT-B-32/openai ")]
    assert line.split() == [
        *("ViT-B-32/openai", "OpenAI", "224", "en", "151M", "yes", "timm/vit_base_patch32_clip_224.openai")
    ]
    (line,) = [line for line in lines if line.startswith("ViT-B-16-SigLIP2-384/")]
    assert line.split()[1:6] == ["SigLIP", "2", "384", "109+", "375M"]
    (line,) = [line for line in lines if line.startswith("171 published, ")]
    assert int(line.split()[2]) >= 70
    assert any(line.split() == ["ViT-Ti-16", "20.9M"] for line in lines)


def test_words_parameters_and_languages_filter(capsys):
    assert names(capsys, "siglip2", "384") == {
        *(f"ViT-{size}-16-SigLIP2-384/webli" for size in ("B", "L", "SO400M", "gopt"))
    }
    assert names(capsys, "openai") >= {"RN50/openai", "ViT-L-14-336/openai"}
    small = names(capsys, "--max-parameters", "100M")
    assert "MobileCLIP2-S0/dfndr2b" in small
    assert "ViT-B-32/openai" not in small
    korean = names(capsys, "--language", "ko")
    assert len(korean) == 31
    assert "ViT-H-14-worldwide/metaclip2_worldwide" in korean
    assert korean < names(capsys, "--language", "English")


def test_what_does_not_load_says_why_by_its_architecture_and_not_by_a_flag(capsys):
    assert call("--json") == 0
    rows = json.loads(capsys.readouterr().out)["published"]
    assert all(("why_not" in one) != one["loads"] for one in rows)
    loads = {one["name"] for one in rows if one["loads"]}
    assert loads >= {"RN50/openai", "ViT-H-14/dfn5b", "ViT-g-14/laion2b_s12b_b42k"}
    (coca,) = [one for one in rows if one["name"] == "coca_ViT-B-32/laion2b_s13b_b90k"]
    assert coca["loads"] or "multimodal_cfg" in coca["why_not"]
    assert names(capsys, "--loadable") == loads


def test_a_filter_that_nothing_passes_is_one_line(capsys):
    assert call("nobody's model") == 2
    assert capsys.readouterr().err == "diptych: no model is like this; `diptych models` without words lists them all\n"


def test_a_number_of_parameters_is_written_as_people_write_it():
    assert (parse_count("200M"), parse_count("1.5b"), parse_count("12000")) == (2e8, 1.5e9, 12000)
    for wrong in ("", "M", "2x", "-1M", "1,5B"):
        with pytest.raises(UsageError, match=r"write 200M or 1\.5B"):
            parse_count(wrong)
