"""The Triton kernels of GroupNorm + SiLU, launched by triton.py.

A program processes BLOCK_C channels and one chunk of their positions, BLOCK_P at a time. Its partial results
are stored at [n][chunk][channel]. Small kernels combine them in a fixed order, without atomics, so results
are deterministic. x is (N, C, S), where S counts the positions of all spatial dimensions. All arithmetic is
fp32. With distance = x - center, the activation's argument is z = weight * rstd * distance + bias, and dz is
the gradient with respect to z. The center is the mean of a group, at [n][group]. With input_bias, means and
distances are those of x + input_bias: x is loaded as it is, the partial means are shifted before they are
combined, and the center is mean - input_bias, at [n][channel]; `centers` is the number per sample.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _place(C, S, chunk, stride_c, stride_p, BLOCK_C: tl.constexpr):
    """Return the sample, chunk and first channel of this program, and their offset in x."""
    program, chunks, columns = tl.program_id(0), tl.cdiv(S, chunk), tl.cdiv(C, BLOCK_C)
    n, k = (program // chunks // columns).to(tl.int64), program % chunks
    first_channel = program // chunks % columns * BLOCK_C
    first_position = (k * chunk).to(tl.int64)
    return n, k, first_channel, n * C * S + first_channel.to(tl.int64) * stride_c + first_position * stride_p


@triton.jit
def _tile(first, stride_c, stride_p, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Return the offsets in x of a program's first tile, (BLOCK_C, BLOCK_P)."""
    return first + (tl.arange(0, BLOCK_C)[:, None] * stride_c + tl.arange(0, BLOCK_P)[None, :] * stride_p)


@triton.jit
def partial_moments(
    x_ptr,
    means_ptr,
    squares_ptr,
    C,
    S,
    chunk,
    stride_c,
    stride_p,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Compute the mean and the sum of squared distances from it, of each channel over the chunk.

    Welford's method runs per element of the tile; the elements are then combined.
    """
    n, k, first_channel, first = _place(C, S, chunk, stride_c, stride_p, BLOCK_C)
    tile = _tile(first, stride_c, stride_p, BLOCK_C, BLOCK_P)
    channels, positions = first_channel + tl.arange(0, BLOCK_C), k * chunk + tl.arange(0, BLOCK_P)
    end = tl.minimum(S, (k + 1) * chunk)
    mean = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    square = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in range(0, end - k * chunk, BLOCK_P):
        inside = (channels < C)[:, None] & (positions + start < S)[None, :]
        x = tl.load(x_ptr + tile, mask=inside, other=0.0).to(tl.float32)
        distance = tl.where(inside, x - mean, 0.0)
        mean += distance * (1.0 / (start // BLOCK_P + 1))
        square += distance * tl.where(inside, x - mean, 0.0)
        tile += BLOCK_P * stride_p
    count = tl.maximum((end - positions + BLOCK_P - 1) // BLOCK_P, 0).to(tl.float32)[None, :]
    total = (end - k * chunk).to(tl.float32)
    chunk_mean = tl.sum(mean * count, 1) / total
    distance = mean - chunk_mean[:, None]
    chunk_square = tl.sum(square + count * distance * distance, 1)
    partial = (n * tl.cdiv(S, chunk) + k) * C + channels
    tl.store(means_ptr + partial, chunk_mean, mask=channels < C)
    tl.store(squares_ptr + partial, chunk_square, mask=channels < C)


@triton.jit
def _partials_of_group(start, groups, C, S, chunk, BLOCK: tl.constexpr):
    """Return for BLOCK partial results of this program's group, from `start`: offset, channel, number of
    positions, and a mask of those that exist."""
    per_group, chunks = C // groups, tl.cdiv(S, chunk)
    n, g = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    i = start + tl.arange(0, BLOCK)
    k, channel = i // per_group, g * per_group + i % per_group
    return (n * chunks + k) * C + channel, channel, tl.minimum(chunk, S - k * chunk), i < chunks * per_group


@triton.jit
def _load_means(means_ptr, input_bias_ptr, partial, channel, exists):
    """Load partial means of x, and shift them to those of x + input_bias."""
    means = tl.load(means_ptr + partial, mask=exists, other=0.0)
    if input_bias_ptr is not None:
        means += tl.load(input_bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    return means


@triton.jit
def combine_moments(
    means_ptr,
    squares_ptr,
    input_bias_ptr,
    center_ptr,
    rstd_ptr,
    deviation_ptr,
    eps,
    groups,
    C,
    S,
    chunk,
    BLOCK: tl.constexpr,
):
    """Compute the center and rstd of a group and, with input_bias, how far its channels' means are from its
    mean: their deviation."""
    size = (C // groups).to(tl.float32) * S
    count = tl.cdiv(S, chunk) * (C // groups)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        partial, channel, positions, exists = _partials_of_group(start, groups, C, S, chunk, BLOCK)
        sums += _load_means(means_ptr, input_bias_ptr, partial, channel, exists) * (positions / size)
    mean = tl.sum(sums, 0)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        partial, channel, positions, exists = _partials_of_group(start, groups, C, S, chunk, BLOCK)
        distance = _load_means(means_ptr, input_bias_ptr, partial, channel, exists) - mean
        square = tl.load(squares_ptr + partial, mask=exists, other=0.0) + positions * distance * distance
        squares += tl.where(exists, square, 0.0)
    variance = tl.sum(squares, 0) / size
    tl.store(rstd_ptr + tl.program_id(0), 1.0 / tl.sqrt_rn(variance + eps))
    if input_bias_ptr is None:
        tl.store(center_ptr + tl.program_id(0), mean)
    else:
        n, chunks = (tl.program_id(0) // groups).to(tl.int64), tl.cdiv(S, chunk)
        first = tl.program_id(0) % groups * (C // groups)
        for channel in range(first, first + C // groups):
            center = mean - tl.load(input_bias_ptr + channel).to(tl.float32)
            distances = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, chunks, BLOCK):
                k = start + tl.arange(0, BLOCK)
                partial, exists = (n * chunks + k) * C + channel, k < chunks
                distance = tl.load(means_ptr + partial, mask=exists, other=0.0) - center
                distances += tl.where(exists, distance * (tl.minimum(chunk, S - k * chunk) / S), 0.0)
            tl.store(center_ptr + n * C + channel, center)
            tl.store(deviation_ptr + n * C + channel, tl.sum(distances, 0))


@triton.jit
def _load_per_group(pointer, n, channels, groups, C):
    """Load for each channel the value of its group in (N, groups), as a column; `groups` may be C."""
    g = channels // (C // groups)
    return tl.load(pointer + n * groups + g, mask=channels < C, other=0.0)[:, None]


@triton.jit
def _load_per_channel(pointer, channels, C):
    """Load the value of each channel in (C,), as a column."""
    return tl.load(pointer + channels, mask=channels < C, other=0.0).to(tl.float32)[:, None]


@triton.jit
def normalize(
    x_ptr,
    weight_ptr,
    bias_ptr,
    center_ptr,
    rstd_ptr,
    y_ptr,
    groups,
    centers,
    C,
    S,
    chunk,
    stride_c,
    stride_p,
    ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    n, k, first_channel, first = _place(C, S, chunk, stride_c, stride_p, BLOCK_C)
    tile = _tile(first, stride_c, stride_p, BLOCK_C, BLOCK_P)
    channels, positions = first_channel + tl.arange(0, BLOCK_C), k * chunk + tl.arange(0, BLOCK_P)
    center = _load_per_group(center_ptr, n, channels, centers, C)
    scale = _load_per_group(rstd_ptr, n, channels, groups, C) * _load_per_channel(weight_ptr, channels, C)
    bias = _load_per_channel(bias_ptr, channels, C)
    for start in range(0, tl.minimum(chunk, S - k * chunk), BLOCK_P):
        inside = (channels < C)[:, None] & (positions + start < S)[None, :]
        x = tl.load(x_ptr + tile, mask=inside, other=0.0).to(tl.float32)
        z = (x - center) * scale + bias
        y = z * tl.sigmoid(z) if ACTIVATION else z
        tl.store(y_ptr + tile, y.to(y_ptr.dtype.element_ty), mask=inside)
        tile += BLOCK_P * stride_p


@triton.jit
def _gradient_of_z(grad, z, ACTIVATION: tl.constexpr):
    """Return dz = grad * silu'(z), or grad without activation."""
    if ACTIVATION:
        s = tl.sigmoid(z)
        grad *= s * (1.0 + z * (1.0 - s))
    return grad


@triton.jit
def partial_gradients(
    grad_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    center_ptr,
    rstd_ptr,
    sums_dz_ptr,
    sums_dz_distance_ptr,
    groups,
    centers,
    C,
    S,
    chunk,
    stride_c,
    stride_p,
    ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Compute the sums of dz and of dz * distance, of each channel over the chunk."""
    n, k, first_channel, first = _place(C, S, chunk, stride_c, stride_p, BLOCK_C)
    tile = _tile(first, stride_c, stride_p, BLOCK_C, BLOCK_P)
    channels, positions = first_channel + tl.arange(0, BLOCK_C), k * chunk + tl.arange(0, BLOCK_P)
    center = _load_per_group(center_ptr, n, channels, centers, C)
    scale = _load_per_group(rstd_ptr, n, channels, groups, C) * _load_per_channel(weight_ptr, channels, C)
    bias = _load_per_channel(bias_ptr, channels, C)
    sum_dz = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    sum_dz_distance = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in range(0, tl.minimum(chunk, S - k * chunk), BLOCK_P):
        inside = (channels < C)[:, None] & (positions + start < S)[None, :]
        x = tl.load(x_ptr + tile, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + tile, mask=inside, other=0.0).to(tl.float32)
        distance = x - center
        dz = _gradient_of_z(grad, distance * scale + bias, ACTIVATION)
        sum_dz += dz
        sum_dz_distance += dz * distance
        tile += BLOCK_P * stride_p
    partial = (n * tl.cdiv(S, chunk) + k) * C + channels
    tl.store(sums_dz_ptr + partial, tl.sum(sum_dz, 1), mask=channels < C)
    tl.store(sums_dz_distance_ptr + partial, tl.sum(sum_dz_distance, 1), mask=channels < C)


@triton.jit
def combine_group_gradients(
    sums_dz_ptr,
    sums_dz_distance_ptr,
    rstd_ptr,
    weight_ptr,
    mean_dz_ptr,
    mean_dz_xhat_ptr,
    groups,
    C,
    S,
    chunk,
    BLOCK: tl.constexpr,
):
    """Compute the means of weight * dz and of weight * dz * xhat over each group."""
    dz = tl.zeros((BLOCK,), tl.float32)
    dz_distance = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tl.cdiv(S, chunk) * (C // groups), BLOCK):
        partial, channel, _positions, exists = _partials_of_group(start, groups, C, S, chunk, BLOCK)
        weight = tl.load(weight_ptr + channel, mask=exists, other=0.0).to(tl.float32)
        dz += weight * tl.load(sums_dz_ptr + partial, mask=exists, other=0.0)
        dz_distance += weight * tl.load(sums_dz_distance_ptr + partial, mask=exists, other=0.0)
    size = (C // groups).to(tl.float32) * S
    rstd = tl.load(rstd_ptr + tl.program_id(0))
    tl.store(mean_dz_ptr + tl.program_id(0), tl.sum(dz, 0) / size)
    tl.store(mean_dz_xhat_ptr + tl.program_id(0), tl.sum(dz_distance, 0) * rstd / size)


@triton.jit
def combine_channel_gradients(
    sums_dz_ptr,
    sums_dz_distance_ptr,
    rstd_ptr,
    weight_ptr,
    mean_dz_ptr,
    mean_dz_xhat_ptr,
    deviation_ptr,
    dweight_ptr,
    dbias_ptr,
    dinput_bias_ptr,
    N,
    groups,
    C,
    S,
    chunk,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute the gradients of weight and bias: sums over samples and chunks.

    That of input_bias is the sum of dx (see input_gradient). The sum of distance is known from the deviation
    of the channel's mean.
    """
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    chunks = tl.cdiv(S, chunk)
    dbias = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    dweight = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    if dinput_bias_ptr is not None:
        dinput_bias = tl.zeros((BLOCK, BLOCK_C), tl.float32)
        weight = tl.load(weight_ptr + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
    for start in range(0, N * chunks, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = (rows < N * chunks)[:, None] & (channels < C)[None, :]
        partial = rows.to(tl.int64)[:, None] * C + channels[None, :]
        group = (rows // chunks)[:, None] * groups + (channels // (C // groups))[None, :]
        rstd = tl.load(rstd_ptr + group, mask=inside, other=0.0)
        sum_dz = tl.load(sums_dz_ptr + partial, mask=inside, other=0.0)
        dbias += sum_dz
        dweight += tl.load(sums_dz_distance_ptr + partial, mask=inside, other=0.0) * rstd
        if dinput_bias_ptr is not None:
            mean_dz = tl.load(mean_dz_ptr + group, mask=inside, other=0.0)
            mean_dz_xhat = tl.load(mean_dz_xhat_ptr + group, mask=inside, other=0.0)
            sample = (rows // chunks).to(tl.int64)[:, None]
            deviation = tl.load(deviation_ptr + sample * C + channels[None, :], mask=inside, other=0.0)
            positions = tl.minimum(chunk, S - rows % chunks * chunk)[:, None]
            constant = positions * (mean_dz + rstd * deviation * mean_dz_xhat)
            dinput_bias += rstd * (weight * sum_dz - constant)
    tl.store(dbias_ptr + channels, tl.sum(dbias, 0).to(dbias_ptr.dtype.element_ty), mask=channels < C)
    tl.store(dweight_ptr + channels, tl.sum(dweight, 0).to(dweight_ptr.dtype.element_ty), mask=channels < C)
    if dinput_bias_ptr is not None:
        total = tl.sum(dinput_bias, 0).to(dinput_bias_ptr.dtype.element_ty)
        tl.store(dinput_bias_ptr + channels, total, mask=channels < C)


@triton.jit
def input_gradient(
    grad_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    center_ptr,
    rstd_ptr,
    mean_dz_ptr,
    mean_dz_xhat_ptr,
    dx_ptr,
    groups,
    centers,
    C,
    S,
    chunk,
    stride_c,
    stride_p,
    ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Compute dx = rstd * (weight * dz - mean_dz - xhat * mean_dz_xhat)."""
    n, k, first_channel, first = _place(C, S, chunk, stride_c, stride_p, BLOCK_C)
    tile = _tile(first, stride_c, stride_p, BLOCK_C, BLOCK_P)
    channels, positions = first_channel + tl.arange(0, BLOCK_C), k * chunk + tl.arange(0, BLOCK_P)
    center = _load_per_group(center_ptr, n, channels, centers, C)
    rstd = _load_per_group(rstd_ptr, n, channels, groups, C)
    scale = rstd * _load_per_channel(weight_ptr, channels, C)
    bias = _load_per_channel(bias_ptr, channels, C)
    constant = rstd * _load_per_group(mean_dz_ptr, n, channels, groups, C)
    slope = rstd * rstd * _load_per_group(mean_dz_xhat_ptr, n, channels, groups, C)
    for start in range(0, tl.minimum(chunk, S - k * chunk), BLOCK_P):
        inside = (channels < C)[:, None] & (positions + start < S)[None, :]
        x = tl.load(x_ptr + tile, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + tile, mask=inside, other=0.0).to(tl.float32)
        distance = x - center
        dz = _gradient_of_z(grad, distance * scale + bias, ACTIVATION)
        dx = scale * dz - constant - distance * slope
        tl.store(dx_ptr + tile, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        tile += BLOCK_P * stride_p
