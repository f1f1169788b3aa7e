import pytest

from checkpoint.hostile import CASES, iter_honest
from diptych.checkpoint import layouts
from diptych.errors import CheckpointError, DiptychError, NotFoundError, UsageError


def test_the_same_material_unspoilt_is_loaded(tmp_path):
    for place in iter_honest(tmp_path):
        layouts.load(place, activation="quick_gelu")


REASONS = {
    # where another check would refuse the file for another reason: the beginning of a case's name -> what it must say
    "pickle_calls": "from Python, but weights are tensors",
    "pickle_gets_an_attribute": "from Python, but weights are tensors",
    "pickle_walks": "from Python, but weights are tensors",
    "pickle_loads_bytes": "from Python, but weights are tensors",
    "pickle_with_obj": "from Python, but weights are tensors",
    "pickle_of_a_whole_model": "save model.state_dict() where it comes from",
    "pickle_with_inst": "uses the instruction INST",
    "pickle_with_extension": "uses the instruction EXT1",
    "pickle_of_two_million": "more than 1000000 instructions",
    "pickle_state_copied": "copies more than 1000000 attributes",
    "torchscript_long_names": "the names of its tensors have over 8388608 letters",
    "storage_of_which": "share storages and would take",
    "storage_claims": "claims shape (2, 2) in a storage of 16 bytes",
    "tensor_larger": "in a storage of 16 bytes",
    "tensor_expanded": "in a storage of 16 bytes",
    "tensor_behind": "in a storage of 16 bytes",
    "tensor_before": "a tensor of an unknown kind",
    "tensor_with_negative": "a tensor of an unknown kind",
    "zip_bomb": "is compressed or encrypted",
    "zip_member_with": "holds a member with the path",
    "zip_member_twice": "twice",
    "safetensors_header_of_100": "its header claims 104857600 bytes",
    "safetensors_overlap": "the tensor before it ends at",
    "safetensors_nan": "NaN is not JSON",
    "safetensors_key_twice": "a is there twice",
    "safetensors_integers": "which is no type for",
    "shard_index_with": "only names in its own folder are followed",
    "config_of_100_megabytes": "has more than 8388608 bytes",
    "truncated_native_weights": "its bytes are not those that were written",
    "forged_layers": "the weights hold fewer tensors",
    "forged_file_outside": "only names in its own folder are followed",
}


def test_every_reason_belongs_to_a_case():
    assert [start for start in REASONS if not any(name.startswith(start) for name in CASES)] == []


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
    for start, reason in REASONS.items():
        assert not name.startswith(start) or reason in message
    assert isinstance(caught.value, CheckpointError | NotFoundError | UsageError)


def test_there_are_enough_of_them():
    assert len(CASES) >= 40
