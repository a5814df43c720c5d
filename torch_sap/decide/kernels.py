"""Triton kernels that work on many tensors in one launch, through a table of pointers.

A table has one row of int64 per item, a tensor or a part of one, in which entry (a, b, c) of up to three dimensions is
at ``a * stride + b * stride + c * stride``. ``item_of`` names the item of every program of a launch. Each kernel is
deterministic: histograms hold integers, and a program adds its floats in a fixed order. All offsets are int64.

This module imports Triton; only :mod:`torch_sap.decide.triton_backend` and :mod:`torch_sap.masks.zeros_cuda` import it,
where a GPU is used. ``TRITON_INTERPRET=1``, set before, runs the kernels on CPU tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl

COLUMNS = 20
"""Columns of a table."""

_COLUMNS = tl.constexpr(COLUMNS)
_SCORES, _MASK, _OUT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # addresses; 0 for no mask
_SIZES = tl.constexpr(3)  # 3 numbers
_SCORE_STRIDES, _MASK_STRIDES, _OUT_STRIDES = tl.constexpr(6), tl.constexpr(9), tl.constexpr(12)  # 3 numbers each
_KIND, _GROUP = tl.constexpr(15), tl.constexpr(16)
_FIRST, _SLOT, _FIRST_ROW = tl.constexpr(17), tl.constexpr(18), tl.constexpr(19)  # program, place in sums, row

FLOAT16, BFLOAT16, FLOAT32, FLOAT64, MIXED = range(5)
"""Kinds of scores; MIXED for a launch on items of several kinds."""

_FLOAT16, _BFLOAT16, _FLOAT32 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_FLOAT64, _MIXED = tl.constexpr(3), tl.constexpr(4)

ROOT, SAME, SQUARE, POWER = range(4)
"""Kinds of exponents: 0.5, 1, 2, and all others."""

_ROOT, _SAME, _SQUARE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _offset(strides, a, b, c):
    return a * tl.load(strides) + b * tl.load(strides + 1) + c * tl.load(strides + 2)


@triton.jit
def _columns(item, i):
    """Dimensions 1 and 2 of an index into the two of them."""
    n2 = tl.load(item + _SIZES + 2)
    b, c = i * 0, i
    if tl.load(item + _SIZES + 1) > 1:  # divisions of int64 take long
        b, c = i // n2, i % n2
    return b, c


@triton.jit
def _places(item, i):
    """All three dimensions of an index in order of position."""
    n1, n2 = tl.load(item + _SIZES + 1), tl.load(item + _SIZES + 2)
    a, b, c = i * 0, i * 0, i
    if tl.load(item + _SIZES) * n1 > 1:
        a, b, c = i // n2 // n1, i // n2 % n1, i % n2
    return a, b, c


@triton.jit
def _span(item, program, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Entries of an item, the first one of a program, and how many blocks of them the program has."""
    size = tl.load(item + _SIZES) * tl.load(item + _SIZES + 1) * tl.load(item + _SIZES + 2)
    start = (program - tl.load(item + _FIRST)) * BLOCK * STEPS
    steps = (tl.minimum(size - start, BLOCK * STEPS) + BLOCK - 1) // BLOCK
    return size, start, steps.to(tl.int32)


@triton.jit
def _magnitude(key, KIND: tl.constexpr):
    """The float64 number that a key stands for."""
    if KIND == _FLOAT16:
        value = key.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif KIND == _BFLOAT16:
        value = (key << 16).to(tl.float32, bitcast=True)
    elif KIND == _FLOAT32:
        value = key.to(tl.float32, bitcast=True)
    else:
        value = key.to(tl.float64, bitcast=True)
    return value.to(tl.float64)


@triton.jit
def _bits(address, at, ok, KIND: tl.constexpr):
    """The bits of magnitudes."""
    if KIND == _FLOAT64:
        bits = tl.load(address.to(tl.pointer_type(tl.int64)) + at, mask=ok, other=0) & 0x7FFFFFFFFFFFFFFF
    elif KIND == _FLOAT32:
        bits = tl.load(address.to(tl.pointer_type(tl.int32)) + at, mask=ok, other=0) & 0x7FFFFFFF
    else:
        bits = tl.load(address.to(tl.pointer_type(tl.int16)) + at, mask=ok, other=0).to(tl.int32) & 0x7FFF
    return bits


@triton.jit
def _entries(item, a, b, c, ok, SOURCE: tl.constexpr, TARGET: tl.constexpr):
    """Keys, of the type TARGET, of an item's entries where ``ok``, and whether they are unpruned."""
    address, at = tl.load(item + _SCORES), _offset(item + _SCORE_STRIDES, a, b, c)
    if SOURCE == _MIXED:
        kind = tl.load(item + _KIND)
        half, brain = ok & (kind == _FLOAT16), ok & (kind == _BFLOAT16)
        single, double = ok & (kind == _FLOAT32), ok & (kind == _FLOAT64)
        value = _magnitude(_bits(address, at, half, _FLOAT16), _FLOAT16)  # 0 where it is of another kind
        value += _magnitude(_bits(address, at, brain, _BFLOAT16), _BFLOAT16)
        value += _magnitude(_bits(address, at, single, _FLOAT32), _FLOAT32)
        value += _magnitude(_bits(address, at, double, _FLOAT64), _FLOAT64)
        if TARGET == _FLOAT64:
            key = value.to(tl.int64, bitcast=True)
        else:
            key = value.to(tl.float32).to(tl.int32, bitcast=True)
    else:
        key = _bits(address, at, ok, SOURCE)
    mask = tl.load(item + _MASK)
    place = mask.to(tl.pointer_type(tl.int8)) + _offset(item + _MASK_STRIDES, a, b, c)
    return key, ok & (tl.load(place, mask=ok & (mask != 0), other=1) != 0)


@triton.jit
def _power(x, exponent, KIND: tl.constexpr):
    if KIND == _SAME:
        result = x
    elif KIND == _SQUARE:
        result = x * x
    elif KIND == _ROOT:
        result = tl.sqrt(x)
    else:
        result = tl.where(x > 0, tl.exp2(exponent * tl.log2(tl.where(x > 0, x, 1.0))), x)
    return result


@triton.jit
def _counted(counts, places, inside, SIZE: tl.constexpr, BINS: tl.constexpr):
    """Counts with ``places`` added where ``inside``; all of shape (SIZE,)."""
    found = tl.histogram(tl.where(inside, places, 0).to(tl.int32), BINS)
    outside = SIZE - tl.sum(inside.to(tl.int32), 0)  # they were counted as 0
    return counts + found - tl.where(tl.arange(0, BINS) == 0, outside, 0)


@triton.jit
def _choose(counts, rank, BINS: tl.constexpr):
    """The bin that holds the entry of a rank (from 1), its rank in there, and how many entries are in there."""
    bins = tl.arange(0, BINS)
    place = tl.sum((tl.cumsum(counts, 0) < rank).to(tl.int32), 0)
    below = tl.sum(tl.where(bins < place, counts, 0), 0)
    return place, rank - below, tl.sum(tl.where(bins == place, counts, 0), 0)


@triton.jit
def _narrowed(histograms, chosen, group, done, PASSES: tl.constexpr, BITS: tl.constexpr):
    """Where the last entry to go of a group is, after ``done`` of the passes.

    Returns the lowest key of its interval, its rank in the interval, and how many entries are in there. For rank 0, all
    entries of the lowest key come behind it, so nothing goes.
    """
    rank, low, equal = tl.load(chosen + 3 * group), group * 0, group * 0
    foreign = tl.load(chosen + 3 * group + 1)
    for turn in range(done):
        bins = tl.arange(0, 2**BITS)
        counts = tl.load(histograms + (group * PASSES + turn) * 2**BITS + bins)
        counts -= tl.where((bins == 0) & (turn == 0), foreign, 0)
        place, rank, equal = _choose(counts, rank, 2**BITS)
        low += place.to(tl.int64) << ((PASSES - 1 - turn) * BITS)
    return low, rank, equal


@triton.jit(do_not_specialize=["total"])
def measure(
    table,
    item_of,
    sums,
    total,
    exponents,
    histograms,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    PASSES: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
):
    """d and both power sums of segments of rows, and the first histogram of each group; BITS = 0 for none.

    ``sums`` is float64 of shape (3, total). The segments of an item are in order of segment, then row.
    """
    item = table + tl.load(item_of + tl.program_id(0)).to(tl.int64) * _COLUMNS
    rows, length = tl.load(item + _SIZES), tl.load(item + _SIZES + 1) * tl.load(item + _SIZES + 2)
    local = tl.program_id(0) - tl.load(item + _FIRST)
    tiles = (rows + ROWS - 1) // ROWS
    segment = local // tiles
    row = ((local % tiles) * ROWS + tl.arange(0, ROWS))[:, None]
    p, q = tl.load(exponents), tl.load(exponents + 1)
    d = tl.zeros([ROWS, WIDTH], tl.int32)
    sum_p, sum_q = tl.zeros([ROWS, WIDTH], tl.float64), tl.zeros([ROWS, WIDTH], tl.float64)
    if BITS > 0:
        own = histograms + tl.load(item + _GROUP) * PASSES * 2**BITS
        SHIFT: tl.constexpr = (PASSES - 1) * BITS
        if BITS == 8:
            counts = tl.zeros([256], tl.int32)
    start = segment * STEPS * WIDTH
    steps = (tl.minimum(length - start, STEPS * WIDTH) + WIDTH - 1) // WIDTH
    for step in range(steps.to(tl.int32)):
        column = (start + step * WIDTH + tl.arange(0, WIDTH))[None, :]
        b, c = _columns(item, column)
        key, live = _entries(item, row, b, c, (row < rows) & (column < length), SOURCE, TARGET)
        value = tl.where(live, _magnitude(key, TARGET), 0.0)
        d += live.to(tl.int32)
        sum_p += _power(value, p, P)
        sum_q += _power(value, q, Q)
        if BITS == 8:
            places, inside = tl.reshape(key >> SHIFT, [ROWS * WIDTH]), tl.reshape(live, [ROWS * WIDTH])
            counts = _counted(counts, places, inside, ROWS * WIDTH, 256)
        elif BITS > 0:
            tl.atomic_add(own + (key >> SHIFT), tl.full([ROWS, WIDTH], 1, tl.int64), mask=live)
    if BITS == 8:
        tl.atomic_add(own + tl.arange(0, 256), counts.to(tl.int64), mask=counts != 0)
    row = (local % tiles) * ROWS + tl.arange(0, ROWS)
    out = sums + tl.load(item + _SLOT) + segment * rows + row
    tl.store(out, tl.sum(d, 1).to(tl.float64), mask=row < rows)
    tl.store(out + total, tl.sum(sum_p, 1), mask=row < rows)
    tl.store(out + total + total, tl.sum(sum_q, 1), mask=row < rows)


@triton.jit(do_not_specialize=["done"])
def narrow(
    table,
    item_of,
    groups,
    chosen,
    histograms,
    done,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    PASSES: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Histogram of the keys of each group in the interval that is left of it after ``done`` of the passes.

    ``chosen`` has three numbers per group: how many entries go, how many were counted that do not belong to it (zeros),
    and its first program. ``groups`` has the group of each item, -1 for those that are left alone.
    """
    number = tl.load(item_of + tl.program_id(0)).to(tl.int64)
    item, group = table + number * _COLUMNS, tl.load(groups + number)
    if group >= 0:
        low, _, _ = _narrowed(histograms, chosen, group, done, PASSES, BITS)
        own = histograms + (group * PASSES + done) * 2**BITS
        shift = (PASSES - 1 - done) * BITS
        if BITS == 8:
            counts = tl.zeros([256], tl.int32)
        size, start, steps = _span(item, tl.program_id(0), BLOCK, STEPS)
        for step in range(steps):
            i = start + step * BLOCK + tl.arange(0, BLOCK)
            a, b, c = _places(item, i)
            key, live = _entries(item, a, b, c, i < size, SOURCE, TARGET)
            inside = live & ((key >> (shift + BITS)) == (low >> (shift + BITS)))
            place = (key >> shift) & (2**BITS - 1)
            if BITS == 8:
                counts = _counted(counts, place, inside, BLOCK, 256)
            else:
                tl.atomic_add(own + place, tl.full([BLOCK], 1, tl.int64), mask=inside)
        if BITS == 8:
            tl.atomic_add(own + tl.arange(0, 256), counts.to(tl.int64), mask=counts != 0)


@triton.jit
def write(
    table,
    item_of,
    groups,
    chosen,
    histograms,
    kept,
    ties,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    PASSES: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Write what stays: entries above the last key to go, and those with just this key unless all of them go.

    Also writes how many stay and how many have just this key, per program.
    """
    number = tl.load(item_of + tl.program_id(0)).to(tl.int64)
    item, group = table + number * _COLUMNS, tl.load(groups + number)
    if group >= 0:
        low, left, equal = _narrowed(histograms, chosen, group, PASSES, PASSES, BITS)
        out = tl.load(item + _OUT).to(tl.pointer_type(tl.int8))
        stay, tied = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
        size, start, steps = _span(item, tl.program_id(0), BLOCK, STEPS)
        for step in range(steps):
            i = start + step * BLOCK + tl.arange(0, BLOCK)
            a, b, c = _places(item, i)
            key, live = _entries(item, a, b, c, i < size, SOURCE, TARGET)
            tie = live & (key == low)
            keep = (live & (key > low)) | (tie & (left < equal))
            tl.store(out + _offset(item + _OUT_STRIDES, a, b, c), keep.to(tl.int8), mask=i < size)
            stay += keep.to(tl.int32)
            tied += tie.to(tl.int32)
        tl.store(kept + tl.program_id(0), tl.sum(stay, 0).to(tl.int64))
        tl.store(ties + tl.program_id(0), tl.sum(tied, 0).to(tl.int64))


@triton.jit
def take_ties(
    table,
    item_of,
    groups,
    chosen,
    histograms,
    kept,
    ties,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    PASSES: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Take the first of the entries with just the last key to go out of the masks, where not all of them go."""
    program = tl.program_id(0).to(tl.int64)
    number = tl.load(item_of + program).to(tl.int64)
    item, group = table + number * _COLUMNS, tl.load(groups + number)
    here = tl.load(ties + program)
    if (group >= 0) & (here > 0):
        low, left, equal = _narrowed(histograms, chosen, group, PASSES, PASSES, BITS)
        before = tl.zeros([BLOCK], tl.int64)
        first = tl.load(chosen + 3 * group + 2)
        for step in range(((program - first + BLOCK - 1) // BLOCK).to(tl.int32)):
            other = first + step * BLOCK + tl.arange(0, BLOCK)
            before += tl.load(ties + other, mask=other < program, other=0)
        if (left > tl.sum(before, 0)) & (left < equal):
            left -= tl.sum(before, 0)
            out = tl.load(item + _OUT).to(tl.pointer_type(tl.int8))
            tl.store(kept + program, tl.load(kept + program) - tl.minimum(left, here))
            size, start, steps = _span(item, program, BLOCK, STEPS)
            for step in range(steps):
                i = start + step * BLOCK + tl.arange(0, BLOCK)
                a, b, c = _places(item, i)
                key, live = _entries(item, a, b, c, i < size, SOURCE, TARGET)
                tie = (live & (key == low)).to(tl.int32)
                go = (tie > 0) & (tl.cumsum(tie, 0) <= left)
                zero = tl.zeros([BLOCK], tl.int8)
                tl.store(out + _offset(item + _OUT_STRIDES, a, b, c), zero, mask=go)
                left -= tl.sum(tie, 0)


@triton.jit
def write_rows(
    table,
    item_of,
    groups,
    counts_to_go,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    PASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write what stays of rows that are groups of their own; one program per row, which stays in the nearest cache.

    ``counts_to_go`` has one number per row; ``groups`` is -1 for the items that are left alone.
    """
    program = tl.program_id(0).to(tl.int64)
    number = tl.load(item_of + program).to(tl.int64)
    item = table + number * _COLUMNS
    if tl.load(groups + number) >= 0:
        row = program - tl.load(item + _FIRST_ROW)
        length = tl.load(item + _SIZES + 1) * tl.load(item + _SIZES + 2)
        steps = ((length + BLOCK - 1) // BLOCK).to(tl.int32)
        left = tl.load(counts_to_go + program)
        low, start = left * 0, left * 0
        for turn in tl.static_range(PASSES):
            counts = tl.zeros([256], tl.int32)
            for step in range(steps):
                column = (start + step) * BLOCK + tl.arange(0, BLOCK)
                b, c = _columns(item, column)
                key, live = _entries(item, row, b, c, column < length, SOURCE, TARGET)
                if turn > 0:
                    live &= (key >> ((PASSES - turn) * 8)) == (low >> ((PASSES - turn) * 8))
                place = (key >> ((PASSES - 1 - turn) * 8)) & 255
                counts = _counted(counts, place, live, BLOCK, 256)
            chosen, left, _ = _choose(counts, left, 256)
            low += chosen.to(tl.int64) << ((PASSES - 1 - turn) * 8)
        out = tl.load(item + _OUT).to(tl.pointer_type(tl.int8))
        for step in range(steps):
            column = (start + step) * BLOCK + tl.arange(0, BLOCK)
            b, c = _columns(item, column)
            key, live = _entries(item, row, b, c, column < length, SOURCE, TARGET)
            tie = (live & (key == low)).to(tl.int32)
            keep = live & ((key > low) | ((tie > 0) & (tl.cumsum(tie, 0) > left)))
            left -= tl.sum(tie, 0)
            tl.store(out + _offset(item + _OUT_STRIDES, row, b, c), keep.to(tl.int8), mask=column < length)


@triton.jit
def store_zeros(table, item_of, BLOCK: tl.constexpr):
    """Store +0.0 where a mask is False. Only the masks are read.

    The table has five columns: addresses of a tensor and its mask, entries, bytes per entry, and the first program.
    """
    program = tl.program_id(0).to(tl.int64)
    item = table + tl.load(item_of + program).to(tl.int64) * 5
    tensor, mask, size, width = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    i = (program - tl.load(item + 4)) * BLOCK + tl.arange(0, BLOCK)
    gone = tl.load(mask.to(tl.pointer_type(tl.int8)) + i, mask=i < size, other=1) == 0
    if width == 2:
        tl.store(tensor.to(tl.pointer_type(tl.int16)) + i, tl.zeros([BLOCK], tl.int16), mask=gone)
    elif width == 4:
        tl.store(tensor.to(tl.pointer_type(tl.int32)) + i, tl.zeros([BLOCK], tl.int32), mask=gone)
    else:
        tl.store(tensor.to(tl.pointer_type(tl.int64)) + i, tl.zeros([BLOCK], tl.int64), mask=gone)
