// The four floating element types on the GPU (src/float.rs says what is right), and how rows of them are blended.
//
// Raw is how an element lies in memory, Wide is what its arithmetic is done in. Widening is exact, narrowing
// rounds once, to nearest even, a NaN stays a NaN (its payload may change). No header of CUDA's is needed, so
// that NVRTC alone compiles every kernel. What is loaded stays in whole words until it is widened: halves of a
// register cost an instruction each to take apart, and another to put together.
#pragma once

constexpr unsigned THREADS = 256;

struct F16 {
    typedef unsigned short Raw;
    typedef float Wide;
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
    static __device__ __forceinline__ float wide_low(unsigned word) { return wide((Raw)word); }
    static __device__ __forceinline__ float wide_high(unsigned word) { return wide((Raw)(word >> 16)); }
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
    static __device__ __forceinline__ unsigned narrow_pair(float low, float high) {
        unsigned raw;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(raw) : "f"(high), "f"(low));
        return raw;
    }
    static __device__ __forceinline__ float wide(Raw raw) { return __uint_as_float((unsigned)raw << 16); }
    static __device__ __forceinline__ float wide_low(unsigned word) { return __uint_as_float(word << 16); }
    static __device__ __forceinline__ float wide_high(unsigned word) { return __uint_as_float(word & 0xffff0000u); }
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
    static __device__ __forceinline__ float wide(Raw raw) { return raw; }
    static __device__ __forceinline__ Raw narrow(float value) { return value; }
    static __device__ __forceinline__ Raw narrow(double value) { return __double2float_rn(value); }
};

struct F64 {
    typedef double Raw;
    typedef double Wide;
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
    float line;  // the weight as a float, which may be 0 where it is not; -1 where it is 0

    __device__ __forceinline__ bool exact() const { return line < 0.0f; }
};

static __device__ __forceinline__ Pick pick_of(double weight, unsigned row) {
    return Pick{weight, row, weight == 0.0 ? -1.0f : (float)weight};
}

template <class Wide>
static __device__ __forceinline__ Wide weight_of_pick(const Pick& pick) {
    if constexpr (Same<Wide, double>::yes) return pick.weight;
    else return pick.line;
}

// N elements of a row, in words as they lie in memory; a lone one of 2 bytes is the low half of its word.
template <class Element, int N>
struct Pack {
    typedef typename Element::Raw Raw;
    typedef typename Element::Wide Wide;
    static constexpr int BYTES = N * sizeof(Raw);
    static constexpr int WORDS = (BYTES + 3) / 4;
    static_assert(BYTES % 16 == 0 || BYTES == 8 || BYTES == 4 || N == 1, "one access, or several of 16 bytes");
    unsigned words[WORDS];

    // `at` is aligned to min(16, BYTES).
    __device__ __forceinline__ void load(const Raw* __restrict__ at) {
        if constexpr (BYTES == 2) {
            words[0] = __ldg(reinterpret_cast<const unsigned short*>(at));
        } else if constexpr (BYTES == 4) {
            words[0] = __ldg(reinterpret_cast<const unsigned*>(at));
        } else if constexpr (BYTES == 8) {
            const uint2 two = __ldg(reinterpret_cast<const uint2*>(at));
            words[0] = two.x, words[1] = two.y;
        } else {
#pragma unroll
            for (int i = 0; i < WORDS / 4; ++i) {
                const uint4 four = __ldg(reinterpret_cast<const uint4*>(at) + i);
                words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
            }
        }
    }

    __device__ __forceinline__ void store(Raw* __restrict__ at) const {
        if constexpr (BYTES == 2) {
            *reinterpret_cast<unsigned short*>(at) = (unsigned short)words[0];
        } else if constexpr (BYTES == 4) {
            *reinterpret_cast<unsigned*>(at) = words[0];
        } else if constexpr (BYTES == 8) {
            *reinterpret_cast<uint2*>(at) = uint2{words[0], words[1]};
        } else {
#pragma unroll
            for (int i = 0; i < WORDS / 4; ++i) {
                reinterpret_cast<uint4*>(at)[i] =
                    uint4{words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]};
            }
        }
    }

    __device__ __forceinline__ Wide wide(int i) const {
        if constexpr (sizeof(Raw) == 8) return __hiloint2double((int)words[2 * i + 1], (int)words[2 * i]);
        else if constexpr (sizeof(Raw) == 4) return __uint_as_float(words[i]);
        else return i % 2 == 0 ? Element::wide_low(words[i / 2]) : Element::wide_high(words[i / 2]);
    }

    // Each rounded once; two at a time where the GPU has an instruction for that.
    template <class From>
    __device__ __forceinline__ void narrow(const From (&values)[N]) {
        if constexpr (N == 1 && sizeof(Raw) == 2) {
            words[0] = Element::narrow(values[0]);
        } else if constexpr (sizeof(Raw) == 2) {
#pragma unroll
            for (int i = 0; i < WORDS; ++i) {
                const From low = values[2 * i], high = values[2 * i + 1];
                if constexpr (Same<From, float>::yes) words[i] = Element::narrow_pair(low, high);
                else words[i] = Element::narrow(low) | (unsigned)Element::narrow(high) << 16;
            }
        } else if constexpr (sizeof(Raw) == 4) {
#pragma unroll
            for (int i = 0; i < N; ++i) words[i] = __float_as_uint(Element::narrow(values[i]));
        } else {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const double value = Element::narrow(values[i]);
                words[2 * i] = (unsigned)__double2loint(value);
                words[2 * i + 1] = (unsigned)__double2hiint(value);
            }
        }
    }
};

// x / d for x below 256 and any d but 0: x + 0.5 over d is further from a whole number than the reciprocal is wrong.
static __device__ __forceinline__ unsigned small_quotient(unsigned x, unsigned d) {
    float per_d;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(per_d) : "f"((float)d));
    return (unsigned)(((float)x + 0.5f) * per_d);
}

// x / d, given 2^32 / d rounded down (at most 2^32 - 1) by the host: what a multiplication finds is at most 1 short.
static __device__ __forceinline__ unsigned quotient(unsigned x, unsigned d, unsigned per_d) {
    const unsigned short_of = __umulhi(x, per_d);
    return short_of + (x - short_of * d >= d);
}

// Where a thread is among a tile's items: `step` counts rows, `pack` accesses within one. A turn is one addition and
// one carry, where dividing the item's number would cost more than moving it.
struct Cursor {
    unsigned step, pack, packs, steps_a_turn, packs_a_turn;
    // rows_a_turn is THREADS / packs_of_row.
    __device__ __forceinline__ Cursor(unsigned packs_of_row, unsigned rows_a_turn)
        : packs(packs_of_row), steps_a_turn(rows_a_turn) {
        step = small_quotient(threadIdx.x, packs);
        pack = threadIdx.x - step * packs;
        packs_a_turn = THREADS - steps_a_turn * packs;
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
    const Pick* picks, unsigned n, unsigned rows_a_turn) {
    typedef typename From::Wide Wide;
    // Wide sources have loads enough in one turn, and would take registers that keep a block from the chip.
    constexpr int TURNS = N * sizeof(typename From::Raw) <= 16 ? 2 : 1;
    Cursor cursor(dim / N, rows_a_turn);
    while (cursor.step < n) {
        Pack<From, N> a[TURNS], b[TURNS];
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
                weight[turn] = weight_of_pick<Wide>(pick);
                exact[turn] = pick.exact();
                a[turn].load(at);
                b[turn].load(at + (exact[turn] ? 0 : dim));
            }
            cursor.turn();
        }
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            if (step[turn] < n) {
                Wide line[N];
                Pack<To, N> made;
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    const Wide before = a[turn].wide(i);
                    line[i] = lerp(before, b[turn].wide(i), weight[turn]);
                    if constexpr (!Same<From, To>::yes) line[i] = exact[turn] ? before : line[i];
                }
                made.narrow(line);
                if constexpr (Same<From, To>::yes) {
#pragma unroll
                    for (int i = 0; i < made.WORDS; ++i) made.words[i] = exact[turn] ? a[turn].words[i] : made.words[i];
                }
                made.store(out + step[turn] * stride + element[turn]);
            }
        }
    }
}

// Where the launch asks for it (launch.rs), a grid is placed on the chip while the one before it in the stream still
// runs. Called at once by every thread: from then on the next such grid may be placed.
static __device__ __forceinline__ void let_next_be_placed() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Called by every thread before it touches memory: the grid before has ended, and what it wrote is seen. The
// addresses of what is read first pass through, so that no load is moved before this.
template <class A, class B>
static __device__ __forceinline__ void await_previous(A& a, B& b) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" : "+l"(a), "+l"(b)::"memory");
#endif
}

static __device__ __forceinline__ bool aligned(const void* at, size_t bytes) { return ((size_t)at & (bytes - 1)) == 0; }
