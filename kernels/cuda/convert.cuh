// The four floating element types on the GPU: src/float.rs says what is right.
//
// Raw is how an element lies in memory, Wide is what its arithmetic is done in. Widening is exact, narrowing
// rounds once, to nearest even, a NaN stays a NaN (its payload may change). No header of CUDA's is needed, so
// that NVRTC alone compiles every kernel.
#pragma once

struct F16 {
    typedef unsigned short Raw;
    typedef float Wide;
    static constexpr bool PAIRS = true;
    static __device__ __forceinline__ unsigned narrow_pair(float low, float high) {
        unsigned raw;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(raw) : "f"(high), "f"(low));
        return raw;
    }
    static __device__ __forceinline__ float wide(Raw raw) {
        float value;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(raw));
        return value;
    }
    static __device__ __forceinline__ Raw narrow(float value) {
        Raw raw;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(raw) : "f"(value));
        return raw;
    }
    static __device__ __forceinline__ Raw narrow(double value) {
        Raw raw;
        asm("cvt.rn.f16.f64 %0, %1;" : "=h"(raw) : "d"(value));
        return raw;
    }
};

struct Bf16 {
    typedef unsigned short Raw;
    typedef float Wide;
    static constexpr bool PAIRS = true;
    static __device__ __forceinline__ unsigned narrow_pair(float low, float high) {
        unsigned raw;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(raw) : "f"(high), "f"(low));
        return raw;
    }
    static __device__ __forceinline__ float wide(Raw raw) { return __uint_as_float((unsigned)raw << 16); }
    static __device__ __forceinline__ Raw narrow(float value) {
        Raw raw;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(raw) : "f"(value));
        return raw;
    }
    // Rounded to odd in between, so that the second rounding does what a single one would.
    static __device__ __forceinline__ Raw narrow(double value) {
        float near = __double2float_rz(value);
        if ((double)near != value && value == value) {
            near = __uint_as_float(__float_as_uint(near) | 1u);
        }
        return narrow(near);
    }
};

struct F32 {
    typedef float Raw;
    typedef float Wide;
    static constexpr bool PAIRS = false;
    static __device__ __forceinline__ float wide(Raw raw) { return raw; }
    static __device__ __forceinline__ Raw narrow(float value) { return value; }
    static __device__ __forceinline__ Raw narrow(double value) { return __double2float_rn(value); }
};

struct F64 {
    typedef double Raw;
    typedef double Wide;
    static constexpr bool PAIRS = false;
    static __device__ __forceinline__ double wide(Raw raw) { return raw; }
    static __device__ __forceinline__ Raw narrow(float value) { return (double)value; }
    static __device__ __forceinline__ Raw narrow(double value) { return value; }
};

// The twin's formula, fused where the twin fuses: the same bits.
static __device__ __forceinline__ float lerp(float a, float b, float w) { return fmaf(w, b, fmaf(-w, a, a)); }
static __device__ __forceinline__ double lerp(double a, double b, double w) { return fma(w, b, fma(-w, a, a)); }

template <class A, class B>
struct Same { static constexpr bool yes = false; };
template <class A>
struct Same<A, A> { static constexpr bool yes = true; };

// What a target is made of: `row` exactly where weight is 0, else also `row + 1`, with that weight.
struct __align__(16) Pick {
    double weight;
    unsigned row;
    unsigned pad;
};

// N elements in as few accesses as their bytes allow; `at` is aligned to min(16, N * sizeof(Raw)) bytes.
template <class Raw, int N>
static __device__ __forceinline__ void load(Raw (&values)[N], const Raw* __restrict__ at) {
    constexpr int bytes = N * sizeof(Raw);
    if constexpr (N == 1) {
        values[0] = __ldg(at);
    } else if constexpr (bytes % 16 == 0) {
        union { uint4 words[bytes / 16]; Raw values[N]; } pack;
#pragma unroll
        for (int i = 0; i < bytes / 16; ++i) pack.words[i] = __ldg(reinterpret_cast<const uint4*>(at) + i);
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] = pack.values[i];
    } else if constexpr (bytes == 8) {
        union { uint2 word; Raw values[N]; } pack;
        pack.word = __ldg(reinterpret_cast<const uint2*>(at));
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] = pack.values[i];
    } else {
        static_assert(bytes == 4, "a load of 4, 8 or a multiple of 16 bytes");
        union { unsigned word; Raw values[N]; } pack;
        pack.word = __ldg(reinterpret_cast<const unsigned*>(at));
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] = pack.values[i];
    }
}

template <class Raw, int N>
static __device__ __forceinline__ void store(Raw* __restrict__ at, const Raw (&values)[N]) {
    constexpr int bytes = N * sizeof(Raw);
    if constexpr (N == 1) {
        *at = values[0];
    } else if constexpr (bytes % 16 == 0) {
        union { uint4 words[bytes / 16]; Raw values[N]; } pack;
#pragma unroll
        for (int i = 0; i < N; ++i) pack.values[i] = values[i];
#pragma unroll
        for (int i = 0; i < bytes / 16; ++i) reinterpret_cast<uint4*>(at)[i] = pack.words[i];
    } else if constexpr (bytes == 8) {
        union { uint2 word; Raw values[N]; } pack;
#pragma unroll
        for (int i = 0; i < N; ++i) pack.values[i] = values[i];
        *reinterpret_cast<uint2*>(at) = pack.word;
    } else {
        static_assert(bytes == 4, "a store of 4, 8 or a multiple of 16 bytes");
        union { unsigned word; Raw values[N]; } pack;
#pragma unroll
        for (int i = 0; i < N; ++i) pack.values[i] = values[i];
        *reinterpret_cast<unsigned*>(at) = pack.word;
    }
}

// N values, each rounded once; two at a time where the GPU has an instruction for that.
template <class To, int N, class Wide>
static __device__ __forceinline__ void narrow_all(typename To::Raw (&made)[N], const Wide (&values)[N]) {
    if constexpr (To::PAIRS && N % 2 == 0 && Same<Wide, float>::yes) {
        union { unsigned words[N / 2]; typename To::Raw values[N]; } pack;
#pragma unroll
        for (int i = 0; i < N / 2; ++i) pack.words[i] = To::narrow_pair(values[2 * i], values[2 * i + 1]);
#pragma unroll
        for (int i = 0; i < N; ++i) made[i] = pack.values[i];
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) made[i] = To::narrow(values[i]);
    }
}

// `made` becomes `kept` if `exact`: by words, since halves of a register cost more to choose than the whole.
template <class Raw, int N>
static __device__ __forceinline__ void keep(Raw (&made)[N], const Raw (&kept)[N], bool exact) {
    if constexpr (N * sizeof(Raw) % 4 == 0) {
        constexpr int WORDS = N * sizeof(Raw) / 4;
        union { unsigned words[WORDS]; Raw values[N]; } from, to;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            from.values[i] = kept[i];
            to.values[i] = made[i];
        }
#pragma unroll
        for (int i = 0; i < WORDS; ++i) to.words[i] = exact ? from.words[i] : to.words[i];
#pragma unroll
        for (int i = 0; i < N; ++i) made[i] = to.values[i];
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) made[i] = exact ? kept[i] : made[i];
    }
}

// Where a thread is among a tile's items: `step` counts rows, `pack` accesses within one. A turn is one addition and
// one carry, where dividing the item's number would cost more than moving it.
struct Cursor {
    unsigned step, pack, packs, steps_a_turn, packs_a_turn;
    __device__ __forceinline__ explicit Cursor(unsigned packs_of_row) : packs(packs_of_row) {
        step = threadIdx.x / packs;
        pack = threadIdx.x - step * packs;
        steps_a_turn = blockDim.x / packs;
        packs_a_turn = blockDim.x - steps_a_turn * packs;
    }
    __device__ __forceinline__ void turn() {
        step += steps_a_turn;
        pack += packs_a_turn;
        if (pack >= packs) {
            pack -= packs;
            ++step;
        }
    }
};

// Values of `n` picks, N elements a thread and access. Rows of `src` are `dim` elements, rows of `out` are `stride`
// elements apart. Where the dtype stays, a row that is taken exactly keeps its bits.
//
// The loads of TURNS accesses are in flight before the first is used. A row taken exactly is loaded for its neighbour
// too (it costs a hit in L1), since a branch there would keep loads from overlapping.
template <class From, class To, int N>
static __device__ __forceinline__ void blend(
    typename To::Raw* __restrict__ out, size_t stride, const typename From::Raw* __restrict__ src, unsigned dim,
    const Pick* picks, unsigned n) {
    typedef typename From::Wide Wide;
    // Wide sources have loads enough in one turn, and would take registers that keep a block from the chip.
    constexpr int TURNS = N * sizeof(typename From::Raw) <= 16 ? 2 : 1;
    Cursor cursor(dim / N);
    while (cursor.step < n) {
        typename From::Raw a[TURNS][N], b[TURNS][N];
        Wide weight[TURNS];
        bool exact[TURNS];
        unsigned step[TURNS], element[TURNS];
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            step[turn] = cursor.step;
            element[turn] = cursor.pack * N;
            if (step[turn] < n) {
                const Pick pick = picks[step[turn]];
                const typename From::Raw* at = src + (size_t)pick.row * dim + element[turn];
                // A weight too small for Wide is 0 there, and still no row taken exactly.
                weight[turn] = (Wide)pick.weight;
                exact[turn] = pick.weight == 0.0;
                load(a[turn], at);
                load(b[turn], at + (exact[turn] ? 0 : dim));
            }
            cursor.turn();
        }
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            if (step[turn] < n) {
                Wide line[N];
                typename To::Raw made[N];
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    const Wide before = From::wide(a[turn][i]);
                    line[i] = lerp(before, From::wide(b[turn][i]), weight[turn]);
                    if constexpr (!Same<From, To>::yes) line[i] = exact[turn] ? before : line[i];
                }
                narrow_all<To>(made, line);
                if constexpr (Same<From, To>::yes) keep(made, a[turn], exact[turn]);
                store(out + step[turn] * stride + element[turn], made);
            }
        }
    }
}

static __device__ __forceinline__ bool aligned(const void* at, size_t bytes) { return ((size_t)at & (bytes - 1)) == 0; }
