// Linear resampling of plain tensors onto one time axis, and the fusion of several into one: one launch.
//
//   for each stream k:  src [B, S, D] row-major,  times [B, S] ascending
//   targets [B, T]      out [B, T, sum of D]: stream k's columns begin at column[k]
//
// out[b, t] of a stream lies on the line between the rows around targets[b, t]; before the first row and after the
// last it holds that row. Equal times take the later row; a target that is a time is that row, bit for bit; a
// NaN target gives a NaN row. Times are compared in their own type, the weight is an f64 quotient. The twin is
// kernels/src/tensors.rs, and both have the same bits.
//
// Grid: x over tiles, all streams' one after another (first_block); a tile is rows_per_tile (at most MAX_TILE) rows
// of one batch element. Its threads find one target each, then share the tile's elements. No dimension is 0, S is
// less than 2^32: launch.rs checks. Streams travel as a kernel parameter, so that a captured graph holds them;
// kernels for 8 and for 80 streams, since a launch costs by the size of its parameters.
#include "convert.cuh"

struct Stream {
    const void* src;
    const void* times;
    unsigned rows;
    unsigned dim;
    unsigned rows_per_tile;
    unsigned tiles;
    unsigned first_block;
    unsigned column;
    unsigned short pack;         // elements of an access that pointers, dims and columns allow: 16 or 8 bytes' worth, or 1
    unsigned short rows_a_turn;  // THREADS / (dim / pack)
    unsigned per_tiles;  // 2^32 / tiles, at most 2^32 - 1
};

template <unsigned MAX>
struct Plan {
    void* out;
    const void* targets;
    unsigned steps;
    unsigned width;  // sum of dims
    unsigned n_streams;
    unsigned unused;
    Stream streams[MAX];
};

constexpr unsigned MAX_TILE = 128;

static __device__ __forceinline__ double weight_of(float t, float before, float after) {
    return ((double)t - (double)before) / ((double)after - (double)before);
}
static __device__ __forceinline__ double weight_of(double t, double before, double after) {
    return (t - before) / (after - before);
}
static __device__ __forceinline__ double weight_of(long long t, long long before, long long after) {
    return __ull2double_rn((unsigned long long)t - (unsigned long long)before) /
           __ull2double_rn((unsigned long long)after - (unsigned long long)before);
}
static __device__ __forceinline__ bool is_nan(float t) { return t != t; }
static __device__ __forceinline__ bool is_nan(double t) { return t != t; }
static __device__ __forceinline__ bool is_nan(long long) { return false; }

// How many of the first `high` entries are at or before t, given that the first `low` are. The ends of eight equal
// parts are looked at together: a third of the waits of halving.
template <class Time, class At>
static __device__ __forceinline__ unsigned count_until(unsigned low, unsigned high, Time t, At at) {
    while (low < high) {
        const unsigned part = (high - low + 7) / 8;
        unsigned until = 0;
#pragma unroll
        for (unsigned k = 1; k <= 8; ++k) {
            const unsigned end = low + k * part - 1;
            if (end < high) until += at(end) <= t;
        }
        low += until * part;
        high = min(high, low + part - 1);
    }
    return low;
}

// pivots[p] is times[p * stride]; those past the end were left out: there are `n_pivots`.
template <class Time>
static __device__ __forceinline__ Pick find(
    const Time* __restrict__ times, unsigned rows, Time t, const Time* pivots, unsigned n_pivots, unsigned stride) {
    if (is_nan(t)) return Pick{__longlong_as_double(0x7ff8000000000000LL), 0, 0.0f};
    const unsigned passed = count_until(0, n_pivots, t, [&](unsigned at) { return pivots[at]; });
    if (passed == 0) return pick_of(0.0, 0);
    if (stride == 1) {
        if (passed == rows) return pick_of(0.0, passed - 1);
        return pick_of(weight_of(t, pivots[passed - 1], pivots[passed]), passed - 1);
    }
    const unsigned first = (passed - 1) * stride + 1, end = min(first + stride - 1, rows);
    const unsigned after = count_until(first, end, t, [&](unsigned at) { return __ldg(times + at); });
    if (after == rows) return pick_of(0.0, after - 1);
    return pick_of(weight_of(t, __ldg(times + after - 1), __ldg(times + after)), after - 1);
}

// A NaN target makes every element NaN, also of a stream of one row, which has no second one to blend with.
template <class Element>
static __device__ __forceinline__ void nan_rows(
    typename Element::Raw* out, size_t width, unsigned dim, const Pick* picks, unsigned n) {
    const unsigned items = n * dim;
    for (unsigned item = threadIdx.x; item < items; item += THREADS) {
        const unsigned step = item / dim;
        if (picks[step].weight != picks[step].weight) {
            out[step * width + (item - step * dim)] = Element::narrow(__uint_as_float(0x7fc00000u));
        }
    }
}

template <class Element, class Time, unsigned MAX>
static __device__ __forceinline__ void resample(const Plan<MAX>& plan) {
    typedef typename Element::Raw Raw;
    constexpr unsigned PIVOTS = 512;
    __shared__ Pick picks[MAX_TILE];
    __shared__ Time pivots[PIVOTS];
    __shared__ unsigned any_nan;
    let_next_be_placed();
    unsigned index = 0;
    while (index + 1 < plan.n_streams && plan.streams[index + 1].first_block <= blockIdx.x) ++index;
    const Stream stream = plan.streams[index];
    const unsigned block = blockIdx.x - stream.first_block;
    const unsigned batch = quotient(block, stream.tiles, stream.per_tiles);
    const unsigned step0 = (block - batch * stream.tiles) * stream.rows_per_tile;
    const unsigned n = min(stream.rows_per_tile, plan.steps - step0);

    const Time* times = static_cast<const Time*>(stream.times) + (size_t)batch * stream.rows;
    const size_t target0 = (size_t)batch * plan.steps + step0;
    const Time* targets = static_cast<const Time*>(plan.targets) + target0;
    await_previous(times, targets);
    Time t = 0;
    if (threadIdx.x < n) t = __ldg(targets + threadIdx.x);
    if (threadIdx.x == 0) any_nan = 0;
    const unsigned stride = (stream.rows + PIVOTS - 1) / PIVOTS;
    const unsigned n_pivots = (stream.rows + stride - 1) / stride;
    Time found[PIVOTS / THREADS];
#pragma unroll
    for (unsigned k = 0; k < PIVOTS / THREADS; ++k) {
        const unsigned pivot = threadIdx.x + k * THREADS;
        if (pivot < n_pivots) found[k] = __ldg(times + (size_t)pivot * stride);
    }
#pragma unroll
    for (unsigned k = 0; k < PIVOTS / THREADS; ++k) {
        const unsigned pivot = threadIdx.x + k * THREADS;
        if (pivot < n_pivots) pivots[pivot] = found[k];
    }
    __syncthreads();
    if (threadIdx.x < n) {
        Pick pick = find(times, stream.rows, t, pivots, n_pivots, stride);
        // Infinite times can give a NaN weight between two rows as well; it is a NaN row either way.
        if (pick.weight != pick.weight) {
            any_nan = 1;
            pick.row = 0;
        }
        picks[threadIdx.x] = pick;
    }
    __syncthreads();

    const Raw* src = static_cast<const Raw*>(stream.src) + (size_t)batch * stream.rows * stream.dim;
    Raw* out = static_cast<Raw*>(plan.out) + target0 * plan.width + stream.column;
    if (any_nan) {
        nan_rows<Element>(out, plan.width, stream.dim, picks, n);
        // The others one by one, so that no NaN pick is read as a pair of rows.
        for (unsigned step = 0; step < n; ++step) {
            if (picks[step].weight == picks[step].weight) {
                blend<Element, Element, 1>(out + step * (size_t)plan.width, plan.width, src, stream.dim, picks + step, 1, THREADS / stream.dim);
            }
        }
        return;
    }
    constexpr unsigned FULL = 16 / sizeof(Raw);
    constexpr unsigned HALF = 8 / sizeof(Raw);
    if (stream.pack == FULL) blend<Element, Element, FULL>(out, plan.width, src, stream.dim, picks, n, stream.rows_a_turn);
    else if (HALF > 1 && stream.pack == HALF) blend<Element, Element, HALF>(out, plan.width, src, stream.dim, picks, n, stream.rows_a_turn);
    else blend<Element, Element, 1>(out, plan.width, src, stream.dim, picks, n, stream.rows_a_turn);
}

// Elements of 2 bytes: at least 6 blocks a multiprocessor, so at most 40 registers, though some path spills a word.
#define KERNEL(element, Element, time, Time, MAX)                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, sizeof(Element::Raw) == 2 ? 6 : 1)             \
        resample_##element##_##time##_##MAX(const __grid_constant__ Plan<MAX> plan) {                    \
        resample<Element, Time, MAX>(plan);                                                              \
    }
#define TIMES(element, Element)                           \
    KERNEL(element, Element, f32, float, 8)               \
    KERNEL(element, Element, f32, float, 80)              \
    KERNEL(element, Element, f64, double, 8)              \
    KERNEL(element, Element, f64, double, 80)             \
    KERNEL(element, Element, i64, long long, 8)           \
    KERNEL(element, Element, i64, long long, 80)

TIMES(f16, F16)
TIMES(bf16, Bf16)
TIMES(f32, F32)
TIMES(f64, F64)
