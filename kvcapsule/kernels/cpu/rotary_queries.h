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

// Mapped queries of eight tiles as one product.
//
// With c and s a frame's cosine and sine of an angle, a rotated query times its map is linear in them: for channels a
// and b that rotate together, c (q_a m_a + q_b m_b) + s (q_b m_a - q_a m_b). The brackets are the same for all tiles of
// a batch row, so a tile's queries are its features [c, s, 1] times them; 1 is of channels that do not rotate.
class QueryMap {
  public:
    const int64_t width;  // columns [blocks, C, R], filled up; R query rows of a block

    QueryMap(const Source& src, Arena& arena) : width(width_of(src)), src_(src) {
        features_ = 2 * src.s.half + (2 * src.s.half < src.call.dim);
        map_ = arena.take(features_ * width);
        features_of_tiles_ = arena.take(TILES * features_);
        lanes_ = arena.take(src.call.dim * LANES);
    }

    // Of a batch row and a set.
    void load_queries(const float* query, int64_t set) {
        const int64_t rows = src_.call.rows, size = src_.block;
        for (int64_t block = 0; block < src_.blocks; ++block)
            for (int64_t head = block * size / rows; head * rows < (block + 1) * size && head < src_.s.heads; ++head) {
                const Strided& map = src_.s.q_map;
                const float* const mine = map.data + (src_.s.head ? 0 : set * src_.s.heads + head) * map.first;
                load_lanes(query, block, head);
                // A block's other heads are added to the first one.
                load_block(mine, map_ + block * size * src_.s.keys.channels, head * rows > block * size);
            }
    }

    template <class Place> void map(const Tile* tile, int64_t tiles, const Place& place) {
        const int64_t half = src_.s.half;
        for (int64_t i = 0; i < tiles; ++i) {
            float* const to = features_of_tiles_ + i * features_;
            memcpy(to, src_.s.cos + tile[i].entry * half, half * sizeof(float));
            memcpy(to + half, src_.s.sin + tile[i].entry * half, half * sizeof(float));
            if (features_ > 2 * half) to[2 * half] = 1;
        }
        product<1>(features_of_tiles_, features_, TILES, map_, features_, width, place);
    }

  private:
    // What is stored last of a line of `map_` goes beyond its numbers.
    static int64_t width_of(const Source& src) {
        const int64_t channels = src.s.keys.channels;
        if (src.block == 1) return padded((src.rows - 1) * channels + padded(channels));
        return padded(src.rows * channels + LANES - src.block);
    }

    // lanes_ [D, 16]: a block's query rows of a head, 0 for others; of blocks of one row, that row in all lanes.
    void load_lanes(const float* query, int64_t block, int64_t head) {
        const int64_t dim = src_.call.dim, size = src_.block;
        const float* const rows = query + block * size * dim;
        for (int64_t d = 0; d < dim; ++d) {
            store(lanes_ + d * LANES, size == 1 ? Floats(rows[d] * src_.call.scale) : Floats{});
            for (int64_t lane = 0, row = block * size; size > 1 && lane < size && row < src_.real_rows; ++lane, ++row)
                if (row / src_.call.rows == head) lanes_[d * LANES + lane] = rows[lane * dim + d] * src_.call.scale;
        }
    }

    // A block's columns; numbers that come over those of the next channel are replaced by its own.
    void load_block(const float* q_map, float* out, bool add) {
        const int64_t half = src_.s.half, channels = src_.s.keys.channels, line = src_.s.q_map.second;
        const int64_t size = src_.block, step = size == 1 ? LANES : 1;
        const auto number = [&](const float* from, int64_t c) INLINE_LAMBDA {
            return step == 1 ? Floats(from[c]) : load_part(from + c, channels - c);
        };
        const auto put = [&](float* to, Floats x) INLINE_LAMBDA { store(to, add ? load(to) + x : x); };
        for (int64_t i = 0; i < half; ++i) {
            const int64_t first = src_.s.interleaved ? 2 * i : i, second = src_.s.interleaved ? 2 * i + 1 : i + half;
            const float *const a = q_map + first * line, *const b = q_map + second * line;
            const Floats q_a = load(lanes_ + first * LANES), q_b = load(lanes_ + second * LANES);
            float *const cos = out + i * width, *const sin = cos + half * width;
            for (int64_t c = 0; c < channels; c += step) {
                const Floats m_a = number(a, c), m_b = number(b, c);
                put(cos + c * size, q_a * m_a + q_b * m_b);
                put(sin + c * size, q_b * m_a - q_a * m_b);
            }
        }
        for (int64_t c = 0; features_ > 2 * half && c < channels; c += step) {
            Floats sum = {};
            for (int64_t d = 2 * half; d < src_.call.dim; ++d)
                sum += load(lanes_ + d * LANES) * number(q_map + d * line, c);
            put(out + 2 * half * width + c * size, sum);
        }
    }

    const Source& src_;
    int64_t features_;
    float *map_, *features_of_tiles_, *lanes_;  // [features, width], [TILES, features], [D, 16]
};

}  // namespace kvcapsule
