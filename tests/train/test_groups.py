from dataclasses import replace

import torch
from test_step import make_batch

from diptych.ranks import Ranks
from diptych.train.step import group_pairs
from samples import TINY_VIT

CPU = torch.device("cpu")


def batch_of(captions: list[int], pictures: list[int]):
    batch = make_batch(TINY_VIT, n=len(captions))
    return replace(batch, text=torch.tensor(captions)[:, None].expand(-1, 4), pictures=tuple(pictures))


def partners(groups) -> list[set[int]]:
    return [{j for j, other in enumerate(groups.tolist()) if other == mine} for mine in groups.tolist()]


def test_a_pair_has_only_itself_unless_asked():
    assert group_pairs(batch_of([1, 1], [5, 5]), "pair", Ranks(), CPU) is None


def test_equal_captions_or_equal_pictures_are_one_group():
    batch = batch_of([1, 2, 1, 3], [7, 8, 9, 8])
    assert partners(group_pairs(batch, "caption", Ranks(), CPU)) == [{0, 2}, {1}, {0, 2}, {3}]
    assert partners(group_pairs(batch, "image", Ranks(), CPU)) == [{0}, {1, 3}, {2}, {1, 3}]


def test_either_follows_links_to_their_end():
    # 0 and 2 share a caption, 2 and 1 a picture, 1 and 4 a caption; 3 stands alone
    batch = batch_of([1, 2, 1, 3, 2], [7, 8, 8, 9, 2**64 - 1])
    assert partners(group_pairs(batch, "either", Ranks(), CPU)) == [{0, 1, 2, 4}] * 3 + [{3}, {0, 1, 2, 4}]
