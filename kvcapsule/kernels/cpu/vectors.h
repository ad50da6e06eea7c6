// Sixteen fp32 or int32 numbers as one vector: Floats and Ints.
//
// With AVX-512 a vector is one register, and a type of the compiler's. Elsewhere it is two registers (AVX2) or four: a
// struct of them, for GCC keeps vectors in memory that are wider than a register.
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

#if AVX512

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));
typedef float LooseFloats __attribute__((vector_size(64), aligned(4), may_alias));

// Lanes of x and y, counted through.
#define SHUFFLE(x, y, ...) SHUFFLE_REGISTERS(Ints, x, y, __VA_ARGS__)

template <int... NUMBERS> INLINE Ints ints() { return Ints{NUMBERS...}; }
INLINE Floats load(const float* from) { return *reinterpret_cast<const LooseFloats*>(from); }
INLINE void store(float* to, Floats x) { *reinterpret_cast<LooseFloats*>(to) = x; }
INLINE Floats splat(float x) { return Floats{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE Ints halves(int32_t x, int32_t y) { return Ints{x, x, x, x, x, x, x, x, y, y, y, y, y, y, y, y}; }
INLINE Floats select(Ints which, Floats x, Floats y) { return which ? x : y; }
INLINE Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }
INLINE Ints to_ints(Floats x) { return __builtin_convertvector(x, Ints); }
INLINE Floats as_floats(Ints x) { return reinterpret_cast<Floats>(x); }
INLINE Ints as_ints(Floats x) { return reinterpret_cast<Ints>(x); }

// from[0], from[1], from[0], ...: one number of each of two tiles that lie side by side.
INLINE Floats splat_pair(const void* from) {
    double both;
    memcpy(&both, from, sizeof both);
    return reinterpret_cast<Floats>(Doubles{both, both, both, both, both, both, both, both});
}

#else

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
typedef float LooseRegister __attribute__((vector_size(REGISTER), aligned(4), may_alias));

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
INLINE Floats load(const float* from) {
    return each_register<Floats>([&](int i) INLINE_LAMBDA {
        return *reinterpret_cast<const LooseRegister*>(from + i * SIZE);
    });
}
INLINE void store(float* to, const Floats& x) {
    EACH(i, REGISTERS) *reinterpret_cast<LooseRegister*>(to + i * SIZE) = x.part[i];
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
INLINE Ints halves(int32_t x, int32_t y) {
    return each_register<Ints>([&](int i) INLINE_LAMBDA { return (i < REGISTERS / 2 ? x : y) - Ints::Register{}; });
}
template <int... NUMBERS> INLINE Ints ints() {
    static constexpr int32_t numbers[] = {NUMBERS...};
    return as_ints(load(reinterpret_cast<const float*>(numbers)));
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

#endif

}  // namespace kvcapsule
