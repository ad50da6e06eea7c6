// What kernels need of vectors: rearranging lanes, sums and maxima over them, and the exponential.
#pragma once

#include "vectors.h"

namespace kvcapsule {

// A number that is known when the kernels are compiled.
template <int NUMBER> struct Constant {
    static constexpr int value = NUMBER;
    constexpr operator int() const { return NUMBER; }
};

// How many vectors a block has, at most `most`, so that its sums stay in registers: so many sums for each of them.
// Without AVX-512 there are 16 registers: eight hold sums, or as many as one vector needs.
constexpr int fitting(int sums, int most) {
    const int vectors = REGISTERS == 1 ? most : 8 / REGISTERS / sums;
    return vectors > most ? most : vectors > 1 ? vectors : 1;
}
INLINE void prefetch(const void* place) { __builtin_prefetch(place, 0, 3); }
INLINE int64_t padded(int64_t length) { return (length + LANES - 1) / LANES * LANES; }

// Holds what several instructions need in a register: GCC would have each of them load it again.
INLINE Floats held(Floats x) {
#if AVX512
    asm("" : "+v"(x.part[0]));
#endif
    return x;
}

// The first `count` numbers, at most sixteen; 0 behind them.
INLINE Floats load_part(const float* from, int64_t count) {
    if (count >= LANES) return load(from);
#if AVX512
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    return each_register<Floats>([&](int) INLINE_LAMBDA { return _mm512_maskz_loadu_ps(mask, from); });
#else
    float x[LANES] = {};
    memcpy(x, from, count * sizeof(float));
    return load(x);
#endif
}

// Sixteen bytes as numbers.
typedef uint8_t Bytes __attribute__((vector_size(16)));
INLINE Ints from_bytes(Bytes bytes) {
#if AVX512
    return each_register<Ints>([&](int) INLINE_LAMBDA {
        return _mm512_cvtepu8_epi32(reinterpret_cast<__m128i>(bytes));
    });
#elif __AVX2__
    const __m128i low = reinterpret_cast<__m128i>(bytes);
    return each_register<Ints>([&](int i) INLINE_LAMBDA {
        return _mm256_cvtepu8_epi32(i ? _mm_unpackhi_epi64(low, low) : low);
    });
#else
    int32_t numbers[LANES];
    for (int i = 0; i < LANES; ++i) numbers[i] = bytes[i];
    return load(numbers);
#endif
}

// The greater one in each lane; y where x is not a number.
INLINE Floats maximum(Floats x, Floats y) {
#if AVX512
    return each_register<Floats>([&](int i) INLINE_LAMBDA { return _mm512_max_ps(x.part[i], y.part[i]); });
#else
    return select(y < x, x, y);
#endif
}

// The first `count` lanes of x, and a number in the others.
INLINE Floats first_lanes(Floats x, int64_t count, float other) {
    const Ints lane = ints<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>();
    return select(lane < Ints(static_cast<int32_t>(count)), x, other);
}

// All lanes joined, by sums or by maxima: in each lane.
template <class Join> INLINE Floats fold(Floats x, const Join& join) {
    x = join(x, SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    x = join(x, SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    x = join(x, SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    return join(x, SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
}
INLINE float sum_of_lanes(Floats x) { return fold(x, [](Floats a, Floats b) INLINE_LAMBDA { return a + b; })[0]; }
INLINE float max_of_lanes(Floats x) { return fold(x, maximum)[0]; }

// x in the first eight lanes, y in the others.
INLINE Ints halves(int32_t x, int32_t y) {
    const Floats low = bits_as<Floats>(Ints(x)), high = bits_as<Floats>(Ints(y));
    return bits_as<Ints>(SHUFFLE(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23));
}

// to[i] = the sum of the lanes of x[i], of four vectors.
INLINE void store_four_sums(float* to, const Floats* x) {
#define EACH_QUARTER(x, y, a, b, c, d) \
    SHUFFLE(x, y, a, b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, c + 12, d + 12)
    Floats two[2];
    EACH(i, 2) {
        const Floats a = x[2 * i], b = x[2 * i + 1];
        two[i] = EACH_QUARTER(a, b, 0, 16, 1, 17) + EACH_QUARTER(a, b, 2, 18, 3, 19);
    }
    Floats sums = EACH_QUARTER(two[0], two[1], 0, 1, 16, 17) + EACH_QUARTER(two[0], two[1], 2, 3, 18, 19);
#undef EACH_QUARTER
    sums += SHUFFLE(sums, sums, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    sums += SHUFFLE(sums, sums, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    memcpy(to, &sums, 4 * sizeof(float));
}

// x0, y0, x1, y1, ...: the lower and the upper half of it.
INLINE Floats lower_interleaved(Floats x, Floats y) {
    return SHUFFLE(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
INLINE Floats upper_interleaved(Floats x, Floats y) {
    return SHUFFLE(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

// Four lines of four numbers of 32 bits each become four columns of `out`, whose lines are `line` apart.
typedef int32_t Four __attribute__((vector_size(16)));
template <class T> INLINE void transpose_four(const Four (&x)[4], T* out, int64_t line) {
    EACH(half, 2) {
        // The first or the last two columns of lines 0 and 1, and of 2 and 3.
        const auto columns = [&](int i) INLINE_LAMBDA {
            return half ? SHUFFLE_REGISTERS(Four, x[i], x[i + 1], 2, 6, 3, 7)
                        : SHUFFLE_REGISTERS(Four, x[i], x[i + 1], 0, 4, 1, 5);
        };
        const Four a = columns(0), b = columns(2);
        const Four low = SHUFFLE_REGISTERS(Four, a, b, 0, 1, 4, 5), high = SHUFFLE_REGISTERS(Four, a, b, 2, 3, 6, 7);
        memcpy(out + 2 * half * line, &low, sizeof low);
        memcpy(out + (2 * half + 1) * line, &high, sizeof high);
    }
}

// e^x for x <= 0, within 2e-7 of it; below -87, and so for -inf, 0. Cephes (S. Moshier), expf.
INLINE Floats exp_of_negative(Floats x) {
    const float large = 12582912.0f;
    // Adding a large number rounds to a whole one; what is not a number goes on in `rest`.
    const Floats count = maximum((x * 1.44269504088896341f + large) - large, -127.0f);
    const Floats rest = (x - count * 0.693359375f) + count * 2.12194440e-4f;
    Floats series = 1.9875691500e-4f * rest + 1.3981999507e-3f;
    series = series * rest + 8.3334519073e-3f;
    series = series * rest + 4.1665795894e-2f;
    series = series * rest + 1.6666665459e-1f;
    series = series * rest + 5.0000001201e-1f;
    series = series * (rest * rest) + rest + 1.0f;
    const Ints power = (convert<Ints>(count) + 127) << 23;
    return select(x < Floats(-87.0f), 0.0f, series * bits_as<Floats>(power));
}

}  // namespace kvcapsule
