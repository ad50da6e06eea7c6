// Sixteen fp32 or int32 numbers as one vector: Floats and Ints.
//
// A vector is one register with AVX-512, two with AVX2 and four with NEON or SSE. It is a struct of them, for GCC keeps
// what is wider than a register in memory.
#pragma once

#include <stdint.h>
#include <string.h>

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
constexpr int SIZE = REGISTER / 4;        // numbers of a register

// Sixteen numbers; one number stands for sixteen equal ones.
template <class T> struct Vector {
    typedef T Register __attribute__((vector_size(REGISTER)));
    Register part[REGISTERS];

    Vector() = default;
    template <class... R> INLINE Vector(Register x, R... others) : part{x, others...} {}
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
    To result;
    EACH(i, REGISTERS) result.part[i] = reinterpret_cast<typename To::Register>(body(i));
    return result;
}

template <class T> INLINE Ints operator<(const Vector<T>& x, const Vector<T>& y) {
    return each_register<Ints>([&](int i) INLINE_LAMBDA { return x.part[i] < y.part[i]; });
}
INLINE Floats select(const Ints& which, const Floats& x, const Floats& y) {
    return each_register<Floats>([&](int i) INLINE_LAMBDA { return which.part[i] ? x.part[i] : y.part[i]; });
}
// The bits of x as numbers of another type; and the numbers of x.
template <class To, class T> INLINE To bits_as(const Vector<T>& x) {
    return each_register<To>([&](int i) INLINE_LAMBDA { return x.part[i]; });
}
template <class To, class T> INLINE To convert(const Vector<T>& x) {
    return each_register<To>([&](int i) INLINE_LAMBDA {
        return __builtin_convertvector(x.part[i], typename To::Register);
    });
}
template <class T> INLINE Vector<T> load(const T* from) {
    typedef T Loose __attribute__((vector_size(REGISTER), aligned(4), may_alias));
    return each_register<Vector<T>>([&](int i) INLINE_LAMBDA { return *reinterpret_cast<const Loose*>(from + i * SIZE); });
}
template <class T> INLINE void store(T* to, const Vector<T>& x) {
    typedef T Loose __attribute__((vector_size(REGISTER), aligned(4), may_alias));
    EACH(i, REGISTERS) *reinterpret_cast<Loose*>(to + i * SIZE) = x.part[i];
}
template <int... NUMBERS> INLINE Ints ints() {
    static constexpr int32_t numbers[] = {NUMBERS...};
    return load(numbers);
}
// from[0], from[1], from[0], ...: one number of each of two tiles that lie side by side.
INLINE Floats splat_pair(const void* from) {
    typedef int64_t Longs __attribute__((vector_size(REGISTER)));
    int64_t both;
    memcpy(&both, from, sizeof both);
    return each_register<Floats>([&](int) INLINE_LAMBDA { return both - Longs{}; });
}

// The numbers 0 to N - 1. C++'s own header is not there for every compiler.
template <int... NUMBERS> struct Counted {};
template <int N, int... NUMBERS> struct CountTo : CountTo<N - 1, N - 1, NUMBERS...> {};
template <int... NUMBERS> struct CountTo<0, NUMBERS...> : Counted<NUMBERS...> {};

// Lanes of x and y, counted through. Those of a register come from two registers at most.
#define SHUFFLE(x, y, ...) Shuffle<__VA_ARGS__>::all(x, y, CountTo<REGISTERS>())
template <int... FROM> struct Shuffle {
    static constexpr int from[] = {FROM...};

    // The registers that register i comes from, and where its lane comes from among theirs.
    static constexpr int first(int i) { return from[i * SIZE] / SIZE; }
    static constexpr int second(int i) {
        int other = first(i);
        for (int lane = i * SIZE; lane < (i + 1) * SIZE; ++lane)
            if (from[lane] / SIZE != first(i)) other = from[lane] / SIZE;
        return other;
    }
    static constexpr int place(int lane) {
        return from[lane] % SIZE + (from[lane] / SIZE == first(lane / SIZE) ? 0 : SIZE);
    }
    template <int I, int... LANE>
    static INLINE auto one(const Floats& x, const Floats& y, Counted<LANE...>) {
        constexpr int a = first(I), b = second(I);
        return SHUFFLE_REGISTERS(Ints::Register, (a < REGISTERS ? x : y).part[a % REGISTERS],
                                 (b < REGISTERS ? x : y).part[b % REGISTERS], place(I * SIZE + LANE)...);
    }
    template <int... I> static INLINE Floats all(const Floats& x, const Floats& y, Counted<I...>) {
        return {one<I>(x, y, CountTo<SIZE>())...};
    }
};

}  // namespace kvcapsule
