import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_build import PICTURES, write_coco, write_compressed, write_pictures

from diptych.cli import main
from diptych.shards.dataset import load_dataset
from samples import COLOURS, write_samples, write_tar

PAGE = (Path(__file__).parents[2] / "docs/own-data.md").read_text("utf-8")


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_a_newcomer_needs_two_commands(tmp_path, capsys):
    write_pictures(tmp_path)
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption", *(f"{c}.jpg,a {c} dot" for c in COLOURS)]))
    assert call("shards", "build", tmp_path / "pairs.csv", "--out", tmp_path / "shards") == 0
    said = capsys.readouterr().out
    assert "CSV with commas, 8 samples; pictures: image, captions: caption" in said
    assert "8 samples of 8 in 1 shard" in said
    arguments = ["--out", tmp_path / "run", "--steps", 2, "--warmup", 1, "--batch-size", 4, "--device", "cpu"]
    assert call("train", "RN-Ti", "--data", tmp_path / "shards", *arguments) == 0
    assert "step 2, 8 pairs seen" in capsys.readouterr().out


def test_training_takes_a_csv_or_a_folder_of_pairs_as_it_is(tmp_path, capsys, monkeypatch):
    from diptych.cli.shards import open_data

    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path / "cache"))
    write_pictures(tmp_path / "in")
    (tmp_path / "in/pairs.csv").write_text("image,caption\nred.jpg,red\nblue.jpg,blue\nnone.jpg,none\n")
    (source,) = open_data((f"{tmp_path}/in/pairs.csv@0.5",))
    said = capsys.readouterr().out
    assert "shards are made of" in said
    assert "left out: missing 1" in said
    assert (source.weight, len(load_dataset(source.path))) == (0.5, 2)
    assert open_data((f"{tmp_path}/in/pairs.csv@0.5",)) == (source,)
    assert "shards are made of" not in capsys.readouterr().out
    (tmp_path / "in/red.jpg").write_bytes(PICTURES["gray.jpg"] + b" ")  # a changed picture is another dataset
    (other,) = open_data((f"{tmp_path}/in/pairs.csv",))
    assert other.path != source.path
    assert next(load_dataset(other.path).pairs).image == PICTURES["gray.jpg"] + b" "
    (tmp_path / "in/pairs.csv").unlink()
    for name in PICTURES:
        (tmp_path / "in" / name).with_suffix(".txt").write_text(name[:-4])
    (folder,) = open_data((str(tmp_path / "in"),))
    assert len(load_dataset(folder.path)) == 8


def test_training_names_the_command_for_what_it_does_not_convert(tmp_path, capsys, monkeypatch):
    pq.write_table(pa.table({"image": list(PICTURES.values()), "text": list(PICTURES)}), tmp_path / "pairs.parquet")
    arguments = ["--out", tmp_path / "run", "--device", "cpu"]
    assert call("train", "RN-Ti", "--data", tmp_path / "pairs.parquet", *arguments) == 2
    assert f"once: diptych shards build {tmp_path}/pairs.parquet --out shards" in capsys.readouterr().err
    (tmp_path / "pairs.csv").write_text("image,caption\nred.jpg,red\n")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert call("train", "RN-Ti", "--data", tmp_path / "pairs.csv", *arguments) == 2
    assert "several processes would all convert it" in capsys.readouterr().err


def test_check_reads_everything_and_counts_what_it_finds(tmp_path, capsys):
    write_samples(tmp_path / "data", 20, samples_per_shard=10)
    assert call("shards", "check", tmp_path / "data") == 0
    assert "20 samples = 20 usable\n" in capsys.readouterr().out
    index = load_dataset(tmp_path / "data").shards[1].table.to_pylist()
    with open(tmp_path / "data/00001.tar", "r+b") as tar:
        tar.seek(index[3]["offset"] + index[3]["size"] // 2)
        tar.write(b"damaged!")
    some = [("a.jpg", PICTURES["red.jpg"]), ("a.txt", b"red"), ("b.jpg", PICTURES["red.jpg"][:300]), ("b.txt", b"b")]
    foreign = write_tar(tmp_path / "foreign.tar", [*some, ("c.jpg", PICTURES["red.jpg"])])
    assert call("shards", "check", tmp_path / "data") == 1
    said = capsys.readouterr().out
    assert "20 samples = 19 usable + changed 1\n" in said
    assert f"  00001.tar {index[3]['key']}: changed" in said
    assert call("shards", "check", foreign) == 1
    said = capsys.readouterr().out
    assert "1 shard, 5 files, " in said
    assert "3 samples = 1 usable + no_caption 1, truncated 1\n" in said


def test_head_prints_samples_and_show_draws_them(tmp_path, capsys):
    evil = '<script>alert("1")</script> \x1b[2J & more'
    some = members("txt", b"a dot")
    some[1:3] = [("red.txt", evil.encode()), ("green.jpg", PICTURES["green.jpg"][:200])]
    tar = write_tar(tmp_path / "a.tar", some)
    assert call("shards", "head", tar, "-n", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("\t") == ["red", "40x40", str(len(PICTURES["red.jpg"])), evil.replace("\x1b", "\\x1b")]
    assert lines[1].split("\t")[0::3] == ["green", "truncated"]
    assert len(lines) == 3
    assert call("shards", "show", tar, "--out", tmp_path / "sheet.html", "--count", 4) == 0
    page = (tmp_path / "sheet.html").read_text("utf-8")
    assert page.count("<figure>") == 4
    assert page.count("data:image/jpeg;base64,") == 4  # red, blue, purple, gray
    assert "<script>" not in page
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;" in page
    assert call("shards", "head", tar, "--count", 0) == 2


def members(suffix, text):
    return [(f"{c}.{end}", data) for c in COLOURS for end, data in (("jpg", PICTURES[f"{c}.jpg"]), (suffix, text))]


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """What the page's commands are about, as people have it."""
    folder = tmp_path_factory.mktemp("things")
    rows = [(f"photos/{c}.jpg", f"a {c} dot") for c in COLOURS]
    for place in ("photos", "train2017"):
        write_pictures(folder / place)
    for name, header, sign in (("pairs.csv", ("image", "caption"), ","), ("train.tsv", ("filepath", "title"), "\t")):
        (folder / name).write_text("\n".join(sign.join(row) for row in [header, *rows]))
    lines = [json.dumps({"image": path.removeprefix("photos/"), "caption": text}) for path, text in rows]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    for path, text in rows:
        (folder / path).with_suffix(".txt").write_text(text)
    write_coco(folder / "annotations/captions_train2017.json")
    image, text = list(PICTURES.values()), [text for _, text in rows]
    pq.write_table(pa.table({"image": image, "caption": text}), folder / "pairs.parquet")
    (folder / "saved/train").mkdir(parents=True)
    table = pa.table({"image": image, "text": text})
    with pa.ipc.new_stream(folder / "saved/train/data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    (folder / "saved/train/state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    (folder / "tars").mkdir()
    for i in range(3):
        write_tar(folder / f"tars/{i:05d}.tar", members("txt", b"a dot"))
    write_compressed(write_tar(folder / "compressed.tar", members("json", b'{"text": "a dot"}')), "gz")
    return folder


COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("diptych shards")
]


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=lambda number: " ".join(COMMANDS[number][2:4]))
def test_every_command_of_the_page_does_what_it_says(things, number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(things)
    command = COMMANDS[number][1:]
    if command[1] != "build":
        write_samples(tmp_path / "shards", 8)
    arguments = [str(tmp_path / word) if word in ("shards", "sheet.html") else word for word in command[1:]]
    assert call("shards", *arguments) == 0
    if command[1] == "build":
        dataset = load_dataset(tmp_path / "shards")
        assert len(dataset) == (24 if "{00000..00002}" in command[2] else 8)
        assert {pair.image for pair in dataset.pairs} == set(PICTURES.values())


def test_the_python_of_the_page_runs(things, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(things / "photos")
    exec(compile(code, "own-data.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "8 {}"
    assert printed[1].startswith("black a photo of black ")


def test_help_of_shards_imports_no_torch():
    script = (
        "import sys; from diptych.cli import main\n"
        "try: main(['shards', 'build', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0
