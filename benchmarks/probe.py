"""The paper's search for a linear probe's penalty, ours beside scikit-learn: 15 fits of 10,000 x 512 with 100 classes.

    .venv/bin/python benchmarks/probe.py            (make bench NAME=probe)
    .venv/bin/python benchmarks/probe.py --rounds 1 --only tight

Features are made up like those of a network: classes around centres that overlap (the best probe gets about 75 % of the
test pictures right), a spectrum that falls off by a power, a mean that all share, norm 10 (as ViT-B/32's embeddings).
Both sides run the same search, on 10,000 pictures and 2,500 for validation, then fit the best strength on all 12,500.
Each figure comes from a new process; what is timed is the search and the last fit, not imports and data.

scikit-learn stands three times: as it comes but for the paper's max_iter (L-BFGS, tol 1e-4, 1,000 steps, float32 as
features are); with a tight tolerance (tol 1e-8, 20,000 steps, float64), where scipy's own test of a falling objective
still ends the weakest penalties early; and with its Newton solver, which gets to the optimum everywhere. Ours is the
same in all rows. Beside the seconds the record says what either side chose, and how far apart the objectives are.
"""

import argparse
import json
import sys
import time
import warnings
from typing import Any

import numpy as np
import torch

import harness
from diptych.evaluate.metrics.measures import accuracy
from diptych.evaluate.probe.logistic import Problem
from diptych.evaluate.probe.search import best_of, linear_probe, search

TRAIN, VAL, TEST, COLUMNS, CLASSES = 10_000, 2_500, 5_000, 512, 100
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"tol": 1e-4, "max_iter": 1000},
    "tight": {"tol": 1e-8, "max_iter": 20_000},
    "newton-cg": {"tol": 1e-12, "max_iter": 1000, "solver": "newton-cg"},
}


def make_features(apart: float = 0.3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Features and labels of training, validation and test pictures."""
    random = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, generator=random, dtype=torch.float64))[0]
    spectrum = (1 + torch.arange(COLUMNS, dtype=torch.float64)) ** -0.5
    centres = torch.randn(CLASSES, COLUMNS, generator=random, dtype=torch.float64) * spectrum
    pictures = TRAIN + VAL + TEST
    labels = torch.randint(CLASSES, (pictures,), generator=random)
    noise = torch.randn(pictures, COLUMNS, generator=random, dtype=torch.float64) * spectrum**0.8
    features = apart * centres[labels] + noise
    features[:, 1] += features.norm(dim=1).mean()
    features = (10 * torch.nn.functional.normalize(features) @ turn).float()
    ends = (0, TRAIN, TRAIN + VAL, pictures)
    return [(features[a:b], labels[a:b]) for a, b in zip(ends, ends[1:], strict=False)]  # noqa: RUF007


def our_search() -> dict[str, Any]:
    """Our whole search in seconds; what it found goes with it."""
    train, val, test = make_features()
    started = time.perf_counter()
    report = linear_probe(*train, *test, classes=CLASSES, val=val)
    seconds = time.perf_counter() - started
    assert report.converged
    return {"s": seconds, "l2": report.l2, "acc1": report.value, **as_values(report.validation)}


def their_search(kind: str) -> dict[str, Any]:
    """The same with scikit-learn; also the objective at every strength, which is not timed."""
    from sklearn.linear_model import LogisticRegression

    warnings.simplefilter("ignore")  # fits that reach max_iter are counted below
    dtype = np.float32 if kind == "default" else np.float64
    train, val, test = [(x.numpy().astype(dtype), y.numpy()) for x, y in make_features()]
    objectives: dict[str, float] = {}
    spent = {"s": 0.0, "steps": 0, "cut_short": 0}

    def fit(l2: float, features: np.ndarray, labels: np.ndarray) -> LogisticRegression:
        model = LogisticRegression(C=1 / l2, **SETTINGS[kind])  # pyright: ignore[reportArgumentType]
        started = time.perf_counter()
        model.fit(features, labels)
        seconds, steps = time.perf_counter() - started, int(model.n_iter_[0])
        print(f"scikit-learn ({kind}): l2 {l2:.6g}, {steps} steps, {seconds:.1f} s", file=sys.stderr, flush=True)
        spent["s"] += seconds
        spent["steps"] += steps
        spent["cut_short"] += int(steps >= SETTINGS[kind]["max_iter"])
        return model

    def score(model: LogisticRegression, features: np.ndarray, labels: np.ndarray) -> float:
        started = time.perf_counter()
        scores = torch.from_numpy(model.decision_function(features))
        value = accuracy(scores, torch.from_numpy(labels))
        spent["s"] += time.perf_counter() - started
        return value

    def try_strength(l2: float) -> float:
        model = fit(l2, *train)
        objectives[f"objective {l2!r}"] = objective(model, *train, l2)
        return score(model, *val)

    tried = search(try_strength)
    l2 = best_of(tried)
    last = fit(l2, *[np.concatenate(pair) for pair in zip(train, val, strict=True)])
    return {**spent, "l2": l2, "acc1": score(last, *test), **as_values(tried), **objectives}


def objective(model: Any, features: np.ndarray, labels: np.ndarray, l2: float) -> float:
    """Sum of losses plus penalty, in float64."""
    weight, bias = torch.from_numpy(model.coef_).double(), torch.from_numpy(model.intercept_).double()
    logits = torch.from_numpy(features).double() @ weight.T + bias
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), reduction="sum")
    return float(loss + l2 / 2 * (weight**2).sum())


def as_values(tried: Any) -> dict[str, float]:
    return {f"value {l2!r}": value for l2, value in tried}


def our_objectives(strengths: list[float]) -> dict[float, float]:
    """The optimum at each strength."""
    features, labels = make_features()[0]
    problem = Problem(features[None], labels[None], CLASSES)
    path = []
    for l2 in sorted(strengths, reverse=True):
        path.append(problem.fit(l2, path))
    return {fit.l2: fit.objective.item() for fit in path}


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """What was chosen, and how far the objectives are apart, relative: positive where ours is lower."""
    strengths = [float(name.split()[1]) for name in theirs if name.startswith("objective ")]
    least = our_objectives(strengths)
    apart = {l2: theirs[f"objective {l2!r}"] / least[l2] - 1 for l2 in strengths}
    common = [name for name in ours if name.startswith("value ") and name in theirs]
    return {
        "l2": [ours["l2"], theirs["l2"]],
        "acc1": [ours["acc1"], theirs["acc1"]],
        "fits": len(strengths) + 1,
        "their_steps": theirs["steps"],
        "their_fits_cut_short": theirs["cut_short"],
        "largest_validation_difference": max(abs(ours[name] - theirs[name]) for name in common),
        "their_objective_above_ours": {f"{l2:.6g}": apart[l2] for l2 in sorted(apart)},
        "largest_where_theirs_is_lower": max(0.0, *(-gap for gap in apart.values())),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=SETTINGS, help="one of the rows; the others stay as they were measured last")
    given = parser.parse_args()
    path = harness.RESULTS / "probe.json"
    searches = json.loads(path.read_bytes())["searches"] if given.only and path.exists() else {}
    for kind in [given.only] if given.only else SETTINGS:
        contestants = [
            harness.Contestant(name, [harness.OURS_PYTHON, __file__, "--worker", what])
            for name, what in (("ours", "ours"), ("peer", kind))
        ]
        done = harness.run_rounds(contestants, given.rounds, fresh=True)
        case = f"search {TRAIN}x{COLUMNS}x{CLASSES}" + (f" ({kind})" if kind != "default" else "")
        searches[kind] = {
            "row": done.pick("s").row(case, "s", "peer", peer_name="scikit-learn"),
            "rounds": given.rounds,
            **SETTINGS[kind],
            **done.about["ours"],
            **done.about["peer"],
            **compare(done.values["ours"][-1], done.values["peer"][-1]),
        }
    harness.report("probe", [searches[kind]["row"] for kind in SETTINGS if kind in searches], searches=searches)


def work(what: str) -> None:
    """A worker: one figure a request."""
    if what == "ours":
        harness.answer(our_search, torch=torch.__version__)
    else:
        import sklearn

        harness.answer(lambda: their_search(what), scikit_learn=sklearn.__version__)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2])
    else:
        main()
