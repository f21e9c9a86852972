"""The Triton kernels, in the order in which the launcher runs them.

A *row* is one sequence of L tokens of one layer: row r is batch ``r % batch`` of layer ``r // batch``. The layers are a
tuple of pointers, so that one launch takes all of them. Statistics of tokens are ``[rows, L]`` in fp32. Similarities
are products of the raw tokens; the epilogue multiplies in the inverse norms, in fp32, so that there is neither a
normalized copy nor its rounding. Rows of a tile beyond L are read as token L - 1 and masked in the epilogue, so that
loads of the main loop have no mask. Tokens have ``width`` contiguous features, a multiple of 16, with zeros beyond F,
and strides that are multiples of 16, so that every load is of 16 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# Whether Triton's interpreter runs the kernels; it multiplies bf16 as if the bits were integers.
_INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
# Largest exponent of an empty set of pairs: less than any exponent, and finite.
_NO_EXPONENT = tl.constexpr(-3.4028234663852886e38)
# Least norm whose squares and products fp32 holds: 2^-50.
_LEAST_NORM = tl.constexpr(8.881784197001252e-16)
# Largest |z|^2, and q |z|^2, of potentials of the distance: sums of four stay finite (torch_tiled.LARGEST_SQUARE).
_LARGEST_SQUARE = tl.constexpr(0.03 * 3.4028234663852886e38)


@triton.jit
def _layer_pointer(pointers, layer, LAYERS: tl.constexpr):
    """``pointers[layer]``."""
    chosen = pointers[0]
    for n in tl.static_range(1, LAYERS):
        chosen = tl.where(layer == n, pointers[n], chosen)
    return chosen


@triton.jit(do_not_specialize=["batch", "length"])
def row_statistics_kernel(
    layers,
    stride_b,
    stride_l,
    partners_ptr,
    norm_ptr,
    inverse_ptr,
    extra_ptr,
    cleaned,
    batch,
    length,
    features,
    width,
    eps,
    q,
    TRANSFORM: tl.constexpr,
    HAS_PARTNERS: tl.constexpr,
    CLEAN: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Statistics of each token for the epilogue: its norm r, the inverse it is multiplied by, and a second number,
    extra.

    ``normalize``: r = |z|, inverse 1 / (r + eps) or 0, extra a tiny number that equal tokens share and other tokens
    hardly ever do, or -q for a zero token. ``standardize``: r = |z - mean|, inverse 1 / r, or 0 for a constant token,
    extra mean sqrt(F). ``none``: r = |z|, inverse 1, extra q r^2. r is infinite, and the loss NaN, where later results
    leave the range of fp32. With ``HAS_PARTNERS`` all three are 0 for a token without a partner, and inverse and extra
    for one that is not finite; ``CLEAN`` copies the tokens, these as 0, to ``cleaned``.
    """
    row = tl.program_id(1)
    z = _layer_pointer(layers, row // batch, LAYERS) + (row % batch).to(tl.int64) * stride_b
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = tokens < length
    f = tl.arange(0, BLOCK_F)
    z += tl.minimum(tokens, length - 1).to(tl.int64)[:, None] * stride_l
    mean = tl.zeros((BLOCK_M,), tl.float32)
    if TRANSFORM == "standardize":
        total = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
        least = tl.full((BLOCK_M, BLOCK_F), float("inf"), tl.float32)
        largest = tl.full((BLOCK_M, BLOCK_F), float("-inf"), tl.float32)
        for start in range(0, features, BLOCK_F):
            inside = (start + f < features)[None, :]
            x = tl.load(z + (start + f)[None, :], mask=(start + f < width)[None, :], other=0.0).to(tl.float32)
            total += x
            least = tl.minimum(least, tl.where(inside, x, float("inf")))
            largest = tl.maximum(largest, tl.where(inside, x, float("-inf")))
        mean = tl.sum(total, 1) / features
        # The rounded mean of a constant token may differ from its features; the difference must not be scaled to
        # length 1.
        constant = tl.min(least, 1) == tl.max(largest, 1)
    total = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    keys = tl.zeros((BLOCK_M, BLOCK_F), tl.int32)
    for start in range(0, features, BLOCK_F):
        x = tl.load(z + (start + f)[None, :], mask=(start + f < width)[None, :], other=0.0).to(tl.float32)
        if TRANSFORM == "standardize":
            x = tl.where((start + f < features)[None, :], x - mean[:, None], 0.0)
        if TRANSFORM == "normalize":
            keys += _key(x, start + f)
        total += x * x
    squares = tl.sum(total, 1)
    norm = tl.sqrt_rn(squares)
    if TRANSFORM == "normalize":
        key = tl.sum(keys, 1)
        # With a larger eps such a token counts as 0. A key of 0 means a zero token; another token has it once in 2^32.
        unknown = (eps < _LEAST_NORM * 16777216.0) & (norm < _LEAST_NORM) & (key != 0)
        norm = tl.where(unknown, float("inf"), norm)
        denominator = norm + eps
        inverse = tl.where(denominator > 0, 1.0 / tl.where(denominator > 0, denominator, 1.0), 0.0)
        # A float between 2^-90 and 2^-89, made from the key.
        extra = (0x12800000 | ((key * -1640531535) >> 9 & 0x7FFFFF)).to(tl.float32, bitcast=True)
        extra = tl.where(norm > 0, extra, -q)
    elif TRANSFORM == "standardize":
        norm = tl.where(constant, 0.0, tl.where(norm < _LEAST_NORM, float("inf"), norm))
        inverse = tl.where(norm > 0, 1.0 / tl.where(norm > 0, norm, 1.0), 0.0)
        extra = mean * tl.sqrt_rn(features.to(tl.float32))
    else:
        inverse = tl.full((BLOCK_M,), 1.0, tl.float32)
        extra = squares * q
        norm = tl.where(tl.maximum(squares, extra) > _LARGEST_SQUARE, float("inf"), norm)
    if HAS_PARTNERS:
        in_batch = (row % batch).to(tl.int64) * length + tokens
        paired = tl.load(partners_ptr + in_batch, mask=valid, other=0) > 0
        norm = tl.where(paired, norm, 0.0)
        paired = paired & (norm < float("inf"))
        inverse = tl.where(paired, inverse, 0.0)
        extra = tl.where(paired, extra, 0.0)
        if CLEAN:
            to = _layer_pointer(cleaned, row // batch, LAYERS) + in_batch[:, None] * width
            for start in range(0, width, BLOCK_F):
                inside = (start + f < width)[None, :]
                x = tl.load(z + (start + f)[None, :], mask=paired[:, None] & inside, other=0.0)
                tl.store(to + (start + f)[None, :], x, mask=valid[:, None] & inside)
    out = row.to(tl.int64) * length + tokens
    tl.store(norm_ptr + out, norm, mask=valid)
    tl.store(inverse_ptr + out, inverse, mask=valid)
    tl.store(extra_ptr + out, extra, mask=valid)


@triton.jit
def _key(x, feature):
    """Hash of a feature's place and bits, the same for 0 and -0; the sum over the features distinguishes tokens."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    place = (feature + 1) * -1640531535
    return (bits ^ (bits >> 15)) * ((place ^ (place >> 15)) | 1)[None, :]


@triton.jit
def _dot(a, b, sums, PRECISION: tl.constexpr):
    """Product ``a @ b + sums`` in fp32. Tensor cores truncate when they add to a sum; with tf32x3 Triton sums the
    products of a block separately and adds them to ``sums`` with rounding, so that the error does not grow with the
    number of blocks."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def _products(
    z,
    offsets_i,
    offsets_j,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products ``Z_I Z_J^T`` in fp32 of the tokens at ``offsets_i`` and ``offsets_j``."""
    k = tl.arange(0, BLOCK_K)
    z_i = z + offsets_i[:, None] + k[None, :]
    z_j = z + offsets_j[None, :] + k[:, None]
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        if EVEN_K:
            a = tl.load(z_i)
            b = tl.load(z_j)
        else:
            a = tl.load(z_i, mask=(k < width - start)[None, :], other=0.0)
            b = tl.load(z_j, mask=(k < width - start)[:, None], other=0.0)
        products = _dot(a, b, products, PRECISION)
        z_i += BLOCK_K
        z_j += BLOCK_K
    return products


@triton.jit
def _apply_potential(
    c,
    side_i,
    side_j,
    masked,
    diagonal,
    shift,
    p,
    FUNCTION: tl.constexpr,
    OWN: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    TRANSFORM: tl.constexpr,
):
    """Result ``(u, v)`` of the epilogue function for a tile of products ``c``; an exponent has ``shift`` subtracted.
    psi and slope are 0 for tokens of different pair ids, if the tile is ``masked``, and for a token with itself, if it
    is on the ``diagonal``. A side is its tokens' inverse norms, extra statistics, numbers and pair ids; ``p`` are the
    potential's four numbers."""
    inverse_i, extra_i, i, pair_ids_i = side_i
    inverse_j, extra_j, j, pair_ids_j = side_j
    p0, p1, p2, p3 = p
    # The two conditions are applied one after the other: combined they would hold a register of lanes per element.
    if TRANSFORM == "standardize":
        c -= extra_i[:, None] * extra_j[None, :]
    if TRANSFORM != "none":
        c = c * inverse_i[:, None] * inverse_j[None, :]
    if OWN:
        u, v = FUNCTION(c, p0, p1, p2, p3)
    else:
        u, v = FUNCTION(c, extra_i[:, None], extra_j[None, :], shift, p0, p1, p2, p3)
    nothing = float("-inf") if EXPONENTIAL else 0.0
    if masked:
        u = tl.where(pair_ids_i[:, None] == pair_ids_j[None, :], u, nothing)
        if not EXPONENTIAL:
            v = tl.where(pair_ids_i[:, None] == pair_ids_j[None, :], v, 0.0)
    if diagonal:
        u = tl.where(i[:, None] != j[None, :], u, nothing)
        if not EXPONENTIAL:
            v = tl.where(i[:, None] != j[None, :], v, 0.0)
    return u, v


# do_not_specialize: numbers that differ from call to call, each of which would compile a kernel. The length is not
# among them: if 16 divides it, statistics are loaded for several tokens at a time.
@triton.jit(do_not_specialize=["sums_stride", "first_sum", "first_row", "tiles_i", "tiles_j", "reach", "ring", "batch"])
def pair_tiles_kernel(
    layers,
    stride_b,
    stride_l,
    inverse_ptr,
    weight_inverse_ptr,
    extra_ptr,
    shift_ptr,
    pair_ids_ptr,
    tile_range_ptr,
    weights_ptr,
    mirror_ptr,
    weights_row_stride,
    weights_stride,
    sums_ptr,
    maxima_ptr,
    sums_stride,
    first_sum,
    first_row,
    batch,
    length,
    width,
    first_i,
    first_j,
    tiles_i,
    tiles_j,
    reach,
    ring,
    p0,
    p1,
    p2,
    p3,
    FUNCTION: tl.constexpr,
    OWN: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    TRANSFORM: tl.constexpr,
    ONLINE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_PAIR_IDS: tl.constexpr,
    WRITE: tl.constexpr,
    TRIANGLE: tl.constexpr,
    BAND: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Kernel for one pair of tiles of tokens (I, J) of one row: the sum of psi over its pairs, in both orders, and,
    with ``WRITE``, the slopes times the inverse norm of the column, to ``weights``, and those of (J, I), to ``mirror``.

    The program's number numbers the pairs of tiles: of the upper triangle of ``tiles_i`` x ``tiles_i``, folded to a
    rectangle, or, without ``TRIANGLE``, of ``tiles_i`` x ``tiles_j``. Tile 0 begins at token ``first_i`` or
    ``first_j``. ``ONLINE``: the sum is relative to the largest exponent of the tile, which goes to ``maxima``.

    ``BAND``: the pairs of ``tiles_i`` tiles with themselves and the next ``reach`` tiles. ``sums`` has a sum for each
    token of I, ``[reach + 1, L]`` a row of the launch. ``weights`` is ``[ring, BLOCK, 2 * reach + 1, BLOCK]`` a row:
    tile I is at ``I % ring``, and its pairs with J at ``J - I + reach``. Pairs of tiles in neither's tile range are not
    written.
    """
    number = tl.program_id(0)
    in_round = tl.program_id(1)
    row = first_row + in_round
    if TRIANGLE:
        # Line n of the rectangle is line n of the triangle, followed by line tiles_i - 1 - n.
        line = number // (tiles_i + 1)
        place = number % (tiles_i + 1)
        second = place >= tiles_i - line
        tile_i = tl.where(second, tiles_i - 1 - line, line)
        tile_j = tl.where(second, place - 1, line + place)
        # The middle line of an odd number has no partner.
        nobody = second & (tile_i == line)
        diagonal = tile_i == tile_j
    elif BAND:
        tile_i = number // (reach + 1)
        tile_j = tile_i + number % (reach + 1)
        nobody = first_i + tile_j * BLOCK >= length
        diagonal = tile_i == tile_j
    else:
        tile_i = number // tiles_j
        tile_j = number % tiles_j
        nobody = False
        diagonal = first_i + tile_i * BLOCK == first_j + tile_j * BLOCK
    i = first_i + tile_i * BLOCK + tl.arange(0, BLOCK)
    j = first_j + tile_j * BLOCK + tl.arange(0, BLOCK)
    valid_i = i < length
    valid_j = j < length
    if BAND:
        sum_at = in_round.to(tl.int64) * sums_stride + (tile_j - tile_i) * length + i
    else:
        sum_at = row.to(tl.int64) * sums_stride + first_sum + number
    if nobody:
        _store_sum(sums_ptr + sum_at, 0.0, valid_i, BAND)
        if ONLINE:
            tl.store(maxima_ptr + sum_at, _NO_EXPONENT)
        return
    z = _layer_pointer(layers, row // batch, LAYERS) + (row % batch).to(tl.int64) * stride_b
    statistics = row.to(tl.int64) * length
    to_i = weights_ptr + in_round.to(tl.int64) * weights_row_stride
    to_j = mirror_ptr + in_round.to(tl.int64) * weights_row_stride
    if BAND:
        number_i = first_i // BLOCK + tile_i
        number_j = first_i // BLOCK + tile_j
        apart = tile_j - tile_i
        to_i += number_i % ring * BLOCK * weights_stride + (reach + apart) * BLOCK
        to_j += number_j % ring * BLOCK * weights_stride + (reach - apart) * BLOCK
        ranges = tile_range_ptr + 2 * (row % batch).to(tl.int64) * tl.cdiv(length, BLOCK)
        of_i = (tl.load(ranges + 2 * number_i) <= number_j) & (number_j < tl.load(ranges + 2 * number_i + 1))
        of_j = (tl.load(ranges + 2 * number_j) <= number_i) & (number_i < tl.load(ranges + 2 * number_j + 1))
        if not (of_i | of_j):
            _store_sum(sums_ptr + sum_at, 0.0, valid_i, BAND)
            return
    else:
        to_i += tile_i * BLOCK * weights_stride + tile_j * BLOCK
        to_j += tile_j * BLOCK * weights_stride + tile_i * BLOCK
    lane = tl.arange(0, BLOCK)
    in_tile = lane[:, None] * weights_stride + lane[None, :]

    if HAS_PAIR_IDS:
        pair_ids_ptr += (row % batch).to(tl.int64) * length
        least_i, largest_i = _pair_id_range(pair_ids_ptr, i, valid_i)
        least_j, largest_j = _pair_id_range(pair_ids_ptr, j, valid_j)
        if (least_i > largest_j) | (least_j > largest_i):
            _store_sum(sums_ptr + sum_at, 0.0, valid_i, BAND)
            if ONLINE:
                tl.store(maxima_ptr + sum_at, _NO_EXPONENT)
            if WRITE:
                nothing = tl.zeros((BLOCK, BLOCK), weights_ptr.dtype.element_ty)
                tl.store(to_i + in_tile, nothing)
                tl.store(to_j + in_tile, nothing)
            return

    read_i = tl.minimum(i, length - 1).to(tl.int64) * stride_l
    read_j = tl.minimum(j, length - 1).to(tl.int64) * stride_l
    c = _products(z, read_i, read_j, width, BLOCK, BLOCK, BLOCK_K, EVEN_K, PRECISION)
    if HAS_PAIR_IDS:
        pair_ids_i = tl.load(pair_ids_ptr + i, mask=valid_i, other=-1)
        # Tokens of a negative id pair with no token, not even with one of the same id.
        pair_ids_i = tl.where(pair_ids_i < 0, -2, pair_ids_i)
        pair_ids_j = tl.load(pair_ids_ptr + j, mask=valid_j, other=-1)
        masked = True
    else:
        pair_ids_i = tl.where(valid_i, 0, -2)
        pair_ids_j = tl.where(valid_j, 0, -1)
        # J is never before I, so tile I reaches beyond the last token only if J does.
        masked = first_j + tile_j * BLOCK + BLOCK > length
    inverse_i = tl.load(inverse_ptr + statistics + i, mask=valid_i, other=0.0)
    inverse_j = tl.load(inverse_ptr + statistics + j, mask=valid_j, other=0.0)
    extra_i = tl.load(extra_ptr + statistics + i, mask=valid_i, other=0.0)
    extra_j = tl.load(extra_ptr + statistics + j, mask=valid_j, other=0.0)
    shift = 0.0
    if HAS_SHIFT:
        shift = tl.load(shift_ptr + row)
    u, v = _apply_potential(
        c,
        (inverse_i, extra_i, i, pair_ids_i),
        (inverse_j, extra_j, j, pair_ids_j),
        masked,
        diagonal,
        shift,
        (p0, p1, p2, p3),
        FUNCTION,
        OWN,
        EXPONENTIAL,
        TRANSFORM,
    )
    if EXPONENTIAL:
        if ONLINE:
            largest = tl.maximum(tl.max(u), _NO_EXPONENT)  # finite for a tile without a pair
            tl.store(maxima_ptr + sum_at, largest)
            u -= largest
        psi = tl.exp2(u)
        slope = psi * v
    else:
        psi = u
        slope = v
    total = tl.sum(psi, 1) if BAND else tl.sum(psi)
    _store_sum(sums_ptr + sum_at, tl.where(diagonal, total, 2 * total), valid_i, BAND)
    if WRITE:
        scale_i = tl.load(weight_inverse_ptr + statistics + i, mask=valid_i, other=0.0)
        scale_j = tl.load(weight_inverse_ptr + statistics + j, mask=valid_j, other=0.0)
        weights = (slope * scale_j[None, :]).to(weights_ptr.dtype.element_ty)
        tl.store(to_i + in_tile, weights)
        if not diagonal:
            mirrored = (slope * scale_i[:, None]).to(weights_ptr.dtype.element_ty)
            tl.store(to_j + in_tile, tl.trans(mirrored))


@triton.jit
def _store_sum(to, value, valid, OF_TOKENS: tl.constexpr):
    if OF_TOKENS:
        tl.store(to, value, mask=valid)
    else:
        tl.store(to, value)


@triton.jit
def _pair_id_range(pair_ids_ptr, tokens, valid):
    """Least and largest pair id of the tokens; the least is above the largest where none pairs."""
    pair_ids = tl.load(pair_ids_ptr + tokens, mask=valid, other=-1)
    return tl.min(tl.where(pair_ids < 0, 2147483647, pair_ids)), tl.max(pair_ids)


@triton.jit(do_not_specialize=["first_row", "batch"])
def diagonal_kernel(
    layers,
    stride_b,
    stride_l,
    inverse_ptr,
    extra_ptr,
    weights_ptr,
    weights_row_stride,
    weights_stride,
    first_row,
    batch,
    length,
    width,
    TRANSFORM: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
    SAMPLE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Kernel for the diagonal of the weights of a tile of tokens x: minus an estimate of x . G, which is the mean over
    the tile, times the inverse norm. The estimate is from every eighth or so of the tile's tokens and ``SAMPLE`` of the
    row's."""
    in_round = tl.program_id(1)
    row = first_row + in_round
    z = _layer_pointer(layers, row // batch, LAYERS) + (row % batch).to(tl.int64) * stride_b
    i = tl.program_id(0) * BLOCK + tl.arange(0, SAMPLE) * (BLOCK // SAMPLE)
    j = (2 * tl.arange(0, SAMPLE) + 1) * length // (2 * SAMPLE)
    read_i = tl.minimum(i, length - 1).to(tl.int64) * stride_l
    c = _products(z, read_i, j.to(tl.int64) * stride_l, width, SAMPLE, SAMPLE, BLOCK_K, EVEN_K, "ieee")
    inverse_ptr += row.to(tl.int64) * length
    inverse = tl.load(inverse_ptr + i, mask=i < length, other=0.0)
    if TRANSFORM == "standardize":
        extra_ptr += row.to(tl.int64) * length
        c -= tl.load(extra_ptr + i, mask=i < length, other=0.0)[:, None] * tl.load(extra_ptr + j)[None, :]
    weights_ptr += in_round.to(tl.int64) * weights_row_stride
    weights = tl.load(weights_ptr + i[:, None] * weights_stride + j[None, :], mask=(i < length)[:, None], other=0.0)
    total = tl.sum(tl.sum(weights.to(tl.float32) * c, 1) * inverse)
    along = total * length / (SAMPLE * tl.maximum(tl.sum((inverse > 0).to(tl.int32)), 1))
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inverse = tl.load(inverse_ptr + tokens, mask=tokens < length, other=0.0)
    diagonal = (-along * inverse).to(weights_ptr.dtype.element_ty)
    tl.store(weights_ptr + tokens * (weights_stride + 1), diagonal, mask=tokens < length)


@triton.jit(do_not_specialize=["first_row", "first_tile", "reach", "ring", "batch"])
def band_product_kernel(
    layers,
    stride_b,
    stride_l,
    weights_ptr,
    weights_row_stride,
    weights_stride,
    tile_range_ptr,
    gradients,
    first_row,
    first_tile,
    reach,
    ring,
    batch,
    length,
    features,
    width,
    LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Kernel for a slice of ``BLOCK_F`` features of G_i = sum_j weights_ij z_j of a tile of tokens, over the tiles in
    its tile range; ``weights`` are those that ``pair_tiles`` writes with ``BAND``."""
    slices = tl.cdiv(features, BLOCK_F)
    tile = first_tile + tl.program_id(0) // slices
    f = tl.program_id(0) % slices * BLOCK_F + tl.arange(0, BLOCK_F)
    in_round = tl.program_id(1)
    row = first_row + in_round
    layer = row // batch
    z = _layer_pointer(layers, layer, LAYERS) + (row % batch).to(tl.int64) * stride_b
    ranges = tile_range_ptr + 2 * ((row % batch).to(tl.int64) * tl.cdiv(length, BLOCK) + tile)
    begin = tl.maximum(tl.maximum(tl.load(ranges), tile - reach), 0) * BLOCK
    end = tl.minimum(tl.load(ranges + 1), tile + reach + 1) * BLOCK
    lane = tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    weights = weights_ptr + in_round.to(tl.int64) * weights_row_stride
    weights += (tile % ring * BLOCK + lane)[:, None] * weights_stride + ((reach - tile) * BLOCK + k)[None, :]
    gradient = tl.zeros((BLOCK, BLOCK_F), tl.float32)
    for start in range(begin, end, BLOCK_K):
        read = tl.minimum(start + k, length - 1).to(tl.int64) * stride_l
        z_j = tl.load(z + read[:, None] + f[None, :], mask=(f < width)[None, :], other=0.0)
        gradient = _dot(tl.load(weights + start), z_j, gradient, PRECISION)
    i = tile * BLOCK + lane
    out = _layer_pointer(gradients, layer, LAYERS) + ((row % batch).to(tl.int64) * length + i)[:, None] * features
    tl.store(out + f[None, :], gradient, mask=(i < length)[:, None] & (f < features)[None, :])


@triton.jit(do_not_specialize=["batch"])
def row_sweep_kernel(
    layers,
    stride_b,
    stride_l,
    inverse_ptr,
    weight_inverse_ptr,
    extra_ptr,
    shift_ptr,
    pair_ids_ptr,
    tile_range_ptr,
    largest_ptr,
    total_ptr,
    expected_ptr,
    average_ptr,
    sums_ptr,
    maxima_ptr,
    weight_sums_ptr,
    gradients,
    batch,
    length,
    features,
    width,
    p0,
    p1,
    p2,
    p3,
    FUNCTION: tl.constexpr,
    OWN: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    TRANSFORM: tl.constexpr,
    PASS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_PAIR_IDS: tl.constexpr,
    SUM_WEIGHTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    SINGLE_SLICE: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Kernel for the sums of the tokens of tile I of one row over their pairs; no slope is kept in memory.

    ``PASS``:
    ``loss``: for each token the sum of psi over its pairs with tokens of its own tile and, counted twice, of later
    tiles.
    ``online``: the sum of ``loss``, relative to the token's largest exponent, which goes to ``maxima``.
    ``gradient``: the sum of psi over all of a token's pairs, and a slice of ``BLOCK_F`` features, the program's third
    number, of G_i = sum_j slope_ij x_j.
    Passes of perplexity_entropy (:func:`dispersion_kernels.backends.torch_tiled._perplexity_entropy`), with P_ij =
    min(exp2(e_ij - largest_i), 1) / total_i, because one pass may round e_ij above the largest of another; p2 is eps,
    and the potential's p2 is 0:
    ``partition``: total to ``sums`` and largest to ``maxima``, over all pairs.
    ``entropy``: sum_j P_ij h_ij to ``sums`` and sum_j P_ij g_ij to ``maxima``.
    ``entropy_gradient``: G_i with the slopes P_ij (g_ij - expected_i) + P_ji (g_ji - expected_j).

    ``WEIGHTED``: the weights' inverse norms, scaled or not, are not all 1.
    ``SINGLE_SLICE``: all features fit ``BLOCK_F``, so the tokens of I are loaded once, and those of J once for both
    products.
    """
    tile_i = tl.program_id(0)
    row = tl.program_id(1)
    first_feature = tl.program_id(2) * BLOCK_F
    layer = row // batch
    z = _layer_pointer(layers, layer, LAYERS) + (row % batch).to(tl.int64) * stride_b
    statistics = row.to(tl.int64) * length
    i = tile_i * BLOCK_M + tl.arange(0, BLOCK_M)
    valid_i = i < length
    read_i = tl.minimum(i, length - 1).to(tl.int64) * stride_l
    f = first_feature + tl.arange(0, BLOCK_F)
    inverse_i = tl.load(inverse_ptr + statistics + i, mask=valid_i, other=0.0)
    extra_i = tl.load(extra_ptr + statistics + i, mask=valid_i, other=0.0)
    if HAS_PAIR_IDS:
        pair_ids_ptr += (row % batch).to(tl.int64) * length
        pair_ids_i = tl.load(pair_ids_ptr + i, mask=valid_i, other=-1)
        pair_ids_i = tl.where(pair_ids_i < 0, -2, pair_ids_i)  # pairs with no token, not even of the same id
        ranges = tile_range_ptr + 2 * ((row % batch).to(tl.int64) * tl.num_programs(0) + tile_i)
        first_tile = tl.maximum(tl.load(ranges), 0)  # wrong bounds of sequences, which are reported later
        end_tile = tl.load(ranges + 1)
    else:
        pair_ids_i = tl.where(valid_i, 0, -2)
        first_tile = 0
        end_tile = tl.cdiv(length, BLOCK_N)
    if (PASS == "loss") or (PASS == "online"):
        tl.static_assert(BLOCK_M % BLOCK_N == 0)
        first_tile = tl.maximum(first_tile, tile_i * (BLOCK_M // BLOCK_N))
    shift = 0.0
    if HAS_SHIFT:
        shift = tl.load(shift_ptr + statistics + i, mask=valid_i, other=0.0)[:, None]
    if (PASS == "entropy") or (PASS == "entropy_gradient"):
        largest_i = tl.load(largest_ptr + statistics + i, mask=valid_i, other=0.0)
        inverse_total_i = 1.0 / tl.load(total_ptr + statistics + i, mask=valid_i, other=1.0)
        average_i = tl.load(average_ptr + statistics + i, mask=valid_i, other=1.0)
    if PASS == "entropy_gradient":
        expected_i = tl.load(expected_ptr + statistics + i, mask=valid_i, other=0.0)
    if SINGLE_SLICE:
        z_i = tl.load(z + read_i[:, None] + f[None, :], mask=(f < width)[None, :], other=0.0)

    sums = tl.zeros((BLOCK_M,), tl.float32)
    maxima = tl.full((BLOCK_M,), 0.0 if PASS == "entropy" else _NO_EXPONENT, tl.float32)
    weight_sums = tl.zeros((BLOCK_M,), tl.float32)
    if (PASS == "gradient") or (PASS == "entropy_gradient"):
        gradient = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    for tile_j in range(first_tile, end_tile):
        j = tile_j * BLOCK_N + tl.arange(0, BLOCK_N)
        valid_j = j < length
        read_j = tl.minimum(j, length - 1).to(tl.int64) * stride_l
        if SINGLE_SLICE:
            z_j = tl.load(z + read_j[:, None] + f[None, :], mask=(f < width)[None, :], other=0.0)
            c = _dot(z_i, tl.trans(z_j), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        else:
            c = _products(z, read_i, read_j, width, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION)
        inverse_j = tl.load(inverse_ptr + statistics + j, mask=valid_j, other=0.0)
        extra_j = tl.load(extra_ptr + statistics + j, mask=valid_j, other=0.0)
        if HAS_PAIR_IDS:
            pair_ids_j = tl.load(pair_ids_ptr + j, mask=valid_j, other=-1)
            masked = True
        else:
            pair_ids_j = tl.where(valid_j, 0, -1)
            masked = tile_j * BLOCK_N + BLOCK_N > length
        diagonal = (tile_j * BLOCK_N < tile_i * BLOCK_M + BLOCK_M) & (tile_i * BLOCK_M < tile_j * BLOCK_N + BLOCK_N)
        u, v = _apply_potential(
            c,
            (inverse_i, extra_i, i, pair_ids_i),
            (inverse_j, extra_j, j, pair_ids_j),
            masked,
            diagonal,
            shift,
            (p0, p1, 0.0 if (PASS == "entropy") or (PASS == "entropy_gradient") else p2, p3),
            FUNCTION,
            OWN,
            EXPONENTIAL,
            TRANSFORM,
        )
        if (PASS == "online") or (PASS == "partition"):
            now = tl.maximum(maxima, tl.max(u, 1))
            added = tl.sum(tl.exp2(u - now[:, None]), 1)
            if PASS == "online":
                added = tl.where(diagonal, added, 2 * added)
            sums = sums * tl.exp2(maxima - now) + added
            maxima = now
        elif PASS == "entropy":
            p = tl.minimum(tl.exp2(u - largest_i[:, None]), 1.0) * inverse_total_i[:, None]
            h, g = _information(p, average_i[:, None], p2)
            sums += tl.sum(p * h, 1)
            maxima += tl.sum(p * g, 1)
        else:
            if PASS == "entropy_gradient":
                largest_j = tl.load(largest_ptr + statistics + j, mask=valid_j, other=0.0)
                inverse_total_j = 1.0 / tl.load(total_ptr + statistics + j, mask=valid_j, other=1.0)
                average_j = tl.load(average_ptr + statistics + j, mask=valid_j, other=1.0)
                expected_j = tl.load(expected_ptr + statistics + j, mask=valid_j, other=0.0)
                p = tl.minimum(tl.exp2(u - largest_i[:, None]), 1.0) * inverse_total_i[:, None]
                h, g = _information(p, average_i[:, None], p2)
                slope = p * (g - expected_i[:, None])
                p = tl.minimum(tl.exp2(u - largest_j[None, :]), 1.0) * inverse_total_j[None, :]
                h, g = _information(p, average_j[None, :], p2)
                slope += p * (g - expected_j[None, :])
            elif EXPONENTIAL:
                psi = tl.exp2(u)
                slope = psi * v
            else:
                psi = u
                slope = v
            if PASS == "loss":
                added = tl.sum(psi, 1)
                sums += tl.where(diagonal, added, 2 * added)
            elif PASS == "gradient":
                sums += tl.sum(psi, 1)
            if (PASS == "gradient") or (PASS == "entropy_gradient"):
                if WEIGHTED:
                    slope = slope * tl.load(weight_inverse_ptr + statistics + j, mask=valid_j, other=0.0)[None, :]
                if not SINGLE_SLICE:
                    z_j = tl.load(z + read_j[:, None] + f[None, :], mask=(f < width)[None, :], other=0.0)
                weights = slope.to(z_j.dtype)
                if SUM_WEIGHTS:
                    # Sum of the rounded weights, which the product with z_j has, too, so that a part common to z_i and
                    # z_j cancels.
                    weight_sums += tl.sum(weights.to(tl.float32), 1)
                gradient = _dot(weights, z_j, gradient, PRECISION)

    if first_feature == 0:
        if PASS != "entropy_gradient":
            tl.store(sums_ptr + statistics + i, sums, mask=valid_i)
        if (PASS == "online") or (PASS == "partition") or (PASS == "entropy"):
            tl.store(maxima_ptr + statistics + i, maxima, mask=valid_i)
        if SUM_WEIGHTS:
            tl.store(weight_sums_ptr + statistics + i, weight_sums, mask=valid_i)
    if (PASS == "gradient") or (PASS == "entropy_gradient"):
        out = _layer_pointer(gradients, layer, LAYERS) + ((row % batch).to(tl.int64) * length + i)[:, None] * features
        tl.store(out + f[None, :], gradient, mask=valid_i[:, None] & (f < features)[None, :])


@triton.jit
def _information(p, average, eps):
    """h = log2((P + eps) / (average + eps)) and g = d(P h) / dP - 1 / ln 2 = h - eps / ((P + eps) ln 2).

    Both are finite at P = 0, so entries that are no pairs add 0. The constant 1 / ln 2 cancels in the gradient, because
    P sums to 1; with it g would lose digits where P is near its average.
    """
    shifted = tl.maximum(p + eps, 1.1754943508222875e-38)  # eps may be less, and P may be 0
    per_mean = 1.0 / (average + eps)
    # Where P is near its average, h gets its digits from x, as in log1p; log(y) / (y - 1) varies slowly.
    x = (p - average) * per_mean
    y = tl.maximum(shifted * per_mean, 1.1754943508222875e-38)
    rounding = y - 1.0
    h = tl.log2(y) * (x / tl.where(rounding == 0.0, 1.0, rounding))
    h = tl.where(rounding == 0.0, x * 1.4426950408889634, h)
    return h, h - eps / shifted * 1.4426950408889634


@triton.jit(
    do_not_specialize=["length", "sums_stride", "batch", "first_sequence", "all_sequences", "divisor"],
)
def sequence_losses_kernel(
    norm_ptr,
    inverse_ptr,
    partners_ptr,
    sums_ptr,
    maxima_ptr,
    bounds_ptr,
    counts_ptr,
    tokens_ptr,
    loss_ptr,
    token_scale_ptr,
    shift_ptr,
    length,
    sums_stride,
    batch,
    first_sequence,
    all_sequences,
    divisor,
    constant,
    constant_rest,
    factor,
    ONLINE: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    WITH_SCALE: tl.constexpr,
    OF_TOKENS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    LOGARITHM: tl.constexpr,
    DIVIDE_BY_SEQUENCES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Kernel for the loss of one sequence of one row and the scale of its tokens, from the total of the partial sums,
    in fp64, relative to the largest maximum, which goes to ``shift``; NaN if a norm is not finite. The order of
    additions is fixed."""
    sequence = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    if HAS_BOUNDS:
        begin = tl.load(bounds_ptr + sequence).to(tl.int32)
        end = tl.load(bounds_ptr + sequence + 1).to(tl.int32)
        begin_token = begin
        end_token = end
    else:
        begin = 0
        end = sums_stride
        begin_token = 0
        end_token = length
    block = tl.arange(0, BLOCK)
    poison = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin_token, end_token, BLOCK):
        token = start + block
        poison += tl.load(norm_ptr + row * length + token, mask=token < end_token, other=0.0) * 0.0
    shift = _NO_EXPONENT
    if ONLINE:
        largest = tl.full((BLOCK,), _NO_EXPONENT, tl.float32)
        for start in range(begin, end, BLOCK):
            place = start + block
            m = tl.load(maxima_ptr + row * sums_stride + place, mask=place < end, other=_NO_EXPONENT)
            largest = tl.maximum(largest, m)
        shift = tl.max(largest, 0)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, BLOCK):
        place = start + block
        s = tl.load(sums_ptr + row * sums_stride + place, mask=place < end, other=0.0)
        if ONLINE:
            m = tl.load(maxima_ptr + row * sums_stride + place, mask=place < end, other=_NO_EXPONENT)
            s *= tl.exp2(m - shift)
        total += s.to(tl.float64)
    mean_of = tl.sum(total, 0) + tl.sum(poison, 0).to(tl.float64)
    tokens = length.to(tl.float64)
    if HAS_COUNTS:
        number = first_sequence + (sequence if HAS_BOUNDS else (row % batch).to(tl.int32))
        count = tl.load(counts_ptr + number).to(tl.float64)
        if DIAGONAL:
            tokens = tl.load(tokens_ptr + number).to(tl.float64)
    else:
        count = tokens if OF_TOKENS else tokens * (tokens - 1.0)
    nothing = count == 0.0
    if DIAGONAL:
        count += tokens
        mean_of += tokens
    count = tl.maximum(count, 1.0)
    if LOGARITHM:
        loss = tl.log(mean_of) - tl.log(count) + constant + constant_rest
        if ONLINE:
            loss += shift.to(tl.float64) * 0.6931471805599453
        scale = factor / mean_of
    else:
        loss = mean_of / count
        scale = factor / count
    weight = 1.0 / divisor.to(tl.float64)
    if DIVIDE_BY_SEQUENCES:
        counted = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, all_sequences, BLOCK):
            place = start + block
            counted += (tl.load(counts_ptr + place, mask=place < all_sequences, other=0) > 0).to(tl.int32)
        weight /= tl.maximum(tl.sum(counted, 0), 1).to(tl.float64)
    scale = tl.where(loss == loss, scale * weight, float("nan"))
    out = row * tl.num_programs(0) + sequence
    tl.store(loss_ptr + out, tl.where(nothing, 0.0, loss * weight))
    if ONLINE:
        tl.store(shift_ptr + out, shift)
    if WITH_SCALE:
        sequence_scale = tl.where(nothing, 0.0, scale).to(tl.float32)
        for start in range(begin_token, end_token, BLOCK):
            token = start + block
            inside = token < end_token
            token_scale = tl.load(inverse_ptr + row * length + token, mask=inside, other=0.0) * sequence_scale
            if HAS_COUNTS:
                paired = tl.load(partners_ptr + (row % batch) * length + token, mask=inside, other=0) > 0
                token_scale = tl.where(paired, token_scale, 0.0)
            tl.store(token_scale_ptr + row * length + token, token_scale, mask=inside)


@triton.jit(do_not_specialize=["batch", "length"])
def differences_kernel(
    layers,
    stride_b,
    stride_l,
    weight_sums_ptr,
    gradients,
    batch,
    length,
    features,
    width,
    LAYERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Kernel for w z - G, with w the sum of the token's weights, in place of G."""
    row = tl.program_id(1)
    layer = row // batch
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = tokens < length
    f = tl.arange(0, BLOCK_F)
    z = _layer_pointer(layers, layer, LAYERS) + (row % batch).to(tl.int64) * stride_b
    z += tl.minimum(tokens, length - 1).to(tl.int64)[:, None] * stride_l
    out = _layer_pointer(gradients, layer, LAYERS) + ((row % batch).to(tl.int64) * length + tokens)[:, None] * features
    weight_sum = tl.load(weight_sums_ptr + row.to(tl.int64) * length + tokens, mask=valid, other=0.0)
    for start in range(0, features, BLOCK_F):
        inside = valid[:, None] & (start + f < features)[None, :]
        x = tl.load(z + (start + f)[None, :], mask=(start + f < width)[None, :], other=0.0).to(tl.float32)
        g = tl.load(out + (start + f)[None, :], mask=inside, other=0.0)
        tl.store(out + (start + f)[None, :], weight_sum[:, None] * x - g, mask=inside)


@triton.jit(do_not_specialize=["batch", "length", "factor_stride_b", "factor_stride_l"])
def token_gradients_kernel(
    layers,
    stride_b,
    stride_l,
    gradients,
    scale_ptr,
    factor_ptr,
    outputs,
    factor_stride_b,
    factor_stride_l,
    batch,
    length,
    features,
    width,
    eps,
    TRANSFORM: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Kernel for the gradients of all layers from G = u: through the row transform, times scale and factor, in the
    dtype of the outputs.

    ``normalize``: u - z (z . u) / (|z| (|z| + eps)); ``standardize``: the same for u - mean(u) and z - mean(z);
    ``none``: u.
    """
    layer = tl.program_id(1)
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = tokens < batch.to(tl.int64) * length
    f = tl.arange(0, BLOCK_F)
    scale = tl.load(scale_ptr + layer.to(tl.int64) * batch * length + tokens, mask=valid, other=0.0)
    # Tokens of scale 0 may be NaN, as padding may.
    scaled = scale != 0.0
    b = tokens // length
    in_sequence = tokens % length
    scale *= tl.load(factor_ptr + b * factor_stride_b + in_sequence * factor_stride_l, mask=valid, other=0.0)
    z = _layer_pointer(layers, layer, LAYERS) + (b * stride_b + in_sequence * stride_l)[:, None]
    gradient = _layer_pointer(gradients, layer, LAYERS) + tokens[:, None] * features
    output = _layer_pointer(outputs, layer, LAYERS) + tokens[:, None] * features
    mean_z = tl.zeros((BLOCK_M,), tl.float32)
    mean_u = tl.zeros((BLOCK_M,), tl.float32)
    if TRANSFORM == "standardize":
        total_z = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
        total_u = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
        for start in range(0, features, BLOCK_F):
            inside = scaled[:, None] & (start + f < features)[None, :]
            total_z += tl.load(z + (start + f)[None, :], mask=inside, other=0.0).to(tl.float32)
            total_u += tl.load(gradient + (start + f)[None, :], mask=inside, other=0.0).to(tl.float32)
        mean_z = tl.sum(total_z, 1) / features
        mean_u = tl.sum(total_u, 1) / features
    if TRANSFORM != "none":
        products = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
        squares = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
        for start in range(0, features, BLOCK_F):
            inside = scaled[:, None] & (start + f < features)[None, :]
            x = tl.load(z + (start + f)[None, :], mask=inside, other=0.0).to(tl.float32)
            x = tl.where(inside, x - mean_z[:, None], 0.0)
            # z - mean(z) sums to 0, so its product with u equals its product with u - mean(u).
            products += tl.load(gradient + (start + f)[None, :], mask=inside, other=0.0).to(tl.float32) * x
            squares += x * x
        norm = tl.sqrt_rn(tl.sum(squares, 1))
        denominator = norm * (norm + eps)
        along = tl.where(denominator > 0, tl.sum(products, 1) / tl.where(denominator > 0, denominator, 1.0), 0.0)
    for start in range(0, features, BLOCK_F):
        inside = (start + f < features)[None, :]
        u = tl.load(gradient + (start + f)[None, :], mask=scaled[:, None] & inside, other=0.0).to(tl.float32)
        if TRANSFORM != "none":
            x = tl.load(z + (start + f)[None, :], mask=scaled[:, None] & inside, other=0.0).to(tl.float32)
            u = (u - mean_u[:, None]) - (x - mean_z[:, None]) * along[:, None]
        g = tl.where(scaled[:, None], u * scale[:, None], 0.0)
        if _INTERPRETED and output.dtype.element_ty == tl.bfloat16:
            # The interpreter cuts off what bf16 does not hold: half a unit in the last place, added before, rounds.
            bits = g.to(tl.int32, bitcast=True)
            bits = (bits + (0x7FFF + ((bits >> 16) & 1))) & -0x10000
            g = tl.where(g == g, bits.to(tl.float32, bitcast=True), g)
        tl.store(output + (start + f)[None, :], g.to(output.dtype.element_ty), mask=valid[:, None] & inside)
