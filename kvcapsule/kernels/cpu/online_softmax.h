// Softmax over tiles that come one after the other: where a row's greatest score grows, its sums are scaled down.
#pragma once

#include "workspace.h"

namespace kvcapsule {

constexpr float NONE = -__builtin_inff();

// caps[0 : score_line]: infinite for tokens of a tile that somebody sees, -inf for all others.
inline void set_caps(float* caps, const Tile& tile, const Source& src) {
    for (int64_t n = 0; n < src.score_line; ++n) {
        bool seen = n < tile.count && !(src.s.mask && !src.s.mask[tile.entry * src.s.tokens + tile.token + n]);
        if (seen && src.visible) {
            const uint8_t* const first = src.visible + tile.entry * src.call.queries * src.s.tokens + tile.token + n;
            seen = false;
            for (int64_t q = 0; q < src.call.queries; ++q) seen = seen || first[q * src.s.tokens];
        }
        caps[n] = seen ? -NONE : NONE;
    }
}

// A tile's scores with their bias, and -inf where a query does not see a token.
inline void add_bias_and_mask(float* scores, const Tile& tile, int64_t set, const Source& src) {
    const Segment& s = src.s;
    for (int64_t row = 0; row < src.real_rows; ++row, scores += 2 * src.score_line) {
        const int64_t head = s.head ? 0 : set * s.heads + row / src.call.rows, step = s.bias.third, queries = src.call.queries;
        const float* const bias = s.bias.data + tile.entry * s.bias.first + head * s.bias.second + tile.token * step;
        for (int64_t n = 0; s.bias.data && n < tile.count; ++n) scores[n] += bias[n * step];
        const uint8_t* const seen = src.visible + (tile.entry * queries + row % queries) * s.tokens + tile.token;
        for (int64_t n = 0; src.visible && n < tile.count; ++n) scores[n] = seen[n] ? scores[n] : NONE;
    }
}

struct Softmax {
    float *top, *mass, *factors;  // [rows]: greatest scores, sums of the weights, and what sums of before are to be times

    void begin(int64_t rows) {
        for (int64_t row = 0; row < rows; ++row) top[row] = NONE, mass[row] = 0;
    }

    // Scores of some tiles become weights. Returns whether any row's greatest score grew: `factors` are not all 1 then.
    bool update(float* scores, const float* caps, const Source& src, int64_t tiles) {
        const int64_t length = src.score_line;
        bool grew = false;
        for (int64_t row = 0; row < src.real_rows; ++row) {
            const auto each = [&](const auto& body) INLINE_LAMBDA {
                for (int64_t tile = 0; tile < tiles; ++tile) {
                    float* const line = scores + src.line(tile, row) * length;
                    for (int64_t n = 0; n < length; n += LANES)
                        body(line + n, minimum(load(line + n), load(caps + tile * length + n)));
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
