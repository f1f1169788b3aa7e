from diptych.pair import SCHEMA, Pair, from_batch, to_batch
from samples import make_pairs


def test_pairs_survive_arrow():
    pairs = [
        *make_pairs(3),
        Pair(key="later", caption="not fetched yet", image_url="http://a/b.jpg", page_url="http://a/"),
    ]
    batch = to_batch(pairs)
    assert batch.schema == SCHEMA
    assert list(from_batch(batch)) == pairs
