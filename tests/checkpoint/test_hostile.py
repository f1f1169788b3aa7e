import pytest

from checkpoint.hostile import CASES, iter_honest
from diptych.checkpoint import layouts
from diptych.errors import CheckpointError, DiptychError, NotFoundError, UsageError


def test_the_same_material_unspoilt_is_loaded(tmp_path):
    for place in iter_honest(tmp_path):
        layouts.load(place, activation="quick_gelu")


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_executes_nothing_and_ends_in_one_clear_line(name, tmp_path):
    (tmp_path / "files").mkdir()
    canary = tmp_path / "canary"
    place = CASES[name](tmp_path / "files", canary)
    with pytest.raises(DiptychError) as caught:
        layouts.load(place, activation="quick_gelu")
    assert not canary.exists()
    message = str(caught.value)
    assert message.isprintable()
    assert 20 < len(message) < 600
    assert isinstance(caught.value, CheckpointError | NotFoundError | UsageError)


def test_there_are_enough_of_them():
    assert len(CASES) >= 40
