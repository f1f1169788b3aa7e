"""Recipes say what the paper says, and the command line takes them and changes them."""

import pytest
import tyro

from diptych.cli import main
from diptych.cli.train import Train, with_recipe
from diptych.errors import UsageError
from diptych.model.config import PAPER_PRESETS, SMALL_PRESETS
from diptych.train.config import RunConfig
from diptych.train.recipe import NAMES, PAPER, get_recipe

# Model, peak learning rate, beta2, eps, epochs: Tables 18 to 20, and section 2.5 for the last line.
TABLES = [
    ("RN50", 5e-4, 0.999, 1e-8, 32),
    ("RN101", 5e-4, 0.999, 1e-8, 32),
    ("RN50x4", 5e-4, 0.999, 1e-8, 32),
    ("RN50x16", 4e-4, 0.999, 1e-8, 32),
    ("RN50x64", 3.6e-4, 0.999, 1e-8, 32),
    ("ViT-B-32", 5e-4, 0.98, 1e-6, 32),
    ("ViT-B-16", 5e-4, 0.98, 1e-6, 32),
    ("ViT-L-14", 4e-4, 0.98, 1e-6, 32),
    ("ViT-L-14-336", 2e-5, 0.98, 1e-6, 1),
]


@pytest.mark.parametrize(("name", "lr", "beta2", "eps", "epochs"), TABLES)
def test_the_papers_recipe_has_the_values_of_its_tables(name, lr, beta2, eps, epochs):
    recipe = get_recipe("paper", name)
    optim = recipe.optim
    assert (optim.lr, optim.beta1, optim.beta2, optim.eps) == (lr, 0.9, beta2, eps)
    assert (optim.warmup, optim.weight_decay, optim.max_grad_norm) == (2000, 0.2, None)
    assert (recipe.loader.batch_size, recipe.run.epochs) == (32_768, epochs)
    assert (recipe.run.recompute, optim.half_statistics) == (True, True)  # section 2.5


def test_the_paper_has_a_recipe_for_each_of_its_models_and_no_other():
    assert set(PAPER) == set(PAPER_PRESETS) == {row[0] for row in TABLES}
    with pytest.raises(UsageError, match=r"did not train RN-Ti; its recipe is for RN50, .*ViT-L-14-336"):
        get_recipe("paper", "RN-Ti")


def test_small_data_is_for_any_architecture():
    assert {get_recipe("small-data", name).loader.batch_size for name in SMALL_PRESETS} == {256}


def parse(*arguments: str) -> Train:
    return tyro.cli(with_recipe(arguments), args=arguments, config=(tyro.conf.OmitArgPrefixes,))


def test_a_recipe_is_the_default_and_each_of_its_values_can_be_changed():
    command = parse("RN50x16", "--recipe", "paper", "--data", "shards", "--out", "run", "--batch-size", "64")
    assert (command.optim.lr, command.loader.batch_size, command.optim.warmup) == (4e-4, 64, 2000)
    command = parse("--recipe=small-data", "--data", "shards", "--out", "run", "--lr", "3e-4", "RN-Ti")
    assert (command.optim.lr, command.optim.warmup) == (3e-4, get_recipe("small-data", "RN-Ti").optim.warmup)


def test_without_a_recipe_the_defaults_are_the_fields_own():
    assert parse("RN50", "--data", "shards", "--out", "run").run == RunConfig()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ViT-B-32", "--recipe", "papr"), f"unknown recipe 'papr'; did you mean paper? Known: {', '.join(NAMES)}"),
        (("ViT-S-16", "--recipe", "paper"), "the paper did not train ViT-S-16"),
        (("ViT-L-14-336", "--recipe", "paper"), "train ViT-L-14, give it larger pictures with"),
        (("ViT-B-33", "--recipe", "paper"), "unknown architecture 'ViT-B-33'; did you mean ViT-B-32"),
    ],
)
def test_a_recipe_that_does_not_fit_is_explained(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", *arguments, "--data", "shards", "--out", "run"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
