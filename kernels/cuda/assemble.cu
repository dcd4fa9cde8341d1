// A whole batch in one launch: every field, every sample, into contiguous [B, T, D] columns and their masks.
//
//   fields  [n_fields]           what each column is, and where it goes (kernels/src/device.rs: DeviceField)
//   sources [n_fields][batch]    the stream each sample of each column reads (DeviceSource)
//   anchors [batch]              the time and row each sample is built around (DeviceAnchor)
//
// Which row, weight and padding a target has is docs/resampling.md's rule, in the same integer and f64 arithmetic
// as the twin's bracket.rs; values follow convert.cuh. Copies and lines have the twin's bits; slerp has its own
// sin and atan2, in f64. Sources may be device memory or mapped host memory.
//
// Grid: x over tiles, all fields' one after another (first_block); a tile is rows_per_tile (at most MAX_TILE)
// targets of one sample. Its threads find one target each, into shared memory, and then share the tile's elements,
// 16 bytes each where pointers and dim allow, else one element each. dim, steps, rows, batch are never 0, rows
// are less than 2^32, stamps ascend strictly: launch.rs checks the former, Clock the latter.
#include "convert.cuh"

enum DType { F16_CODE = 9, BF16_CODE = 10, F32_CODE = 11, F64_CODE = 12 };
enum Interp { LINEAR = 0, NEAREST = 1, PREVIOUS = 2, SLERP = 3 };

struct Field {
    unsigned char* out;
    unsigned char* mask;       // or null
    const long long* offsets;  // rows or nanoseconds
    unsigned long long max_gap_ns;
    unsigned steps;
    unsigned dim;
    unsigned rows_per_tile;
    unsigned tiles;
    unsigned first_block;
    unsigned element_bytes;    // of the source
    unsigned char from;
    unsigned char to;
    unsigned char interp;
    unsigned char by_rows;
    unsigned per_tiles;        // 2^32 / tiles, at most 2^32 - 1
};

struct Source {
    const unsigned char* data;
    const long long* stamps;  // or null: uniform
    long long first_ns;
    long long num;
    long long den;
    long long rows;
};

struct Anchor {
    long long t_ns;
    long long row;
};

constexpr unsigned MAX_TILE = 128;
constexpr unsigned PIVOTS = THREADS;
constexpr unsigned long long SNAP_NS = 1000;

static __device__ __forceinline__ long long saturating_add(long long a, long long b) {
    const long long sum = (long long)((unsigned long long)a + (unsigned long long)b);
    if (((a ^ sum) & (b ^ sum)) < 0) {
        return a < 0 ? (-0x7fffffffffffffffLL - 1) : 0x7fffffffffffffffLL;
    }
    return sum;
}

static __device__ __forceinline__ unsigned long long distance(long long later, long long earlier) {
    return (unsigned long long)later - (unsigned long long)earlier;
}

// Stamp of row `row` since row 0: UniformClock::t_ns.
static __device__ __forceinline__ long long uniform_since(const Source& source, long long row) {
    return (row * source.num + source.den / 2) / source.den;
}

struct Found {
    double weight;
    unsigned row;
    bool pad;
};

// The rule for one target. `pivots[p]` is stamp p * stride.
static __device__ __forceinline__ Found find(
    const Field& field, const Source& source, long long first, long long last, long long t, const long long* pivots,
    unsigned stride) {
    const unsigned n = (unsigned)source.rows;
    if (t <= first) return Found{0.0, 0, distance(first, t) > SNAP_NS};
    if (t >= last) return Found{0.0, n - 1, distance(t, last) > SNAP_NS};
    unsigned row;
    long long before, after;
    if (source.stamps) {
        // pivots[low] <= t < pivots[high]; beyond the last row the pivots are past any t.
        unsigned low = 0, high = PIVOTS;
        while (high - low > 1) {
            const unsigned middle = (low + high) / 2;
            if (pivots[middle] <= t) low = middle; else high = middle;
        }
        low *= stride;
        high = min(low + stride, n - 1);
        while (high - low > 1) {
            const unsigned middle = low + (high - low) / 2;
            if (__ldg(source.stamps + middle) <= t) low = middle; else high = middle;
        }
        row = low;
        before = __ldg(source.stamps + row);
        after = __ldg(source.stamps + row + 1);
    } else {
        // The quotient's row is never after t, and rounding can put the next one at t exactly.
        const long long since = t - first;
        long long found = since * source.den / source.num;
        before = uniform_since(source, found);
        after = uniform_since(source, found + 1);
        while (after <= since) {
            ++found;
            before = after;
            after = uniform_since(source, found + 1);
        }
        row = (unsigned)found;
        before += first;
        after += first;
    }
    const unsigned long long since = distance(t, before), until = distance(after, t);
    const unsigned nearer = since <= until ? row : row + 1;
    if (min(since, until) <= SNAP_NS) return Found{0.0, nearer, false};
    const unsigned long long gap = distance(after, before);
    if (gap > field.max_gap_ns) return Found{0.0, row, true};
    if (field.interp == PREVIOUS) return Found{0.0, row, false};
    if (field.interp == NEAREST) return Found{0.0, nearer, false};
    return Found{__ull2double_rn(since) / __ull2double_rn(gap), row, false};
}

template <class Word>
static __device__ __forceinline__ void copy_rows(
    unsigned char* __restrict__ out, const unsigned char* __restrict__ data, size_t row_bytes, const Pick* picks,
    unsigned n) {
    constexpr int TURNS = 2;
    const unsigned words = (unsigned)(row_bytes / sizeof(Word));
    Cursor cursor(words, THREADS / words);
    for (unsigned item = threadIdx.x; item < n * words; item += TURNS * THREADS) {
        Word word[TURNS];
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            if (cursor.step < n) {
                word[turn] = __ldg(reinterpret_cast<const Word*>(data + picks[cursor.step].row * row_bytes) + cursor.pack);
            }
            cursor.turn();
        }
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            if (item + turn * THREADS < n * words) reinterpret_cast<Word*>(out)[item + turn * THREADS] = word[turn];
        }
    }
}

static __device__ __forceinline__ void copy(
    unsigned char* out, const unsigned char* data, size_t row_bytes, const Pick* picks, unsigned n) {
    const size_t at = (size_t)out | (size_t)data | row_bytes;
    if ((at & 15) == 0) copy_rows<uint4>(out, data, row_bytes, picks, n);
    else if ((at & 7) == 0) copy_rows<uint2>(out, data, row_bytes, picks, n);
    else if ((at & 3) == 0) copy_rows<unsigned>(out, data, row_bytes, picks, n);
    else if ((at & 1) == 0) copy_rows<unsigned short>(out, data, row_bytes, picks, n);
    else copy_rows<unsigned char>(out, data, row_bytes, picks, n);
}

template <class From, class To>
static __device__ void blend_any(
    unsigned char* out, const unsigned char* data, unsigned dim, const Pick* picks, unsigned n) {
    typedef typename From::Raw FromRaw;
    typedef typename To::Raw ToRaw;
    constexpr int N = 16 / sizeof(ToRaw);
    constexpr size_t asked = N * sizeof(FromRaw) < 16 ? N * sizeof(FromRaw) : 16;
    ToRaw* to = reinterpret_cast<ToRaw*>(out);
    const FromRaw* from = reinterpret_cast<const FromRaw*>(data);
    if (dim % N == 0 && aligned(out, 16) && aligned(data, asked)) {
        blend<From, To, N>(to, dim, from, dim, picks, n, THREADS / (dim / N));
    } else {
        blend<From, To, 1>(to, dim, from, dim, picks, n, THREADS / dim);
    }
}

template <class From, class To>
static __device__ void slerp(unsigned char* out, const unsigned char* data, const Pick* picks, unsigned n) {
    const typename From::Raw* src = reinterpret_cast<const typename From::Raw*>(data);
    typename To::Raw* to = reinterpret_cast<typename To::Raw*>(out);
    for (unsigned step = threadIdx.x; step < n; step += THREADS) {
        const Pick pick = picks[step];
        const typename From::Raw* row = src + (size_t)pick.row * 4;
        if (pick.weight == 0.0) {
            for (int i = 0; i < 4; ++i) to[step * 4 + i] = To::narrow(From::wide(row[i]));
            continue;
        }
        double a[4], b[4], product = 0.0, difference = 0.0, sum = 0.0, norm = 0.0;
        for (int i = 0; i < 4; ++i) {
            a[i] = From::wide(row[i]);
            b[i] = From::wide(row[4 + i]);
            product += a[i] * b[i];
        }
        for (int i = 0; i < 4; ++i) {
            if (product < 0.0) b[i] = -b[i];
            difference += (a[i] - b[i]) * (a[i] - b[i]);
            sum += (a[i] + b[i]) * (a[i] + b[i]);
        }
        const double angle = 2.0 * atan2(sqrt(difference), sqrt(sum));
        double of_a = 1.0 - pick.weight, of_b = pick.weight;
        if (!(angle < 1e-6)) {
            of_a = sin(of_a * angle) / sin(angle);
            of_b = sin(of_b * angle) / sin(angle);
        }
        for (int i = 0; i < 4; ++i) {
            a[i] = of_a * a[i] + of_b * b[i];
            norm += a[i] * a[i];
        }
        norm = sqrt(norm);
        for (int i = 0; i < 4; ++i) to[step * 4 + i] = To::narrow(a[i] / norm);
    }
}

template <class From, class To>
static __device__ __forceinline__ void make(
    const Field& field, unsigned char* out, const unsigned char* data, const Pick* picks, unsigned n) {
    if (field.interp == SLERP && !field.by_rows) slerp<From, To>(out, data, picks, n);
    else blend_any<From, To>(out, data, field.dim, picks, n);
}

template <class From>
static __device__ void make_from(
    const Field& field, unsigned char* out, const unsigned char* data, const Pick* picks, unsigned n) {
    switch (field.to) {
        case F16_CODE: make<From, F16>(field, out, data, picks, n); break;
        case BF16_CODE: make<From, Bf16>(field, out, data, picks, n); break;
        case F32_CODE: make<From, F32>(field, out, data, picks, n); break;
        case F64_CODE: make<From, F64>(field, out, data, picks, n); break;
    }
}

static __device__ __forceinline__ unsigned bytes_of(unsigned char code) {
    return code == F64_CODE ? 8 : code == F32_CODE ? 4 : 2;
}

// 4 blocks a multiprocessor: 64 registers. Left alone the compiler takes 70, and one block fewer fits.
extern "C" __global__ void __launch_bounds__(THREADS, 4) assemble(
    const Field* __restrict__ fields, unsigned n_fields, const Source* __restrict__ sources,
    const Anchor* __restrict__ anchors, unsigned batch) {
    __shared__ Pick picks[MAX_TILE];
    __shared__ long long pivots[PIVOTS];
    let_next_be_placed();
    await_previous(fields, sources);
    unsigned index = 0;
    while (index + 1 < n_fields && fields[index + 1].first_block <= blockIdx.x) ++index;
    const Field field = fields[index];
    const unsigned block = blockIdx.x - field.first_block;
    const unsigned sample = quotient(block, field.tiles, field.per_tiles);
    const unsigned step0 = (block - sample * field.tiles) * field.rows_per_tile;
    const unsigned n = min(field.rows_per_tile, field.steps - step0);
    const Source source = sources[(size_t)index * batch + sample];
    const Anchor anchor = anchors[sample];

    long long first = source.first_ns, last = 0;
    unsigned stride = 0;
    if (!field.by_rows) {
        if (source.stamps) {
            stride = (unsigned)((source.rows + PIVOTS - 1) / PIVOTS);
            const size_t at = (size_t)threadIdx.x * stride;
            pivots[threadIdx.x] = at < source.rows ? __ldg(source.stamps + at) : 0x7fffffffffffffffLL;
            first = __ldg(source.stamps);
            last = __ldg(source.stamps + source.rows - 1);
            __syncthreads();
        } else {
            last = first + uniform_since(source, source.rows - 1);
        }
    }
    const size_t target0 = (size_t)sample * field.steps + step0;
    if (threadIdx.x < n) {
        const long long offset = __ldg(field.offsets + step0 + threadIdx.x);
        Found found;
        if (field.by_rows) {
            const long long wanted = saturating_add(anchor.row, offset);
            const long long row = max(0LL, min(wanted, source.rows - 1));
            found = Found{0.0, (unsigned)row, row != wanted};
        } else {
            found = find(field, source, first, last, saturating_add(anchor.t_ns, offset), pivots, stride);
        }
        picks[threadIdx.x] = pick_of(found.weight, found.row);
        if (field.mask) field.mask[target0 + threadIdx.x] = found.pad;
    }
    __syncthreads();

    const bool blended = !field.by_rows && (field.interp == LINEAR || field.interp == SLERP);
    if (field.from == field.to && !blended) {
        const size_t row_bytes = (size_t)field.dim * field.element_bytes;
        copy(field.out + target0 * row_bytes, source.data, row_bytes, picks, n);
        return;
    }
    unsigned char* out = field.out + target0 * field.dim * bytes_of(field.to);
    switch (field.from) {
        case F16_CODE: make_from<F16>(field, out, source.data, picks, n); break;
        case BF16_CODE: make_from<Bf16>(field, out, source.data, picks, n); break;
        case F32_CODE: make_from<F32>(field, out, source.data, picks, n); break;
        case F64_CODE: make_from<F64>(field, out, source.data, picks, n); break;
    }
}
