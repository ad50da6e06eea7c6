// Queries in the frames of their tiles, and behind q_map.
#pragma once

#include "block_products.h"
#include "workspace.h"

namespace kvcapsule {

// The queries of a batch row and a set. Lines: of each head, query rows of two tiles in turn (as Shape.line).
class Queries {
  public:
    const int64_t width;  // of a line of mapped ones: channels of stored keys, filled up

    Queries(const Call& call, const Segment& s, Arena& arena) : width(padded(s.keys.channels)), call_(call), s_(s) {
        line_ = padded(call.dim);
        rotated_ = arena.take(TILES * (s.heads * call.rows + 8) * line_);
        q_map_ = arena.take(s.q_map.data ? s.heads * call.dim * width : 0);
    }

    void open_set(int64_t set) {
        const int64_t first = s_.head ? 0 : set * s_.heads, dim = call_.dim, channels = s_.keys.channels;
        for (int64_t head = 0; s_.q_map.data && head < s_.heads; ++head)
            copy_map(s_.q_map.data + (first + head) * s_.q_map.first, dim, s_.q_map.second, channels, 1,
                     q_map_ + head * dim * width, width);
    }

    void load(const float* query) { query_ = query, ready_ = 0; }

    // The lines of some tiles, rotated back by their frames. Without q_map, they are what keys meet.
    const float* rotate(const Tile* tile, int64_t tiles) {
        for (int64_t i = s_.half ? 0 : ready_; i < tiles; ++i)
            for (int64_t row = 0; row < s_.heads * call_.rows; ++row) {
                const int64_t head = row / call_.rows, at = (head * TILES / 2 + i / 2) * call_.rows + row % call_.rows;
                rotate_row(query_ + row * call_.dim, tile[i].entry, rotated_ + (2 * at + i % 2) * line_);
            }
        ready_ = tiles > ready_ ? tiles : ready_;
        return rotated_;
    }

    // Rotated lines of a head times its q_map.
    template <class Place> void map(int64_t head, int64_t tiles, const Place& place) const {
        product<1>(rotated_ + head * TILES * call_.rows * line_, line_, (tiles + 1) / 2 * 2 * call_.rows,
                   q_map_ + head * call_.dim * width, call_.dim, width, place);
    }

  private:
    void rotate_row(const float* __restrict from, int64_t entry, float* __restrict to) const {
        const float *const cos = s_.cos + entry * s_.half, *const sin = s_.sin + entry * s_.half;
        // Channels that rotate together are `second` apart.
        const auto rotate = [&](int64_t step, int64_t second) INLINE_LAMBDA {
            for (int64_t i = 0; i < s_.half; ++i) {
                const float a = from[step * i] * call_.scale, b = from[step * i + second] * call_.scale;
                to[step * i] = a * cos[i] + b * sin[i];
                to[step * i + second] = b * cos[i] - a * sin[i];
            }
        };
        if (s_.interleaved) rotate(2, 1);
        else rotate(1, s_.half);
        for (int64_t d = 2 * s_.half; d < line_; ++d) to[d] = d < call_.dim ? from[d] * call_.scale : 0;
    }

    const Call& call_;
    const Segment& s_;
    int64_t line_, ready_ = 0;  // ready_: tiles whose lines need not be made again
    const float* query_ = nullptr;
    float *rotated_, *q_map_;
};

}  // namespace kvcapsule
