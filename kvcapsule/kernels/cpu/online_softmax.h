// Softmax over tiles that come one after the other: where a row's greatest score grows, its sums are scaled down.
#pragma once

#include "workspace.h"

namespace kvcapsule {

constexpr float NONE = -__builtin_inff();

// A tile's scores with their bias, and -inf behind the tile's tokens and where a query does not see one.
inline void add_bias_and_mask(float* scores, const Tile& tile, int64_t set, const Source& src) {
    const Segment& s = src.s;
    for (int64_t row = 0; row < src.real_rows; ++row, scores += 2 * src.score_line) {
        const int64_t head = s.head ? 0 : set * s.heads + row / src.call.rows, step = s.bias.third;
        const int64_t first = tile.entry * s.bias.first + head * s.bias.second + tile.token * step;
        if (s.bias_unit != 0) {
            const int8_t* const bytes = reinterpret_cast<const int8_t*>(s.bias.data) + first;
            for (int64_t n = 0; n < tile.count; ++n) scores[n] += s.bias_unit * bytes[n * step];
        } else if (s.bias.data)
            for (int64_t n = 0; n < tile.count; ++n) scores[n] += s.bias.data[first + n * step];
        for (int64_t n = 0; src.hides() && n < tile.count; ++n)
            if (!src.sees(tile, row % src.call.queries, n)) scores[n] = NONE;
        for (int64_t n = tile.count / LANES * LANES; n < src.score_line; n += LANES)
            store(scores + n, first_lanes(load(scores + n), tile.count - n, NONE));
    }
}

struct Softmax {
    float *top, *mass, *factors;  // [rows]: greatest scores, sums of weights, what earlier sums are scaled by

    void begin(int64_t rows) {
        for (int64_t row = 0; row < rows; ++row) top[row] = NONE, mass[row] = 0;
    }

    // Scores of some tiles become weights. Returns whether any row's greatest score grew: `factors` are not all 1 then.
    bool update(float* scores, const Source& src, int64_t tiles) {
        bool grew = false;
        for (int64_t row = 0; row < src.real_rows; ++row) {
            const auto each = [&](const auto& body) INLINE_LAMBDA {
                for (int64_t tile = 0; tile < tiles; ++tile) {
                    float* const line = scores + src.line(tile, row) * src.score_line;
                    for (int64_t n = 0; n < src.score_line; n += LANES) body(line + n);
                }
            };
            Floats high = NONE, sum = {};
            each([&](float* score) INLINE_LAMBDA { high = maximum(load(score), high); });
            const float greatest = max_of_lanes(high), before = top[row];
            factors[row] = 1;
            if (greatest > before) {
                // Nothing has been added to a row whose greatest score is still -inf.
                if (before > NONE) factors[row] = exp_of_negative(before - greatest)[0], grew = true;
                top[row] = greatest;
            }
            const Floats level = top[row] > NONE ? top[row] : 0.0f;
            each([&](float* score) INLINE_LAMBDA {
                const Floats weight = exp_of_negative(load(score) - level);
                store(score, weight);
                sum += weight;
            });
            mass[row] = mass[row] * factors[row] + sum_of_lanes(sum);
        }
        return grew;
    }
};

// Partial results of some segments: of each batch row, KV head and query row.
struct Sums {
    float *sums, *top, *mass;  // [.., D]; where the mass is 0 nothing has been added, and the others hold anything

    // Adds other partial results of some rows, from row `place` on; their sums are `apart`.
    void join(int64_t place, int64_t rows, int64_t dim, const Sums& other, int64_t apart) {
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t to = place + row;
            if (other.mass[row] == 0) continue;
            const bool first = mass[to] == 0;
            const float both = first || other.top[row] > top[to] ? other.top[row] : top[to];
            const float before = first ? 0 : __builtin_expf(top[to] - both);
            const float now = __builtin_expf(other.top[row] - both);
            top[to] = both;
            mass[to] = mass[to] * before + other.mass[row] * now;
            for (int64_t d = 0; d < dim; ++d)
                sums[to * dim + d] = (first ? 0 : sums[to * dim + d] * before) + other.sums[row * apart + d] * now;
        }
    }
};

}  // namespace kvcapsule
