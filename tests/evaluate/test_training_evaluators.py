import json
from collections import Counter
from pathlib import Path

import jobs
import pytest
import torch
from exams import write_captions, write_shapes

from diptych.cli import main
from diptych.cli.training import build_evaluators, check_keep_best
from diptych.embed.images import embed_images
from diptych.embed.texts import embed_texts
from diptych.errors import NotFoundError, UsageError
from diptych.evaluate import training_evaluators
from diptych.evaluate.metrics.measures import accuracy, mean_per_class_recall, retrieval
from diptych.zeroshot import ZeroShotClassifier
from samples import COLOURS, SHAPES, TINY_VIT, draw, encode, make_loaded, make_pairs, write_samples, write_tar


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_samples(tmp_path_factory.mktemp("data") / "shards")


def folders(path: Path) -> Path:
    for shape in ("circle", "dot", "round_ring"):
        (path / shape).mkdir(parents=True)
        for colour in ("red", "green"):
            (path / shape / f"{colour}.jpg").write_bytes(encode(draw(colour, shape.removeprefix("round_"))))
    return path


def ask(spec: str, **options) -> tuple[training_evaluators.TrainingEvaluator, dict[str, float]]:
    loaded = make_loaded(TINY_VIT)
    (evaluator,) = build_evaluators((spec,), loaded.tokenizer, loaded.preprocess, **options)
    return evaluator, evaluator(loaded.model)


def test_class_folders_give_what_the_classifier_gives(tmp_path):
    evaluator, values = ask(f"shapes={folders(tmp_path / 'set')}", templates=("a drawing of {}.", "{}"))
    assert evaluator.exam.classnames == ("circle", "dot", "round ring")
    loaded = make_loaded(TINY_VIT)
    classifier = ZeroShotClassifier(loaded, evaluator.exam.classnames, ("a drawing of {}.", "{}"))
    files = [tmp_path / "set" / key for key in evaluator.exam.samples.keys]
    scores = torch.from_numpy(classifier.decision_function(files))
    target = torch.tensor([0, 0, 1, 1, 2, 2])
    assert values["shapes/acc1"] == accuracy(scores, target)
    assert values["shapes/acc5"] == 1.0
    assert tuple(values) == evaluator.metrics


def test_labelled_shards_are_zero_shot_and_retrieval_when_asked(data):
    evaluator, values = ask(f"a={data}")
    assert (evaluator.exam.protocol, len(evaluator.exam.classnames), values["a/images"]) == ("zeroshot", 8, 64)
    evaluator, values = ask(f"a=retrieval:{data}")
    loaded, pairs = make_loaded(TINY_VIT), make_pairs()
    images, texts = (
        embed_images(loaded, [p.image for p in pairs]),
        embed_texts(loaded, [p.caption for p in pairs], precision="exact"),
    )
    expected = retrieval(images, texts)
    assert {name.removeprefix("a/"): value for name, value in values.items() if "@" in name} == pytest.approx(expected)


def test_several_captions_of_an_image_are_alternatives():
    image = torch.eye(3)
    text = torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])  # the first caption of image 0 is wrong
    found = retrieval(image, text, ks=(1,), image_of_text=torch.tensor([0, 0, 1, 2]))
    assert found["text_retrieval_recall@1"] == pytest.approx(2 / 3)  # image 1: the wrong caption stands before its own
    assert found["image_retrieval_recall@1"] == pytest.approx(3 / 4)


def test_captions_of_the_json_are_counted_each(tmp_path):
    details = json.dumps({"captions": ["red thing", "a circle"]}).encode()
    picture = encode(draw("red", "circle"))
    tar = write_tar(tmp_path / "a.tar", [("x.jpg", picture), ("x.txt", b"red"), ("x.json", details)])
    evaluator, values = ask(f"a={tar}")
    assert evaluator.exam.samples.labels == [("red thing", "a circle")]
    assert values["a/image_retrieval_recall@1"] == 1.0


def test_rare_classes_count_like_common_ones():
    scores = torch.eye(2)[[0, 0, 0, 0]]
    assert mean_per_class_recall(scores, torch.tensor([0, 0, 0, 1])) == 0.5


def test_the_webdataset_layout_of_clip_benchmark_is_read(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "classnames.txt").write_text("a circle\na dot\n")
    circle, dot = encode(draw("red", "circle")), encode(draw("red", "dot"))
    members = [
        ("s0.cls", b"0"),
        ("s0.jpg", circle),
        ("s1.cls", b"1\n"),
        ("s1.jpg", dot),
        ("s2.cls", b"7"),
        ("s2.jpg", dot),
    ]
    write_tar(tmp_path / "test/0.tar", members)
    evaluator, values = ask(f"a={tmp_path}")
    assert evaluator.exam.classnames == ("a circle", "a dot")
    assert evaluator.exam.classes.numbers == ((0,), (1,))
    assert evaluator.exam.samples.skipped == Counter(bad_label=1)
    assert values["a/images"] == 2


def test_a_set_is_the_same_for_training_and_for_evaluation(tmp_path):
    """The layouts of `diptych evaluate`, its names of splits, and its labels."""
    for split in ("train", "test"):
        folders(tmp_path / "set" / split)
    evaluator, values = ask(f"a={tmp_path / 'set'}")
    assert (evaluator.exam.classnames, values["a/images"]) == (("circle", "dot", "round ring"), 6)
    (tmp_path / "csv").mkdir()
    lines = [f"{tmp_path}/set/test/{shape}/red.jpg,a {shape}" for shape in ("circle", "dot")]
    (tmp_path / "csv" / "test.csv").write_text("\n".join(["image,label", *lines]))
    evaluator, values = ask(f"a={tmp_path / 'csv'}")
    assert (evaluator.exam.classnames, values["a/images"]) == (("a circle", "a dot"), 2)
    evaluator, values = ask(f"a={write_captions(tmp_path / 'captions')}")
    assert (evaluator.exam.protocol, values["a/images"]) == ("retrieval", 16)


def test_damage_is_counted_in_training(tmp_path):
    """A shard that breaks off, one that is missing, a folder without nshards.txt: the rest is asked."""
    whole = write_shapes(tmp_path / "a", shards=3)
    tar = whole / "test" / "1.tar"
    tar.write_bytes(tar.read_bytes()[:6000])
    (whole / "test" / "2.tar").unlink()
    evaluator, values = ask(f"a={whole}")
    assert evaluator.exam.samples.skipped == Counter(truncated=1, no_image=1, missing_shard=1)
    assert values["a/images"] == len(evaluator.exam.samples) > 8
    (whole / "test" / "nshards.txt").unlink()
    assert ask(f"a={whole}")[0].exam.samples.skipped == Counter(truncated=1, no_image=1)


def test_shards_that_lie_beside_classnames_are_a_test_split(tmp_path):
    whole = write_shapes(tmp_path / "a")
    for file in (whole / "test").iterdir():
        file.rename(whole / file.name)
    (whole / "test").rmdir()
    assert ask(f"a={whole}")[1]["a/images"] == 24


def test_labels_that_are_numbers_without_names_are_refused(tmp_path):
    members = [("x.jpg", encode(draw("red", "circle"))), ("x.txt", b"red"), ("x.json", b'{"label": 3}')]
    tar = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UsageError, match=r"labels are numbers, and nothing says what they are called.*retrieval:"):
        ask(f"a={tar}")
    assert ask(f"a=retrieval:{tar}")[1]["a/images"] == 1


@pytest.mark.parametrize("threads", [1, 2])
def test_a_model_in_training_is_evaluated_with_all_its_threads(data, threads, monkeypatch):
    """A thread that begins after the reading ones would have one core: slower, and compiled once more."""
    loaded, seen = make_loaded(TINY_VIT), set()
    (evaluator,) = build_evaluators((f"a={data}",), loaded.tokenizer, loaded.preprocess)
    monkeypatch.setattr(training_evaluators, "BATCH_SIZE", 8)
    encode_image = loaded.model.encode_image
    monkeypatch.setattr(
        loaded.model, "encode_image", lambda *a, **b: (seen.add(torch.get_num_threads()), encode_image(*a, **b))[1]
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        evaluator(loaded.model)
        assert (seen, torch.get_num_threads()) == ({threads}, threads)
    finally:
        torch.set_num_threads(before)


def test_broken_pictures_are_counted_and_left_out(tmp_path):
    whole = folders(tmp_path / "set")
    (whole / "dot" / "cut.jpg").write_bytes(encode(draw("red", "dot"))[:300])
    (whole / "dot" / "empty.png").write_bytes(b"")
    evaluator, values = ask(f"a={whole}")
    assert (values["a/images"], values["a/skipped"]) == (6, 2)
    assert evaluator.broken == Counter(truncated=1, empty=1)
    for file in whole.rglob("*.*"):
        file.unlink()
    assert evaluator(make_loaded(TINY_VIT).model)["a/skipped"] == 8
    assert evaluator.broken == Counter(missing=8)


@pytest.mark.parametrize(("spec", "error"), [
    ("a=no/such/folder", NotFoundError),
    ("a={empty}", UsageError),
    ("no/name", UsageError),
    ("a/b={empty}", UsageError),
])  # fmt: skip
def test_a_set_that_cannot_be_used_is_refused_before_training(data, tmp_path, spec, error, capsys):
    spec = spec.format(empty=tmp_path)
    with pytest.raises(error):
        ask(spec)
    command = ["train", "ViT-Ti-16", "--data", str(data), "--out", str(tmp_path / "run"), "--evaluate", spec]
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert not (tmp_path / "run").exists()


def test_a_misspelled_keep_best_is_refused(data, tmp_path, capsys):
    evaluator, _ = ask(f"a={data}")
    check_keep_best("a/acc1", [evaluator])
    with pytest.raises(UsageError, match="unknown keep_best metric 'a/acc'; did you mean"):
        check_keep_best("a/acc", [evaluator])
    command = ["train", "ViT-Ti-16", "--data", str(data), "--out", str(tmp_path / "run"), "--keep-best", "a/acc1"]
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert "add --evaluate" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def evaluations(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["evaluation"] for line in lines if "evaluation" in line]


def test_two_ranks_give_the_numbers_of_one(data, tmp_path):
    many = tmp_path / "many"
    for size in (40, 50, 60):  # 192 pictures in three batches, for two ranks
        for colour in COLOURS:
            for shape in SHAPES:
                (many / shape).mkdir(parents=True, exist_ok=True)
                (many / shape / f"{colour}{size}.jpg").write_bytes(encode(draw(colour, shape, size)))
    (many / "dot" / "cut.jpg").write_bytes(encode(draw("red", "dot"))[:300])
    specs = (f"a={many}", f"b=retrieval:{data}")
    ask_untrained = "print([e(make_loaded(TINY_VIT).model) for e in evaluators])"
    options = {"steps": 1, "warmup": 0, "evaluate": specs, "on_step": ask_untrained}
    (alone,) = jobs.run(data, tmp_path / "1", 1, **options)
    assert "'a/images': 192.0, 'a/skipped': 1.0" in alone
    assert jobs.run(data, tmp_path / "2", 2, **options) == [alone, alone]


def test_the_best_checkpoint_stays(data, tmp_path):
    out = tmp_path / "run"
    options = {"steps": 8, "checkpoint_every": 1, "evaluate_every": 1, "keep_last": 1, "keep_best": "a/acc1"}
    jobs.run(data, out, 1, evaluate=(f"a={data}",), lr=0.01, **options)
    values = [found["a/acc1"] for found in evaluations(out)]
    best = values.index(max(values)) + 1
    assert {folder.name for folder in out.glob("step_*")} == {f"step_{best:08d}", "step_00000008"}


@pytest.mark.slow
def test_a_run_killed_inside_an_evaluation_ends_with_the_same_bits(data, tmp_path):
    options = {
        "steps": 12,
        "checkpoint_every": 4,
        "evaluate_every": 1,
        "evaluate": (f"a={data}", f"b=retrieval:{data}"),
    }
    jobs.run(data, tmp_path / "straight", 1, **options)
    kill = "import os, threading; report.step == 7 and threading.Timer(0.01, os.kill, (os.getpid(), 9)).start()"
    (process,) = jobs.start(data, tmp_path / "killed", 1, on_step=kill, **options)
    process.communicate(timeout=120)
    assert process.returncode == -9
    assert len(evaluations(tmp_path / "killed")) == 6, "not inside the evaluation"
    jobs.run(data, tmp_path / "killed", 1, **options)
    for name in ("metrics.jsonl", "step_00000012/model.safetensors", "step_00000012/training.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name


def test_all_captions_under_another_name_count(tmp_path):
    details = [{"texts": ["a dot", "a point"]}, {"texts": "a ring"}, {"title": "none"}]
    members = [
        member
        for i, one in enumerate(details)
        for member in ((f"{i}.jpg", encode(draw("red", "dot"))), (f"{i}.json", json.dumps(one).encode()))
    ]
    tar = write_tar(tmp_path / "a.tar", members)
    evaluator, values = ask(f"a={tar}", caption_key="texts")
    assert evaluator.exam.samples.labels == [("a dot", "a point"), ("a ring",)]
    assert evaluator.exam.samples.skipped == {"no_caption": 1}
    assert (evaluator.exam.protocol, values["a/images"]) == ("retrieval", 2.0)


def test_labels_need_no_captions(tmp_path):
    members = [
        member
        for i in range(4)
        for member in (
            (f"{i}.jpg", encode(draw("red", "dot"))),
            (f"{i}.json", json.dumps({"label": "ab"[i % 2]}).encode()),
        )
    ]
    evaluator, values = ask(f"a={write_tar(tmp_path / 'a.tar', members)}")
    assert (evaluator.exam.protocol, values["a/images"]) == ("zeroshot", 4.0)
