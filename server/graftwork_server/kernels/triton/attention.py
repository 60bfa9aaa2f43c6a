"""Attention of one new token of each sequence, read from the KV cache's blocks where they lie (flash-decoding).

A sequence's tokens are split over several programs, each with a running softmax (FlashAttention, arXiv:2205.14135);
`combine` puts their parts together.
"""

import triton
import triton.language as tl


@triton.jit
def _share_of_split(length, window, split, TOKENS: tl.constexpr, SPLITS: tl.constexpr):
    """First and last (exclusive) token that split `split` of a sequence of `length` tokens looks at."""
    begin = length * 0
    if window > 0:
        begin = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - begin, SPLITS), TOKENS) * TOKENS
    first = begin + split * share
    return first, tl.minimum(first + share, length)


@triton.jit
def _add_to_softmax(scores, v, greatest, total, part):
    """The running softmax with `scores` [heads, tokens] and their values `v` [tokens, value_dim] taken in."""
    now = tl.maximum(greatest, tl.max(scores, 1))
    faded, weights = tl.exp(greatest - now), tl.exp(scores - now[:, None])
    total = total * faded + tl.sum(weights, 1)
    part = part * faded[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return now, total, part


@triton.jit
def _load_tokens(
    keys,
    values,
    row,
    is_token,
    key_dim,
    value_dim,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Keys [key_dim, tokens] and values [tokens, value_dim] in rows `row` of the cache; 0 where there is no token."""
    key_column, value_column = tl.arange(0, KEY_DIM), tl.arange(0, VALUE_DIM)
    is_key, is_value = key_column < key_dim, value_column < value_dim
    k = tl.load(
        keys + row[None, :] * key_dim + key_column[:, None], mask=is_token[None, :] & is_key[:, None], other=0.0
    )
    v = tl.load(
        values + row[:, None] * value_dim + value_column[None, :], mask=is_token[:, None] & is_value[None, :], other=0.0
    )
    if UPCAST:
        k, v = k.to(tl.float32), v.to(tl.float32)
    return k, v


@triton.jit
def _scores(q, k, is_token, scale, softcap, CAPPED: tl.constexpr):
    """Scores [heads, tokens] of `q` [heads, key_dim] and `k` [key_dim, tokens]; -inf where there is no token."""
    scores = tl.dot(q, k, input_precision="ieee") * scale
    if CAPPED:
        # tanh(x) = 2 sigmoid(2x) - 1
        scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
    return tl.where(is_token[None, :], scores, float("-inf"))


@triton.jit
def attend(
    query,  # [rows, heads, key_dim], any strides but 1 for the last
    keys,  # [blocks * BLOCK_TOKENS, kv_heads, key_dim], dense
    values,  # [blocks * BLOCK_TOKENS, kv_heads, value_dim], dense
    rows,  # [sequences] int64: each one's row of `query`
    tables,  # [sequences, at least the blocks it needs] int32
    lengths,  # [sequences] int32: tokens in the cache, the new one included
    parts,  # [sequences, heads, SPLITS, value_dim] float32
    sums,  # [sequences, heads, SPLITS, 2] float32: greatest score and sum of exponentials
    scale,
    window,  # 0: none
    softcap,  # 0: none
    query_row_stride,
    query_head_stride,
    table_stride,
    kv_heads,
    key_dim,
    value_dim,
    groups,  # heads of the query to one of the keys
    GROUPS: tl.constexpr,  # the same, rounded up
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TOKENS: tl.constexpr,  # looked at together
    SPLITS: tl.constexpr,
    CAPPED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid: sequences, kv_heads, splits."""
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, end = _share_of_split(tl.load(lengths + sequence), window, split, TOKENS, SPLITS)
    group, key_column, value_column = tl.arange(0, GROUPS), tl.arange(0, KEY_DIM), tl.arange(0, VALUE_DIM)
    head = kv_head * groups + group
    is_head, is_key, is_value = group < groups, key_column < key_dim, value_column < value_dim
    q = tl.load(
        query + tl.load(rows + sequence) * query_row_stride + head[:, None] * query_head_stride + key_column[None, :],
        mask=is_head[:, None] & is_key[None, :],
        other=0.0,
    )
    if UPCAST:
        q = q.to(tl.float32)
    greatest = tl.full((GROUPS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((GROUPS,), dtype=tl.float32)
    part = tl.zeros((GROUPS, VALUE_DIM), dtype=tl.float32)
    for start in range(first, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        is_token = token < end
        block = tl.load(tables + sequence * table_stride + token // BLOCK_TOKENS, mask=is_token, other=0)
        row = (block.to(tl.int64) * BLOCK_TOKENS + token % BLOCK_TOKENS) * kv_heads + kv_head
        k, v = _load_tokens(keys, values, row, is_token, key_dim, value_dim, KEY_DIM, VALUE_DIM, UPCAST)
        scores = _scores(q, k, is_token, scale, softcap, CAPPED)
        greatest, total, part = _add_to_softmax(scores, v, greatest, total, part)
    place = (sequence * kv_heads * groups + head) * SPLITS + split
    tl.store(
        parts + place[:, None] * value_dim + value_column[None, :], part, mask=is_head[:, None] & is_value[None, :]
    )
    tl.store(sums + place * 2, greatest, mask=is_head)
    tl.store(sums + place * 2 + 1, total, mask=is_head)


@triton.jit
def combine(
    output,  # [sequences, heads, value_dim], dense
    parts,
    sums,
    value_dim,
    VALUE_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Grid: sequences * heads."""
    place = tl.program_id(0).to(tl.int64) * SPLITS + tl.arange(0, SPLITS)
    column = tl.arange(0, VALUE_DIM)
    greatest = tl.load(sums + place * 2)
    # Splits beyond a short sequence have seen nothing; their greatest score is -inf and their weight 0.
    weight = tl.exp(greatest - tl.max(greatest, 0))
    total = tl.sum(weight * tl.load(sums + place * 2 + 1), 0)
    part = tl.load(parts + place[:, None] * value_dim + column[None, :], mask=(column < value_dim)[None, :], other=0.0)
    answer = tl.sum(part * weight[:, None], 0) / total
    tl.store(
        output + tl.program_id(0).to(tl.int64) * value_dim + column,
        answer.to(output.dtype.element_ty),
        mask=column < value_dim,
    )
