// Softmax over tiles that come one after the other: where a row's greatest score grows, its sums are scaled down.
#pragma once

#include "workspace.h"

namespace kvcapsule {

constexpr float NONE = -__builtin_inff();

// caps[0 : length]: infinite for tokens of a tile that somebody sees, -inf for all others.
inline void set_caps(float* caps, int64_t length, const Tile& tile, const Call& call, const Segment& s, const uint8_t* visible) {
    const int64_t first = tile.entry * s.tokens + tile.token;
    for (int64_t n = 0; n < length; ++n) {
        bool seen = n < tile.count && !(s.mask && !s.mask[first + n]);
        if (seen && visible) {
            seen = false;
            for (int64_t q = 0; q < call.queries; ++q)
                seen = seen || visible[(tile.entry * call.queries + q) * s.tokens + tile.token + n];
        }
        caps[n] = seen ? -NONE : NONE;
    }
}

// A tile's scores with their bias, and -inf where a query does not see a token.
inline void add_bias_and_mask(float* scores, const Shape& shape, const Tile& tile, int64_t set, const Call& call,
                              const Segment& s, const uint8_t* visible) {
    for (int64_t row = 0; row < shape.real_rows; ++row, scores += 2 * shape.score_line) {
        const int64_t head = s.head ? 0 : set * s.heads + row / call.rows, step = s.bias.third;
        const float* const bias = s.bias.data + tile.entry * s.bias.first + head * s.bias.second + tile.token * step;
        for (int64_t n = 0; s.bias.data && n < tile.count; ++n) scores[n] += bias[n * step];
        const uint8_t* const seen = visible + (tile.entry * call.queries + row % call.queries) * s.tokens + tile.token;
        for (int64_t n = 0; visible && n < tile.count; ++n) scores[n] = seen[n] ? scores[n] : NONE;
    }
}

struct Softmax {
    float *top, *mass, *factors;  // [rows]: greatest scores, sums of the weights, and what sums of before are to be times

    void begin(int64_t rows) {
        for (int64_t row = 0; row < rows; ++row) top[row] = NONE, mass[row] = 0;
    }

    // Scores of some tiles become weights. Returns whether any row's greatest score grew: `factors` are not all 1 then.
    bool update(float* scores, const float* caps, const Shape& shape, int64_t tiles) {
        const int64_t length = shape.score_line;
        bool grew = false;
        for (int64_t row = 0; row < shape.real_rows; ++row) {
            const auto each = [&](const auto& body) INLINE_LAMBDA {
                for (int64_t tile = 0; tile < tiles; ++tile) {
                    float* const line = scores + shape.line(tile, row) * length;
                    for (int64_t n = 0; n < length; n += LANES) body(line + n, minimum(load(line + n), load(caps + tile * length + n)));
                }
            };
            Floats high = splat(NONE), sum = {};
            each([&](float*, Floats score) INLINE_LAMBDA { high = maximum(score, high); });
            const float found = max_of_lanes(high);
            factors[row] = 1;
            if (found > top[row]) {
                // Nothing has been added to a row whose greatest score is still -inf.
                if (top[row] > NONE) factors[row] = exp_of_negative(splat(top[row] - found))[0], grew = true;
                top[row] = found;
            }
            const Floats level = splat(top[row] > NONE ? top[row] : 0.0f);
            each([&](float* place, Floats score) INLINE_LAMBDA {
                const Floats weight = exp_of_negative(score - level);
                store(place, weight);
                sum += weight;
            });
            mass[row] = mass[row] * factors[row] + sum_of_lanes(sum);
        }
        return grew;
    }
};

// What has been found of some segments: of each batch row, KV head and query row.
struct Sums {
    float* sums;  // [.., D]
    float* top;   // -inf: nothing yet, and `sums` hold anything
    float* mass;

    // Adds what others have found of some rows, from row `place` on; their sums are `apart`.
    void join(int64_t place, int64_t rows, int64_t dim, const Sums& other, int64_t apart) {
        for (int64_t row = 0; row < rows; ++row) {
            const float high = top[place + row], mine = other.top[row], both = high > mine ? high : mine;
            if (mine == NONE) continue;
            const float before = high == NONE ? 0 : __builtin_expf(high - both), now = __builtin_expf(mine - both);
            top[place + row] = both;
            mass[place + row] = mass[place + row] * before + other.mass[row] * now;
            float* const to = sums + (place + row) * dim;
            const float* const from = other.sums + row * apart;
            for (int64_t d = 0; d < dim; ++d) to[d] = (high == NONE ? 0 : to[d] * before) + from[d] * now;
        }
    }
};

}  // namespace kvcapsule
