// Sixteen fp32 numbers as one vector, and what a softmax needs of them.
//
// GCC's and clang's vector extensions make these one register with AVX-512, two with AVX2 and four with NEON or SSE. What the extensions
// cannot say well (a look-up, a reduction, an interleaving) has a form in intrinsics for AVX-512 and one in plain loops for all else.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define AVX512 1
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
// Before a loop of constant length over an array of vectors: unrolled early, so that these are registers and no memory.
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace kvcapsule {

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef float LooseFloats __attribute__((vector_size(64), aligned(4), may_alias));

INLINE Floats load(const float* from) { return *reinterpret_cast<const LooseFloats*>(from); }
INLINE void store(float* to, Floats x) { *reinterpret_cast<LooseFloats*>(to) = x; }
INLINE Floats splat(float x) { return Floats{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
// Holds what several instructions need in a register: GCC would have each of them load it again.
INLINE Floats held(Floats x) {
#if AVX512
    asm("" : "+v"(x));
#endif
    return x;
}
INLINE void prefetch(const void* place) { __builtin_prefetch(place, 0, 3); }
INLINE int64_t padded(int64_t length) { return (length + LANES - 1) / LANES * LANES; }

// The first `count` numbers, at most sixteen; 0 behind them.
INLINE Floats load_part(const float* from, int64_t count) {
    if (count >= LANES) return load(from);
#if AVX512
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
#else
    Floats x = {};
    std::memcpy(&x, from, count * sizeof(float));
    return x;
#endif
}

// from[0], from[1], from[0], ...: one number of each of two tiles that lie side by side.
INLINE Floats splat_pair(const float* from) {
    typedef double Doubles __attribute__((vector_size(64)));
    double both;
    std::memcpy(&both, from, sizeof both);
    return reinterpret_cast<Floats>(Doubles{both, both, both, both, both, both, both, both});
}

// The smaller and the greater one in each lane; y where x is not a number.
INLINE Floats minimum(Floats x, Floats y) {
#if AVX512
    return _mm512_min_ps(x, y);
#else
    const Ints first = x < y;
    return reinterpret_cast<Floats>((first & reinterpret_cast<Ints>(x)) | (~first & reinterpret_cast<Ints>(y)));
#endif
}

INLINE Floats maximum(Floats x, Floats y) {
#if AVX512
    return _mm512_max_ps(x, y);
#else
    const Ints first = x > y;
    return reinterpret_cast<Floats>((first & reinterpret_cast<Ints>(x)) | (~first & reinterpret_cast<Ints>(y)));
#endif
}

INLINE float sum_of_lanes(Floats x) {
#if AVX512
    return _mm512_reduce_add_ps(x);
#else
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += x[i];
    return total;
#endif
}

INLINE float max_of_lanes(Floats x) {
#if AVX512
    return _mm512_reduce_max_ps(x);
#else
    float top = x[0];
    for (int i = 1; i < LANES; ++i) top = x[i] > top ? x[i] : top;
    return top;
#endif
}

// The sums of the lanes of four vectors.
INLINE void store_four_sums(float* to, Floats a, Floats b, Floats c, Floats d) {
#if AVX512
    // Within quarters of the vectors first.
    const __m512 ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b), cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
    const __m512 quarters = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
    const __m256 halves = _mm512_castps512_ps256(quarters) + _mm512_extractf32x8_ps(quarters, 1);
    _mm_storeu_ps(to, _mm256_castps256_ps128(halves) + _mm256_extractf128_ps(halves, 1));
#else
    to[0] = sum_of_lanes(a), to[1] = sum_of_lanes(b), to[2] = sum_of_lanes(c), to[3] = sum_of_lanes(d);
#endif
}

// sums[i] = the sum of the lanes of x[i].
template <int COUNT> INLINE void sums_of_lanes(const Floats (&x)[COUNT], float (&sums)[(COUNT + 3) / 4 * 4]) {
    const auto at = [&](int i) INLINE_LAMBDA { return i < COUNT ? x[i < COUNT ? i : 0] : Floats{}; };
    for (int i = 0; i < COUNT; i += 4) store_four_sums(sums + i, at(i), at(i + 1), at(i + 2), at(i + 3));
}

// x0, y0, x1, y1, ...: the lower and the upper half of it.
INLINE void interleave(Floats x, Floats y, Floats& low, Floats& high) {
#if AVX512
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    low = _mm512_permutex2var_ps(x, first, y);
    high = _mm512_permutex2var_ps(x, _mm512_add_epi32(first, _mm512_set1_epi32(8)), y);
#else
    for (int i = 0; i < LANES / 2; ++i) {
        low[2 * i] = x[i], low[2 * i + 1] = y[i];
        high[2 * i] = x[i + LANES / 2], high[2 * i + 1] = y[i + LANES / 2];
    }
#endif
}

// e^x for x <= 0, within 2e-7 of it; below -87, and so for -inf, 0. Cephes (S. Moshier), expf.
INLINE Floats exp_of_negative(Floats x) {
    const Floats large = splat(12582912.0f);
    // Adding a large number rounds to a whole one; what is not a number goes on in `rest`.
    const Floats count = maximum((x * splat(1.44269504088896341f) + large) - large, splat(-127.0f));
    const Floats rest = (x - count * splat(0.693359375f)) + count * splat(2.12194440e-4f);
    Floats series = splat(1.9875691500e-4f) * rest + splat(1.3981999507e-3f);
    series = series * rest + splat(8.3334519073e-3f);
    series = series * rest + splat(4.1665795894e-2f);
    series = series * rest + splat(1.6666665459e-1f);
    series = series * rest + splat(5.0000001201e-1f);
    series = series * (rest * rest) + rest + splat(1.0f);
    const Ints power = (__builtin_convertvector(count, Ints) + 127) << 23, nothing = x < splat(-87.0f);
    const Floats found = series * reinterpret_cast<Floats>(power);
    return reinterpret_cast<Floats>(~nothing & reinterpret_cast<Ints>(found));
}

}  // namespace kvcapsule
