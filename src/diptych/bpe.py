"""Byte-pair encoding of one piece of text, and the learning of merges (Sennrich et al. 2016, on bytes).

The ids of any vocabulary: 0..255 a byte, 256..511 the same byte at the end of a piece, then one id per merge
in order of preference. A merge therefore always has a higher id than its two parts.
"""

import heapq
import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Mapping

from diptych.errors import UsageError

TokenPair = tuple[int, int]

MAX_SHORT = 48
"""Up to how many bytes a piece is merged by looking at all candidates."""

# Written merges show each byte as one printable character: itself where it prints, else one from U+0100 on.
# The ids of bytes follow that order: "!" is 0.
_PRINTING = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF_ID = bytes(_PRINTING + sorted(set(range(256)) - set(_PRINTING)))
_ID_OF_BYTE = bytes(_BYTE_OF_ID.index(byte) for byte in range(256))
_LETTERS = [*map(chr, _PRINTING), *map(chr, range(256, 512 - len(_PRINTING)))]
SINGLE_TOKENS = [*_LETTERS, *(letter + "</w>" for letter in _LETTERS)]
"""Written form of the ids 0..511."""


def byte_ids(piece: bytes) -> list[int]:
    """Ids of a piece before any merge: its bytes, the last one marked as the end.

    >>> byte_ids(b"cat")
    [66, 64, 339]
    """
    ids = list(piece.translate(_ID_OF_BYTE))
    ids[-1] += 256
    return ids


def build_pairs(merges: Iterable[str]) -> dict[TokenPair, int]:
    """Two neighbouring ids -> the id of their merge, in the order of the merges ("c at</w>", best first)."""
    ids = {token: i for i, token in enumerate(SINGLE_TOKENS)}
    pairs: dict[TokenPair, int] = {}
    for new, merge in enumerate(merges, start=len(ids)):
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right in ids:
            raise UsageError(
                f"{merge!r} is no merge; allowed are two earlier tokens, a space between, that make a new one"
            )
        pairs[ids[left], ids[right]] = ids[left + right] = new
    return pairs


def spell_tokens(pairs: Iterable[TokenPair]) -> list[bytes]:
    """The bytes of every id, a space for the end of a piece; `pairs` as `build_pairs` orders them."""
    singles = [_BYTE_OF_ID[i : i + 1] for i in range(256)]
    spelled = [*singles, *(byte + b" " for byte in singles)]
    for left, right in pairs:
        spelled.append(spelled[left] + spelled[right])
    return spelled


def merge_bytes(piece: bytes, pairs: Mapping[TokenPair, int]) -> list[int]:
    """Ids of one piece: its bytes, the pair whose merge has the lowest id merged first, from left to right.

    `pairs` maps two neighbouring ids to the id of their merge.
    """
    return merge_short(piece, pairs) if len(piece) <= MAX_SHORT else merge_long(piece, pairs)


def merge_short(piece: bytes, pairs: Mapping[TokenPair, int]) -> list[int]:
    """`merge_bytes` by looking at all candidates for each merge: quicker for a word, quadratic for a long piece."""
    ids = byte_ids(piece)
    get, none = pairs.get, sys.maxsize
    merges = [get(pair, none) for pair in itertools.pairwise(ids)]  # of each id with the next one
    while merges and (new := min(merges)) != none:
        i = merges.index(new)
        ids[i : i + 2] = [new]
        del merges[i]
        if i:
            merges[i - 1] = get((ids[i - 1], new), none)
        if i < len(merges):
            merges[i] = get((new, ids[i + 1]), none)
    return ids


def merge_long(piece: bytes, pairs: Mapping[TokenPair, int]) -> list[int]:
    """`merge_bytes` for any length: a heap of candidates over a linked list of ids takes O(n log n), so that 100,000
    letters without a space are no attack.

    Taking one candidate at a time gives what rounds over all occurrences of the best pair give: a merge has a higher
    id than its parts, so whatever it makes possible comes after everything that still waits at its own id.
    """
    ids = byte_ids(piece)
    size = len(ids)
    heap = [(new, i) for i in range(size - 1) if (new := pairs.get((ids[i], ids[i + 1]))) is not None]
    heapq.heapify(heap)
    before, after = list(range(-1, size - 1)), list(range(1, size + 1))
    while heap:
        new, left = heapq.heappop(heap)
        right = after[left]
        if right == size or pairs.get((ids[left], ids[right])) != new:
            continue  # one of the two was merged away in the meantime
        ids[left], ids[right] = new, -1
        after[left] = follower = after[right]
        if follower < size:
            before[follower] = left
            if (merged := pairs.get((new, ids[follower]))) is not None:
                heapq.heappush(heap, (merged, left))
        if (leader := before[left]) >= 0 and (merged := pairs.get((ids[leader], new))) is not None:
            heapq.heappush(heap, (merged, leader))
    return [token for token in ids if token >= 0]


def learn_merges(pieces: Mapping[bytes, int], wanted: int) -> list[str]:
    """At most `wanted` merges, best first, from pieces and how often each occurs; fewer when no pair is left.

    The most frequent pair is merged, again and again. Of equally frequent pairs the lower first id, then the
    lower second id wins. A pair that would spell an existing token a second way is passed over: a token is
    known by its text. Pairs are counted once; then only pieces that hold the merged pair are counted again.
    """
    words, counts = [byte_ids(piece) for piece in pieces], list(pieces.values())
    pair_counts: Counter[TokenPair] = Counter()
    places: dict[TokenPair, set[int]] = {}  # pair -> numbers of the words that hold it or once did
    for place, (word, count) in enumerate(zip(words, counts, strict=True)):
        for pair in itertools.pairwise(word):
            pair_counts[pair] += count
            places.setdefault(pair, set()).add(place)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)

    tokens, spelled, merges = list(SINGLE_TOKENS), set(SINGLE_TOKENS), []
    while heap and len(merges) < wanted:
        count, pair = heapq.heappop(heap)
        left, right = tokens[pair[0]], tokens[pair[1]]
        if -count != pair_counts[pair] or left + right in spelled:
            continue  # an old count: each change of a count has pushed an entry of its own
        changes: Counter[TokenPair] = Counter()
        for place in places.pop(pair):
            for gone in itertools.pairwise(words[place]):
                changes[gone] -= counts[place]
            words[place] = _replace_pair(words[place], pair, len(tokens))
            for come in itertools.pairwise(words[place]):
                changes[come] += counts[place]
                places.setdefault(come, set()).add(place)
        for changed, change in changes.items():
            pair_counts[changed] += change
            if change and pair_counts[changed]:
                heapq.heappush(heap, (-pair_counts[changed], changed))
        tokens.append(left + right)
        spelled.add(left + right)
        merges.append(f"{left} {right}")
    return merges


def _replace_pair(word: list[int], pair: TokenPair, new: int) -> list[int]:
    replaced, i = [], 0
    while i < len(word):
        found = i + 1 < len(word) and (word[i], word[i + 1]) == pair
        replaced.append(new if found else word[i])
        i += 2 if found else 1
    return replaced
