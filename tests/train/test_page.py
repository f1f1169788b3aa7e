"""report.html, the page that every run's folder ends with."""

import re
import sys
from html.parser import HTMLParser

import pytest

from diptych.checkpoint.formats import native
from diptych.cli import main
from diptych.pair import Pair
from diptych.shards.write import write_shards
from samples import COLOURS, SHAPES, TINY_VIT, draw, make_loaded, make_pairs

pytest.importorskip("matplotlib", reason="the extra `report` is not installed")

NAME = "<b>$\\frac{own$_x"
"""Markup, and what matplotlib would read as a broken formula."""


class Page(HTMLParser):
    """Which tags a page has, where its pictures come from, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.sources, self.text = set[str](), list[str](), ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Shards, of whose captions one is markup, and a set of class folders of a name that is some too."""
    folder = tmp_path_factory.mktemp("page")
    pairs = [Pair(key=p.key, caption=f"<script>{p.caption}", image=p.image, details=p.details) for p in make_pairs(32)]
    write_shards(pairs, folder / "data")
    for shape in SHAPES[:3]:
        (folder / "set" / f"<i>{shape}").mkdir(parents=True)
        for colour in COLOURS[:4]:
            draw(colour, shape).save(folder / "set" / f"<i>{shape}" / f"{colour}.png")
    native.save(folder / "model", make_loaded(TINY_VIT))
    return folder


def finetune(material, out, *more) -> int:
    usual = ["--batch-size", 8, "--steps", 4, "--workers", 0, "--precision", "float32", "--evaluate-every", 2]
    evaluate = ["--evaluate", f"{NAME}={material / 'set'}"]
    return call("finetune", material / "model", "--data", material / "data", "--out", out, *usual, *evaluate, *more)


def test_a_run_ends_with_a_page_that_needs_nothing_else(material, tmp_path, capsys):
    assert finetune(material, tmp_path / "run") == 0
    assert f"report: {tmp_path / 'run' / 'report.html'}" in capsys.readouterr().out
    page = Page((tmp_path / "run/report.html").read_text("utf-8"))
    assert not page.tags & {"script", "b", "i", "link"}
    assert all(source.startswith("data:image/") for source in page.sources)
    assert sum(source.startswith("data:image/svg") for source in page.sources) == 2
    assert len(page.sources) == 2 + 8 + 8 + 12  # figures, the sheet, rows of the matrix, answers
    for part in (
        *("32 pairs seen in 4 steps", "How it learned", f"{NAME}/acc1", "at step 0", "at step 4"),
        *(
            f"{NAME}: right and wrong",
            "<i>square",
            "Training pairs",
            "< script > a ",
            "The diagonal",
            "optim.lr",
            "1e-05",
        ),
    ):
        assert part in page.text, part


def test_a_run_that_goes_on_tells_the_whole_and_a_finished_one_keeps_its_page(material, tmp_path, capsys):
    path = tmp_path / "run/report.html"
    assert finetune(material, tmp_path / "run") == 0
    before = path.read_bytes()
    assert finetune(material, tmp_path / "run") == 0
    assert path.read_bytes() == before  # nobody was asked again: the answers would be gone
    assert finetune(material, tmp_path / "run", "--extend-to", 6) == 0
    text = Page(path.read_text("utf-8")).text
    assert "at step 0" in text
    assert "at step 6" in text
    path.unlink()
    assert finetune(material, tmp_path / "run", "--extend-to", 6) == 0
    assert "at step 6" in path.read_text("utf-8")


def test_a_page_that_cannot_be_written_costs_no_run(material, tmp_path, capsys):
    (tmp_path / "run/report.html").mkdir(parents=True)
    assert finetune(material, tmp_path / "run") == 0
    captured = capsys.readouterr()
    assert "warning: report.html was not written: " in captured.err
    assert "checkpoint: " in captured.out


def test_without_matplotlib_the_page_has_everything_but_the_curves(material, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "diptych.report.draw", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert finetune(material, tmp_path / "run") == 0
    page = Page((tmp_path / "run/report.html").read_text("utf-8"))
    assert "Drawn where matplotlib is installed" in page.text
    assert "Training pairs" in page.text


def test_wise_ft_draws_its_curve_and_shows_what_the_best_model_says(material, tmp_path, capsys):
    native.save(tmp_path / "tuned", make_loaded(TINY_VIT, seed=1))
    evaluate = ["--evaluate", f"{NAME}={material / 'set'}"]
    assert call("wise-ft", material / "model", tmp_path / "tuned", *evaluate, "--out", tmp_path / "out") == 0
    page = Page((tmp_path / "out/report.html").read_text("utf-8"))
    best = re.search(r"best: alpha (\S+)", capsys.readouterr().out)
    assert best is not None
    assert f"The best alpha is {best[1]}" in page.text
    assert sum(source.startswith("data:image/svg") for source in page.sources) == 1
    assert f"{NAME}: right and wrong" in page.text


def test_a_long_curve_is_thinned_to_means():
    from diptych.train.page import MARKS, _thin

    marks = _thin([(float(step), 2.0 * step) for step in range(100_000)])
    assert len(marks) == MARKS
    assert (marks[0].x, marks[0].y) == (124.5, 249.0)
