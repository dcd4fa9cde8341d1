// What gpu_check measures beside: resampling with a thread for each element, each with its own search, the way it
// is usually written. Not part of the product. One batch element after another: src [B, S, D] bf16, times [B, S] f32.
extern "C" __global__ void naive_bf16_f32(
    unsigned short* __restrict__ out, const unsigned short* __restrict__ src, const float* __restrict__ times,
    const float* __restrict__ targets, unsigned batch, unsigned rows, unsigned dim, unsigned steps) {
    const size_t item = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= (size_t)batch * steps * dim) return;
    const unsigned d = item % dim;
    const size_t target = item / dim;
    const unsigned b = target / steps;
    const float t = targets[target];
    const float* at = times + (size_t)b * rows;
    unsigned low = 0, high = rows;
    while (low < high) {
        const unsigned middle = (low + high) / 2;
        if (at[middle] <= t) low = middle + 1; else high = middle;
    }
    const unsigned before = low == 0 ? 0 : low - 1, after = low == rows ? rows - 1 : low;
    const unsigned short* values = src + (size_t)b * rows * dim + d;
    const float a = __uint_as_float((unsigned)values[(size_t)before * dim] << 16);
    const float z = __uint_as_float((unsigned)values[(size_t)after * dim] << 16);
    const float span = at[after] - at[before];
    const float w = span > 0.0f && t > at[before] ? (t - at[before]) / span : 0.0f;
    const float value = fmaf(w, z, fmaf(-w, a, a));
    unsigned short raw;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(raw) : "f"(value));
    out[item] = raw;
}
