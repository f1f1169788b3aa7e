"""Low-rank additions, by the real peft."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diptych.checkpoint import layouts
from diptych.model.clip import CLIP
from diptych.train import loop
from diptych.train.config import StartConfig
from diptych.train.finetune import lora
from samples import TINY_RESNET, TINY_VIT, make_loaded, train_config, write_samples


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_samples(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "model"
    layouts.save(make_loaded(TINY_VIT), folder)
    return folder


@pytest.fixture(scope="module")
def run(data, start, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("lora") / "run"
    loop.run(train_config(data, out, start_model=str(start), steps=4, warmup=0, lr=1e-2, start={"lora_rank": 3}))
    return out


def inject(config=TINY_VIT, **changes) -> CLIP:
    model = make_loaded(config).model
    lora.inject(model, StartConfig(lora_rank=2, **changes), seed=0)
    return model


def test_a_fresh_addition_changes_nothing():
    torch.manual_seed(1)
    image, text = torch.randn(2, 3, 32, 32), make_loaded(TINY_VIT).tokenizer(["a cat", "two dogs"])
    plain, model = make_loaded(TINY_VIT).model, inject()
    assert torch.equal(model.encode_image(image), plain.encode_image(image))
    assert torch.equal(model.encode_text(text), plain.encode_text(text))
    for name, tensor in lora.merged(model).state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name


@pytest.mark.parametrize(("lock", "towers"), [("none", {"visual", "text"}), ("image", {"text"}), ("text", {"visual"})])
def test_every_linear_of_the_unlocked_towers_has_an_addition(lock, towers):
    plain = make_loaded(TINY_VIT).model
    linear = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    expected = {name for name in linear if name.partition(".")[0] in towers}
    assert len(linear) == 16
    found = {name.partition(".lora_A")[0] for name in inject(lock=lock).state_dict() if ".lora_A" in name}
    assert found == expected
    assert sum(p.requires_grad for p in inject(lock=lock).parameters()) == 2 * len(expected) + 1


def test_of_a_resnet_the_attention_pool_has_additions():
    found = {name.partition(".lora_A")[0] for name in inject(TINY_RESNET).state_dict() if ".lora_A" in name}
    assert {name for name in found if name.startswith("visual.")} == {
        f"visual.attnpool.{part}_proj" for part in ("q", "k", "v", "c")
    }


def test_training_reaches_every_addition_and_no_other_weight(run, start):
    model, after = layouts.load(start).model, layouts.load(run).model.state_dict()
    before = model.state_dict()
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name in before if not torch.equal(before[name], after[name])} == linear | {"logit_scale"}


def test_what_is_saved_is_an_ordinary_model_that_computes_the_same(run, start):
    """The run's checkpoint beside the live model with additions, put together from the parts that are stored."""
    model = inject_of(run, start)
    merged = layouts.load(run).model
    torch.manual_seed(1)
    image, text = torch.randn(2, 3, 32, 32), layouts.load(run).tokenizer(["a cat", "two dogs"])
    torch.testing.assert_close(merged.encode_image(image), model.encode_image(image), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged.encode_text(text), model.encode_text(text), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(t, merged.state_dict()[n]) for n, t in lora.merged(model).state_dict().items())


def inject_of(run: Path, start: Path) -> CLIP:
    model = layouts.load(start).model
    lora.inject(model, StartConfig(lora_rank=3), seed=5)
    training = load_file(run / "step_00000004/training.safetensors")
    model.load_state_dict(lora.restored(model, layouts.load(run).model.state_dict(), training))
    return model


def test_peft_itself_reads_the_adapter(run, start):
    from peft import PeftModel

    loaded = layouts.load(start)
    model = PeftModel.from_pretrained(loaded.model, str(run / "adapter"))
    image = torch.randn(2, 3, 32, 32)
    expected = layouts.load(run).model.encode_image(image)
    assert not torch.allclose(layouts.load(start).model.encode_image(image), expected, atol=1e-3)
    torch.testing.assert_close(model.base_model.model.encode_image(image), expected, rtol=1e-4, atol=1e-5)


def test_alpha_scales_what_is_added():
    one, two = inject(), inject(lora_alpha=4.0)
    for model in (one, two):
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                nn.init.ones_(parameter)
    plain = make_loaded(TINY_VIT).model.text.transformer.resblocks[0].mlp.c_fc.weight
    added = [lora.merged(model).text.transformer.resblocks[0].mlp.c_fc.weight - plain for model in (one, two)]
    torch.testing.assert_close(added[1], 2 * added[0])


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
{before}
from pathlib import Path
from diptych.cli import main
try:
    main(["finetune", {start!r}, "--data", {data!r}, "--out", {out!r}, "--steps", "2", "--batch-size", "8",
          "--workers", "0", *{arguments!r}])
except SystemExit as exit:
    print("peft" in sys.modules, exit.code)
"""


def call(data: Path, start: Path, out: Path, before: str, *arguments: str) -> tuple[str, str]:
    tests = str(Path(__file__).parents[1])
    script = SCRIPT.format(
        tests=tests, before=before, start=str(start), data=str(data), out=str(out), arguments=arguments
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1], done.stderr


def test_peft_is_not_imported_without_the_option(data, start, tmp_path):
    assert call(data, start, tmp_path / "run", "")[0] == "False 0"


def test_without_peft_the_option_says_what_to_install(data, start, tmp_path):
    last, error = call(data, start, tmp_path / "run", "sys.modules['peft'] = None", "--lora-rank", "2")
    assert last == "True 2"
    assert error.strip() == "diptych: --lora-rank needs peft, which is not installed: pip install '.[lora]'"
