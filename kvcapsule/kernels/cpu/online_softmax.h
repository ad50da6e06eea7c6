// Softmax over tiles that come one after the other: where a row's greatest score grows, what has been added up is scaled down.
#pragma once

#include "workspace.h"

namespace kvcapsule {

constexpr float NONE = -__builtin_inff();

// caps[0 : padded(tokens)]: infinite for tokens that somebody sees, -inf for all others.
inline void set_caps(float* caps, int64_t length, const Tile& tile, const Segment& s, const uint8_t* visible, int64_t queries) {
    for (int64_t n = 0; n < length; ++n) caps[n] = n < tile.count ? -NONE : NONE;
    const int64_t first = tile.entry * s.tokens + tile.token;
    for (int64_t n = 0; s.mask && n < tile.count; ++n)
        if (!s.mask[first + n]) caps[n] = NONE;
    for (int64_t n = 0; visible && n < tile.count; ++n) {
        bool seen = false;
        for (int64_t q = 0; q < queries; ++q) seen = seen || visible[(tile.entry * queries + q) * s.tokens + tile.token + n];
        if (!seen) caps[n] = NONE;
    }
}

// A tile's scores, lines `apart`, with their bias, and -inf where a query does not see a token.
inline void add_bias_and_mask(float* scores, int64_t apart, int64_t rows, int64_t rows_per_head, int64_t first_head, const Tile& tile,
                              const Segment& s, const uint8_t* visible, int64_t queries) {
    for (int64_t row = 0; row < rows; ++row) {
        float* const line = scores + row * apart;
        if (s.bias.data) {
            const int64_t head = s.head ? 0 : first_head + row / rows_per_head, step = s.bias.third;
            const float* const bias = s.bias.data + tile.entry * s.bias.first + head * s.bias.second + tile.token * step;
            for (int64_t n = 0; n < tile.count; ++n) line[n] += bias[n * step];
        }
        if (visible) {
            const uint8_t* const seen = visible + (tile.entry * queries + row % queries) * s.tokens + tile.token;
            for (int64_t n = 0; n < tile.count; ++n)
                if (!seen[n]) line[n] = NONE;
        }
    }
}

struct Softmax {
    float *top, *mass, *factors;  // [rows]: greatest scores, sums of the weights, and by what sums of before are to be multiplied

    void begin(int64_t rows) {
        for (int64_t row = 0; row < rows; ++row) top[row] = NONE, mass[row] = 0;
    }

    // Scores of `tiles` tiles (see Shape.line) become weights. Returns whether any row's greatest score grew: then `factors` are not all 1.
    bool update(float* scores, const float* caps, const Shape& shape, int64_t tiles) {
        const int64_t length = shape.score_line;
        bool grew = false;
        for (int64_t row = 0; row < shape.rows; ++row) {
            Floats high = splat(NONE);
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const float *line = scores + shape.line(tile, row) * length, *cap = caps + tile * length;
                for (int64_t n = 0; n < length; n += LANES) high = maximum(minimum(load(line + n), load(cap + n)), high);
            }
            const float found = max_of_lanes(high);
            factors[row] = 1;
            if (found > top[row]) {
                // Nothing has been added to a row whose greatest score is still -inf.
                if (top[row] > NONE) factors[row] = exp_of_negative(splat(top[row] - found))[0], grew = true;
                top[row] = found;
            }
            const Floats level = splat(top[row] > NONE ? top[row] : 0.0f);
            Floats sum = {};
            for (int64_t tile = 0; tile < tiles; ++tile) {
                float* const line = scores + shape.line(tile, row) * length;
                const float* const cap = caps + tile * length;
                for (int64_t n = 0; n < length; n += LANES) {
                    const Floats weight = exp_of_negative(minimum(load(line + n), load(cap + n)) - level);
                    store(line + n, weight);
                    sum += weight;
                }
            }
            mass[row] = mass[row] * factors[row] + sum_of_lanes(sum);
        }
        return grew;
    }
};

// What has been found of some segments: of each batch row, KV head and query row.
struct Sums {
    float* out;  // [.., D]
    float* top;  // -inf: nothing yet, and `out` holds anything
    float* mass;

    // Adds the sums of some rows, `apart`, from row `place` on.
    void join(int64_t place, int64_t rows, int64_t dim, const float* sums, int64_t apart, const float* other_top, const float* other_mass) {
        for (int64_t row = 0; row < rows; ++row) {
            const float high = top[place + row], mine = other_top[row];
            if (mine == NONE) continue;
            const float both = high > mine ? high : mine;
            const float before = high == NONE ? 0 : __builtin_expf(high - both), now = __builtin_expf(mine - both);
            top[place + row] = both;
            mass[place + row] = mass[place + row] * before + other_mass[row] * now;
            float* const to = out + (place + row) * dim;
            const float* const from = sums + row * apart;
            if (high == NONE)
                for (int64_t d = 0; d < dim; ++d) to[d] = from[d] * now;
            else
                for (int64_t d = 0; d < dim; ++d) to[d] = to[d] * before + from[d] * now;
        }
    }
};

}  // namespace kvcapsule
