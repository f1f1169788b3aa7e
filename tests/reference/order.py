"""Hash of positions with Python's own integers, and an epoch of a source written out as a list."""

MASK = 2**64 - 1


def hash_position(seed, position, stream=0):
    x = (position + seed * 0x9E3779B97F4A7C15) & MASK
    x = (x + stream * 0xD1B54A32D192ED03 + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def permutation(size, seed):
    return sorted(range(size), key=lambda position: hash_position(seed, position))


def epoch(sizes, source_seed, epoch, block_shards, derive_seed):
    first = [sum(sizes[:i]) for i in range(len(sizes))]
    shards = permutation(len(sizes), derive_seed(source_seed, epoch, "shards"))
    rows = []
    for block in range(0, len(shards), block_shards):
        inside = [first[s] + i for s in shards[block : block + block_shards] for i in range(sizes[s])]
        order = permutation(len(inside), derive_seed(source_seed, epoch, "block", block // block_shards))
        rows += [inside[i] for i in order]
    return rows
