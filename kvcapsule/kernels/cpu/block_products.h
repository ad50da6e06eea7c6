// Matrix products in blocks whose sums stay in registers: rows times a map, and rows times rows.
//
// A block of A rows and V vectors needs A * V + V + 1 registers; AVX-512 has 32. 8 x 2 is bound by multiply-adds alone.
// Elsewhere a vector is several registers, of which there are 16: blocks are 4 x 1, and 1 x 4 of rows times rows.
#pragma once

#include "simd.h"

namespace kvcapsule {

// sum[a][v] += the sum over k < count of x[row a][k] times map[k][16 v : ...]. `ahead`: fetches so far behind in map.
// PAIR 1: row a is x + a * stride. PAIR 2: rows lie side by side in twos, x + a / 2 * stride + a % 2.
template <int A, int V, int PAIR>
INLINE void accumulate(Floats (&sum)[A][V], const float* x, int64_t stride, const float* map, int64_t line,
                       int64_t count, int64_t ahead = 0) {
    for (int64_t k = 0; k < count; ++k, map += line, x += PAIR) {
        Floats lanes[V];
        EACH(v, V) {
            if (ahead) prefetch(map + ahead + v * LANES);
            lanes[v] = held(load(map + v * LANES));
        }
        EACH(a, A) {
            const Floats number = x[a / PAIR * stride + a % PAIR];
            EACH(v, V) sum[a][v] += number * lanes[v];
        }
    }
}

// Where the sums of a product belong: row a, columns 16 v, at out + a * stride.
struct ByRow {
    float* out;
    int64_t stride;

    template <int A, int V> INLINE void put(const Floats (&sum)[A][V], int64_t row, int64_t column) const {
        EACH(a, A) EACH(v, V) store(out + (row + a) * stride + column + v * LANES, sum[a][v]);
    }
};

// x [rows, count] times map [count, width], width a multiple of 16; rows are filled up to a multiple of 8.
template <int PAIR, class Place>
void product(const float* x, int64_t stride, int64_t rows, const float* map, int64_t count, int64_t width,
             const Place& place) {
    constexpr int ROWS = REGISTERS == 1 ? 8 : 4, MOST = fitting(ROWS, 2);
    const auto block = [&](auto vectors, int64_t row, int64_t column) INLINE_LAMBDA {
        constexpr int V = decltype(vectors)::value;
        UNROLL for (int a = 0; a < 8; a += ROWS) {
            Floats sum[ROWS][V] = {};
            accumulate<ROWS, V, PAIR>(sum, x + (row + a) / PAIR * stride, stride, map + column, width, count);
            place.put(sum, row + a, column);
        }
    };
    // Rows outside: eight of them and the map fit into the first cache, all rows and a part of the map often do not.
    for (int64_t row = 0; row < rows; row += 8) {
        int64_t column = 0;
        for (; column + MOST * LANES <= width; column += MOST * LANES) block(Constant<MOST>(), row, column);
        if (column < width) block(Constant<1>(), row, column);
    }
}

// out[a * stride + n] = row a of x times row n of y; both dense along `length` numbers, a multiple of 16.
template <int A, int N>
INLINE void dot_block(const float* x, int64_t x_stride, const float* y, int64_t y_stride, int64_t length, float* out,
                      int64_t stride, int64_t ahead) {
    constexpr int MOST = REGISTERS == 1 ? 4 : 1;
    if constexpr (A > MOST) {
        // What is loaded of y serves all rows while it is in the nearest cache.
        dot_block<MOST, N>(x, x_stride, y, y_stride, length, out, stride, ahead);
        return dot_block<A - MOST, N>(x + MOST * x_stride, x_stride, y, y_stride, length, out + MOST * stride, stride, 0);
    }
    Floats sum[A][N] = {};
    for (int64_t k = 0; k < length; k += LANES) {
        Floats lanes[N];
        EACH(n, N) {
            if (ahead) prefetch(y + n * y_stride + k + ahead);
            lanes[n] = held(load(y + n * y_stride + k));
        }
        EACH(a, A) {
            const Floats row = held(load(x + a * x_stride + k));
            EACH(n, N) sum[a][n] += row * lanes[n];
        }
    }
    EACH(a, A) {
        if (N == 1) out[a * stride] = sum_of_lanes(sum[a][0]);
        UNROLL for (int n = 0; n + 4 <= N; n += 4) store_four_sums(out + a * stride + n, &sum[a][n]);
    }
}

// The same for `count` rows of y. `ahead`: fetches so far behind in y.
template <int A>
INLINE void dots(const float* x, int64_t x_stride, const float* y, int64_t y_stride, int64_t count, int64_t length,
                 float* out, int64_t stride, int64_t ahead) {
    const auto block = [&](auto many, int64_t n) INLINE_LAMBDA {
        dot_block<A, many>(x, x_stride, y + n * y_stride, y_stride, length, out + n, stride, ahead);
    };
    constexpr int N = A == 1 && REGISTERS == 1 ? 8 : 4;
    int64_t n = 0;
    for (; n + N <= count; n += N) block(Constant<N>(), n);
    for (; N > 4 && n + 4 <= count; n += 4) block(Constant<4>(), n);
    // Of fewer than four rows, those before them are taken again.
    if (n < count && count >= 4) return block(Constant<4>(), count - 4);
    for (; n < count; ++n) block(Constant<1>(), n);
}

// out [lines, width] = x, whose lines and numbers are `line` and `step` apart; 0 behind `count` numbers.
inline void copy_map(const float* x, int64_t lines, int64_t line, int64_t count, int64_t step, float* out,
                     int64_t width) {
    // What lies column by column is transposed four by four.
    const int64_t whole = line == 1 && step != 1 ? lines / 4 * 4 : 0, fours = count / 4 * 4;
    for (int64_t k = 0; whole && k < fours; k += 4)
        for (int64_t i = 0; i < whole; i += 4) {
            Four block[4];
            EACH(n, 4) memcpy(&block[n], x + i + (k + n) * step, sizeof(Four));
            transpose_four(block, out + i * width + k, width);
        }
    for (int64_t i = 0; i < lines; ++i) {
        int64_t k = i < whole ? fours : 0;
        if (step == 1) memcpy(out + i * width, x + i * line, count * sizeof(float)), k = count;
        for (; k < width; ++k) out[i * width + k] = k < count ? x[i * line + k * step] : 0;
    }
}

}  // namespace kvcapsule
