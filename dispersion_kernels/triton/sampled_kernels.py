"""The Triton kernels of sampled pairs (:mod:`dispersion_kernels.sampling`), in the order in which they run.

A token's number counts those of all layers, as its statistics are stored; x is the token through the row transform, in
fp32. Tokens of a clique or of a chunk are read through the order, and places beyond its last one as its first, so that
nothing of another unit is touched. Features phi are ``[tokens, MODEL]`` fp32, of which the first is 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dispersion_kernels.triton.kernels import _dot, _of_layer, _products, _weigh


@triton.jit
def _x(z, inverse, extra, features, TRANSFORM: tl.constexpr):
    x = z.to(tl.float32)
    if TRANSFORM == "standardize":
        x -= (extra / tl.sqrt_rn(features.to(tl.float32)))[:, None]
    return x * inverse[:, None]


@triton.jit
def _token(order_ptr, place, valid, other, HAS_ORDER: tl.constexpr):
    """Which token is at a place of the order, ``other`` where it is not valid."""
    return tl.load(order_ptr + place, mask=valid, other=other) if HAS_ORDER else tl.where(valid, place, other)


@triton.jit(do_not_specialize=["batch", "length"])
def features_kernel(
    layers,
    stride_b,
    stride_l,
    inverse_ptr,
    extra_ptr,
    directions_ptr,
    phi_ptr,
    batch,
    length,
    features,
    width,
    TRANSFORM: tl.constexpr,
    RANK: tl.constexpr,
    SQUARED: tl.constexpr,
    MODEL: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """phi of the tokens as they lie: 1, the components along the layer's directions, the products of two of the first,
    and zeros."""
    row = tl.program_id(1)
    layer = row // batch
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    read = tl.minimum(i, length - 1).to(tl.int64)
    z = _of_layer(layers, layer, LAYERS) + (row % batch).to(tl.int64) * stride_b + read[:, None] * stride_l
    token = row.to(tl.int64) * length + read
    inverse = tl.load(inverse_ptr + token)
    extra = tl.load(extra_ptr + token)
    n = tl.arange(0, MODEL)
    k = tl.arange(0, BLOCK_K)
    directions = directions_ptr + (layer * RANK + n - 1).to(tl.int64)[None, :] * features
    along = ((n > 0) & (n <= RANK))[None, :]
    y = tl.zeros((BLOCK_M, MODEL), tl.float32)
    for start in range(0, features, BLOCK_K):
        inside = start + k < features
        x = tl.load(z + (start + k)[None, :], mask=(start + k < width)[None, :], other=0.0)
        direction = tl.load(directions + (start + k)[:, None], mask=inside[:, None] & along, other=0.0)
        y = _dot(_x(x, inverse, extra, features, TRANSFORM), direction, y, PRECISION)
    phi = tl.where(n[None, :] == 0, 1.0, y)
    for one in tl.static_range(SQUARED):
        y_one = tl.sum(tl.where(n[None, :] == 1 + one, y, 0.0), 1)
        for other in tl.static_range(one, SQUARED):
            y_other = tl.sum(tl.where(n[None, :] == 1 + other, y, 0.0), 1)
            column = 1 + RANK + one * (2 * SQUARED - one - 1) // 2 + other
            phi = tl.where(n[None, :] == column, (y_one * y_other)[:, None], phi)
    tl.store(phi_ptr + token[:, None] * MODEL + n[None, :], phi, mask=(i < length)[:, None])


@triton.jit(do_not_specialize=["batch", "length"])
def model_sums_kernel(
    layers,
    stride_b,
    stride_l,
    norm_ptr,
    inverse_ptr,
    extra_ptr,
    phi_ptr,
    order_ptr,
    begins_ptr,
    ends_ptr,
    sums_ptr,
    squares_ptr,
    batch,
    length,
    features,
    width,
    TRANSFORM: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    MODEL: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """T_k = sum_j phi_jk x_j over the tokens of a chunk of a unit, ``BLOCK_F`` features of it, to ``sums`` ``[chunks,
    MODEL, F]``; and their sum of |x_j|^2, NaN where one is not finite. ``MODEL`` of 1: phi is 1 alone, and not read."""
    chunk = tl.program_id(0)
    begin = tl.load(begins_ptr + chunk)
    end = tl.load(ends_ptr + chunk)
    first = _token(order_ptr, begin, begin < end, 0, HAS_ORDER)
    row = first // length
    z = _of_layer(layers, row // batch, LAYERS) + (row % batch) * stride_b
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    k = tl.arange(0, MODEL)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((MODEL if MODEL > 1 else BLOCK_M, BLOCK_F), tl.float32)
    for start in range(begin, end, BLOCK_M):
        place = start + tl.arange(0, BLOCK_M)
        valid = place < end
        token = _token(order_ptr, place, valid, first, HAS_ORDER)
        x = tl.load(
            z + (token - row * length)[:, None] * stride_l + f[None, :],
            mask=(f < width)[None, :],
            other=0.0,
        )
        inverse = tl.load(inverse_ptr + token)
        x = _x(x, inverse, tl.load(extra_ptr + token), features, TRANSFORM)
        if MODEL > 1:
            phi = tl.load(phi_ptr + token[None, :] * MODEL + k[:, None], mask=valid[None, :], other=0.0)
            total = _dot(phi, x, total, PRECISION)
        else:
            total += tl.where(valid[:, None], x, 0.0)
        norm = tl.load(norm_ptr + token)
        squares += tl.where(valid, (norm * inverse) * (norm * inverse) + norm * 0.0, 0.0)
    out = sums_ptr + chunk.to(tl.int64) * MODEL * features + f
    if MODEL > 1:
        tl.store(out[None, :] + k[:, None] * features, total, mask=(f < features)[None, :])
    else:
        tl.store(out, tl.sum(total, 0), mask=f < features)
    if tl.program_id(1) == 0:
        tl.store(squares_ptr + chunk, tl.sum(squares, 0))


@triton.jit
def _weight_scale(inverse_ptr, order_ptr, begin, tokens, first, exponent, HAS_ORDER: tl.constexpr, BLOCK: tl.constexpr):
    """A power of two that keeps slopes times it and an inverse norm of the clique in the range of fp16; ``exponent`` is
    its own for the largest inverse in [1, 2)."""
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tokens, BLOCK):
        j = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(inverse_ptr + _token(order_ptr, begin + j, j < tokens, first, HAS_ORDER)))
    largest = tl.max(largest, 0)
    return tl.exp2(exponent - tl.floor(tl.log2(tl.where(largest > 0, largest, 1.0))))


@triton.jit
def _of_pairs(values, i, j, valid_j, masked, diagonal):
    """``values`` of the tokens i and j, 0 where j is none or i itself."""
    if masked:
        values = tl.where(valid_j[None, :], values, 0.0)
    if diagonal:
        values = tl.where(i[:, None] != j[None, :], values, 0.0)
    return values


@triton.jit
def _expanded(
    z_i, inverse_i, weighted, own, total, f, features, modelled, MODEL: tl.constexpr, PRECISION: tl.constexpr
):
    """sum_k b_k phi_ik T_k - h_ii x_i, ``weighted`` being b_k phi_ik and ``own`` h_ii."""
    inside = f < tl.where(modelled, features, 0)
    if MODEL > 1:
        k = tl.arange(0, MODEL)
        of_unit = tl.load(total + k[:, None] * features + f[None, :], mask=inside[None, :], other=0.0)
        expanded = tl.dot(weighted, of_unit, input_precision=PRECISION)
    else:
        expanded = own * tl.load(total + f, mask=inside, other=0.0)[None, :]
    return expanded - own * (z_i.to(tl.float32) * inverse_i[:, None])


@triton.jit(do_not_specialize=["batch", "length", "tiles"])
def clique_sweep_kernel(
    layers,
    stride_b,
    stride_l,
    norm_ptr,
    inverse_ptr,
    extra_ptr,
    order_ptr,
    bounds_ptr,
    unit_ptr,
    inverse_share_ptr,
    phi_ptr,
    b_ptr,
    total_ptr,
    sums_ptr,
    gradient_ptr,
    batch,
    length,
    features,
    width,
    tiles,
    weight_exponent,
    p0,
    p1,
    p2,
    p3,
    FUNCTION: tl.constexpr,
    OWN: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    TRANSFORM: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    MODEL: tl.constexpr,
    VISITED: tl.constexpr,
    GRADIENT: tl.constexpr,
    NARROW: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    MODEL_PRECISION: tl.constexpr,
):
    """A tile of tokens of a clique against all of the clique: the sums of psi and of c over these pairs to ``sums``
    ``[2, cliques, tiles]``, and, with ``GRADIENT``, ``1/p sum_j (slope_ij - h_ij) x_j + sum_k b_k phi_ik T_k - h_ii
    x_i`` to the place of each token, but for what of it is along the ones (``standardize``), which the row transform
    takes away.

    ``MODEL``: the number of features, 1 for a constant, 0 for h = 0; ``unit`` is the T of a clique, negative for one
    that is all of its unit and needs none. Without ``VISITED`` (share 0) it is the expansion alone. A tile of weights
    meets all slices of the features in turn, so that similarities are computed once; with more than one tile the
    gradient is read back and added to. ``NARROW``: weights are fp16.
    """
    clique = tl.program_id(0) // tiles
    tile_i = tl.program_id(0) % tiles
    begin = tl.load(bounds_ptr + clique)
    tokens = (tl.load(bounds_ptr + clique + 1) - begin).to(tl.int32)
    if (tile_i * BLOCK_M >= tokens) | (tokens < 2):
        if VISITED:
            tl.store(sums_ptr + tl.program_id(0), 0.0)
            tl.store(sums_ptr + tl.num_programs(0) + tl.program_id(0), 0.0)
        return
    first = _token(order_ptr, begin, tokens > 0, 0, HAS_ORDER)
    row = first // length
    z = _of_layer(layers, row // batch, LAYERS) + (row % batch) * stride_b
    i = tile_i * BLOCK_M + tl.arange(0, BLOCK_M)
    valid_i = i < tokens
    token_i = _token(order_ptr, begin + i, valid_i, first, HAS_ORDER)
    read_i = (token_i - row * length) * stride_l
    inverse_i = tl.load(inverse_ptr + token_i)
    extra_i = tl.load(extra_ptr + token_i)
    unit = tl.load(unit_ptr + clique)
    modelled = unit >= 0
    weighted = 0.0
    own = 0.0
    if MODEL > 1:
        k = tl.arange(0, MODEL)
        b = tl.load(b_ptr + (row // batch) * MODEL + k, mask=k < tl.where(modelled, MODEL, 0), other=0.0)
        phi_i = tl.load(phi_ptr + token_i[:, None] * MODEL + k[None, :])
        weighted = phi_i * b[None, :]
        own = tl.sum(weighted * phi_i, 1)[:, None]
    elif MODEL == 1:
        own = tl.load(b_ptr + row // batch, mask=modelled, other=0.0)
    total = total_ptr + unit * MODEL * features
    out = gradient_ptr + token_i[:, None] * features

    if VISITED:
        inverse_share = tl.load(inverse_share_ptr + clique).to(tl.float32)
        weight_scale = 1.0
        if NARROW:
            weight_scale = _weight_scale(
                inverse_ptr, order_ptr, begin, tokens, first, weight_exponent, HAS_ORDER, BLOCK_N
            )
        psi_sums = tl.load(norm_ptr + token_i) * 0.0
        c_sums = tl.zeros((BLOCK_M,), tl.float32)
        for tile_j in range(0, tl.cdiv(tokens, BLOCK_N)):
            j = tile_j * BLOCK_N + tl.arange(0, BLOCK_N)
            valid_j = j < tokens
            token_j = _token(order_ptr, begin + j, valid_j, first, HAS_ORDER)
            read_j = (token_j - row * length) * stride_l
            c = _products(z, read_i, read_j, width, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION)
            inverse_j = tl.load(inverse_ptr + token_j)
            extra_j = tl.load(extra_ptr + token_j)
            masked = tile_j * BLOCK_N + BLOCK_N > tokens
            diagonal = (tile_j * BLOCK_N < tile_i * BLOCK_M + BLOCK_M) & (tile_i * BLOCK_M < tile_j * BLOCK_N + BLOCK_N)
            u, v = _weigh(
                c,
                inverse_i,
                inverse_j,
                extra_i,
                extra_j,
                i,
                j,
                tl.zeros((BLOCK_M,), tl.int32),
                tl.where(valid_j, 0, -1),
                masked,
                diagonal,
                0.0,
                p0,
                p1,
                p2,
                p3,
                FUNCTION,
                OWN,
                EXPONENTIAL,
                TRANSFORM,
            )
            if EXPONENTIAL:
                psi = tl.exp2(u)
                slope = psi * v
            else:
                psi = u
                slope = v
            psi_sums += tl.sum(psi, 1)
            if MODEL > 0:
                if TRANSFORM == "standardize":
                    c -= extra_i[:, None] * extra_j[None, :]
                c = c * inverse_i[:, None] * inverse_j[None, :]
                c_sums += tl.sum(_of_pairs(c, i, j, valid_j, masked, diagonal), 1)
            if GRADIENT:
                if MODEL > 1:
                    phi_j = tl.load(phi_ptr + token_j[None, :] * MODEL + k[:, None])
                    slope -= tl.dot(weighted, phi_j, input_precision=MODEL_PRECISION)
                elif MODEL == 1:
                    slope -= own
                if MODEL > 0:
                    slope = _of_pairs(slope, i, j, valid_j, masked, diagonal)
                weights = (slope * (inverse_j * weight_scale)[None, :]).to(z.dtype.element_ty)
                for start in range(0, features, BLOCK_F):
                    f = start + tl.arange(0, BLOCK_F)
                    inside = (f < features)[None, :]
                    z_j = tl.load(z + read_j[:, None] + f[None, :], mask=(f < width)[None, :], other=0.0)
                    gradient = _dot(weights, z_j, tl.zeros((BLOCK_M, BLOCK_F), tl.float32), PRECISION)
                    gradient = gradient * (inverse_share / weight_scale)
                    if tile_j > 0:
                        gradient += tl.load(out + f[None, :], mask=valid_i[:, None] & inside, other=0.0)
                    elif MODEL > 0:
                        z_i = tl.load(z + read_i[:, None] + f[None, :], mask=(f < width)[None, :], other=0.0)
                        gradient += _expanded(
                            z_i, inverse_i, weighted, own, total, f, features, modelled, MODEL, MODEL_PRECISION
                        )
                    tl.store(out + f[None, :], gradient, mask=valid_i[:, None] & inside)
                tl.debug_barrier()  # what one thread stored, another may read
        at = sums_ptr + tl.program_id(0)
        tl.store(at, tl.sum(tl.where(valid_i, psi_sums, 0.0), 0))
        tl.store(at + tl.num_programs(0), tl.sum(tl.where(valid_i, c_sums, 0.0), 0))
    else:
        for start in range(0, features, BLOCK_F):
            f = start + tl.arange(0, BLOCK_F)
            inside = (f < features)[None, :]
            z_i = tl.load(z + read_i[:, None] + f[None, :], mask=(f < width)[None, :], other=0.0)
            gradient = _expanded(z_i, inverse_i, weighted, own, total, f, features, modelled, MODEL, MODEL_PRECISION)
            tl.store(out + f[None, :], gradient, mask=valid_i[:, None] & inside)
