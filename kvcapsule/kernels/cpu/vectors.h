// Sixteen fp32 or int32 numbers as one vector: Floats and Ints.
//
// A vector is one register with AVX-512, two with AVX2 and four with NEON or SSE. It is a struct of them, for GCC keeps
// what is wider than a register in memory.
#pragma once

#include <stdint.h>
#include <string.h>
#include <utility>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define AVX512 1
#define REGISTER 64
#elif defined(__AVX2__)
#define REGISTER 32
#else
#define REGISTER 16
#endif
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#define SHUFFLE_REGISTERS(type, x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define UNROLL _Pragma("GCC unroll 16")
#define SHUFFLE_REGISTERS(type, x, y, ...) __builtin_shuffle(x, y, type{__VA_ARGS__})
#endif
// A loop of constant length over an array of vectors: unrolled early, so that these are registers and no memory.
#define EACH(i, count) UNROLL for (int i = 0; i < (count); ++i)

namespace kvcapsule {

constexpr int LANES = 16;
constexpr int REGISTERS = 64 / REGISTER;  // of a vector

constexpr int SIZE = REGISTER / 4;  // numbers of a register

template <class T> struct Vector {
    typedef T Register __attribute__((vector_size(REGISTER)));
    Register part[REGISTERS];

    Vector() = default;
    INLINE Vector(T x) { EACH(i, REGISTERS) part[i] = x - Register{}; }
    INLINE T operator[](int i) const { return part[i / SIZE][i % SIZE]; }

#define OPERATOR(symbol)                                                         \
    friend INLINE Vector operator symbol(Vector x, const Vector& y) {            \
        EACH(i, REGISTERS) x.part[i] = x.part[i] symbol y.part[i];               \
        return x;                                                                \
    }                                                                            \
    INLINE Vector& operator symbol##=(const Vector& y) { return *this = *this symbol y; }
    OPERATOR(+) OPERATOR(-) OPERATOR(*) OPERATOR(&) OPERATOR(|) OPERATOR(<<) OPERATOR(>>)
#undef OPERATOR
};
typedef Vector<float> Floats;
typedef Vector<int32_t> Ints;

// Calls of body(i) for each register of a vector, whose results are the registers of another one.
template <class To, class Body> INLINE To each_register(const Body& body) {
    To found;
    EACH(i, REGISTERS) found.part[i] = reinterpret_cast<typename To::Register>(body(i));
    return found;
}

INLINE Ints operator~(const Ints& x) { return each_register<Ints>([&](int i) INLINE_LAMBDA { return ~x.part[i]; }); }
INLINE Ints operator<(const Ints& x, const Ints& y) {
    return each_register<Ints>([&](int i) INLINE_LAMBDA { return x.part[i] < y.part[i]; });
}
INLINE Ints operator<(const Floats& x, const Floats& y) {
    return each_register<Ints>([&](int i) INLINE_LAMBDA { return x.part[i] < y.part[i]; });
}
template <class T> INLINE Vector<T> load(const T* from) {
    typedef T Loose __attribute__((vector_size(REGISTER), aligned(4), may_alias));
    return each_register<Vector<T>>([&](int i) INLINE_LAMBDA { return *reinterpret_cast<const Loose*>(from + i * SIZE); });
}
template <class T> INLINE void store(T* to, const Vector<T>& x) {
    typedef T Loose __attribute__((vector_size(REGISTER), aligned(4), may_alias));
    EACH(i, REGISTERS) *reinterpret_cast<Loose*>(to + i * SIZE) = x.part[i];
}
INLINE Floats splat(float x) { return x; }
INLINE Floats as_floats(const Ints& x) {
    return each_register<Floats>([&](int i) INLINE_LAMBDA { return x.part[i]; });
}
INLINE Ints as_ints(const Floats& x) {
    return each_register<Ints>([&](int i) INLINE_LAMBDA { return x.part[i]; });
}
INLINE Floats to_floats(const Ints& x) {
    return each_register<Floats>([&](int i) INLINE_LAMBDA {
        return __builtin_convertvector(x.part[i], Floats::Register);
    });
}
INLINE Ints to_ints(const Floats& x) {
    return each_register<Ints>([&](int i) INLINE_LAMBDA { return __builtin_convertvector(x.part[i], Ints::Register); });
}
INLINE Floats select(const Ints& which, const Floats& x, const Floats& y) {
    return each_register<Floats>([&](int i) INLINE_LAMBDA { return which.part[i] ? x.part[i] : y.part[i]; });
}
template <int... NUMBERS> INLINE Ints ints() {
    static constexpr int32_t numbers[] = {NUMBERS...};
    return load(numbers);
}
INLINE Floats splat_pair(const void* from) {
    typedef int64_t Longs __attribute__((vector_size(REGISTER)));
    int64_t both;
    memcpy(&both, from, sizeof both);
    return each_register<Floats>([&](int) INLINE_LAMBDA { return both - Longs{}; });
}

// Lanes of x and y, counted through. Those of a register come from two registers at most.
#define SHUFFLE(x, y, ...) Shuffle<__VA_ARGS__>::of(x, y)
template <int... FROM> struct Shuffle {
    static constexpr int from[] = {FROM...};

    static constexpr int source(int i, bool second) {
        const int first = from[i * SIZE] / SIZE;
        int other = first;
        for (int lane = i * SIZE; lane < (i + 1) * SIZE; ++lane)
            if (from[lane] / SIZE != first) other = from[lane] / SIZE;
        return second ? other : first;
    }
    static constexpr int lane(int i) {
        return from[i] % SIZE + (from[i] / SIZE == source(i / SIZE, false) ? 0 : SIZE);
    }
    template <int I> static INLINE auto part(const Floats& x, const Floats& y) {
        return I < REGISTERS ? x.part[I % REGISTERS] : y.part[I % REGISTERS];
    }
    template <int I, int... LANE> static INLINE auto one(const Floats& x, const Floats& y,
                                                         std::integer_sequence<int, LANE...>) {
        return SHUFFLE_REGISTERS(Ints::Register, (part<source(I, false)>(x, y)), (part<source(I, true)>(x, y)),
                                 lane(I * SIZE + LANE)...);
    }
    template <int... I> static INLINE Floats all(const Floats& x, const Floats& y, std::integer_sequence<int, I...>) {
        Floats found;
        ((found.part[I] = one<I>(x, y, std::make_integer_sequence<int, SIZE>())), ...);
        return found;
    }
    static INLINE Floats of(const Floats& x, const Floats& y) {
        return all(x, y, std::make_integer_sequence<int, REGISTERS>());
    }
};

}  // namespace kvcapsule
