// Queries in the frames of their tiles, and behind q_map.
#pragma once

#include "block_products.h"
#include "workspace.h"

namespace kvcapsule {

// The queries of a batch row and a set. Lines: of each head, query rows of two tiles in turn (as Source.line).
class Queries {
  public:
    const int64_t width;  // of a line of mapped ones: channels of stored keys, filled up

    Queries(const Source& src, Arena& arena)
        : width(padded(src.s.keys.channels)), src_(src), line_(padded(src.call.dim)) {
        rotated_ = arena.take(TILES * (src.real_rows + 8) * line_);
        q_map_ = arena.take(src.s.q_map.data ? src.s.heads * src.call.dim * width : 0);
    }

    void open_set(int64_t set) {
        const Strided& map = src_.s.q_map;
        for (int64_t head = 0; map.data && head < src_.s.heads; ++head)
            copy_map(map.data + (src_.s.head ? 0 : set * src_.s.heads + head) * map.first, src_.call.dim, map.second,
                     src_.s.keys.channels, 1, q_map_ + head * src_.call.dim * width, width);
    }

    void load(const float* query) { query_ = query, ready_ = 0; }

    // The lines of some tiles, rotated back by their frames. Without q_map, they are what keys meet.
    const float* rotate(const Tile* tile, int64_t tiles) {
        const int64_t rows = src_.call.rows;
        for (int64_t i = src_.s.half ? 0 : ready_; i < tiles; ++i)
            for (int64_t row = 0; row < src_.real_rows; ++row) {
                const int64_t at = (row / rows * TILES / 2 + i / 2) * rows + row % rows;
                rotate_row(query_ + row * src_.call.dim, tile[i].entry, rotated_ + (2 * at + i % 2) * line_);
            }
        ready_ = tiles > ready_ ? tiles : ready_;
        return rotated_;
    }

    // Rotated lines of a head times its q_map.
    template <class Place> void map(int64_t head, int64_t tiles, const Place& place) const {
        product<1>(rotated_ + head * TILES * src_.call.rows * line_, line_, (tiles + 1) / 2 * 2 * src_.call.rows,
                   q_map_ + head * src_.call.dim * width, src_.call.dim, width, place);
    }

  private:
    void rotate_row(const float* __restrict from, int64_t entry, float* __restrict to) const {
        const int64_t half = src_.s.half;
        const float *const cos = src_.s.cos + entry * half, *const sin = src_.s.sin + entry * half;
        const float scale = src_.call.scale;
        // Channels that rotate together are `second` apart.
        const auto rotate = [&](int64_t step, int64_t second) INLINE_LAMBDA {
            for (int64_t i = 0; i < half; ++i) {
                const float a = from[step * i] * scale, b = from[step * i + second] * scale;
                to[step * i] = a * cos[i] + b * sin[i];
                to[step * i + second] = b * cos[i] - a * sin[i];
            }
        };
        if (src_.s.interleaved) rotate(2, 1);
        else rotate(1, half);
        for (int64_t d = 2 * half; d < line_; ++d) to[d] = d < src_.call.dim ? from[d] * scale : 0;
    }

    const Source& src_;
    int64_t line_, ready_ = 0;  // ready_: tiles whose lines need not be made again
    const float* query_ = nullptr;
    float *rotated_, *q_map_;
};

}  // namespace kvcapsule
