import pickle

import pytest

from diptych import errors


def test_an_unknown_name_is_answered_with_the_nearest_known_ones():
    error = errors.unknown_name("preset", "vit-b32", ["RN50", "ViT-B-32", "ViT-L-14"])
    assert str(error).startswith("unknown preset 'vit-b32'; did you mean ViT-B-32")
    assert str(error).endswith("Known: RN50, ViT-B-32, ViT-L-14")


def test_a_name_like_no_other_gets_the_list_without_a_guess():
    assert "did you mean" not in str(errors.unknown_name("preset", "zzz", ["RN50"]))


@pytest.mark.parametrize(
    ("ours", "builtin"), [(errors.UsageError, ValueError), (errors.NotFoundError, FileNotFoundError)]
)
def test_our_errors_are_also_the_builtin_ones(ours, builtin):
    with pytest.raises(builtin, match="what to do"):
        raise ours("what to do")


def test_a_picture_error_crosses_process_borders_with_its_reason():
    error = pickle.loads(pickle.dumps(errors.PictureError("truncated", "ends early")))
    assert (error.reason, str(error)) == ("truncated", "truncated: ends early")
