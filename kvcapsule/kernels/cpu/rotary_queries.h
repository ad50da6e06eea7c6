// Queries in the frames of their tiles, and behind q_map.
#pragma once

#include "block_products.h"
#include "workspace.h"

namespace kvcapsule {

// The two channels that rotate together by angle i.
struct Pair {
    int64_t first, second;

    Pair(const Segment& s, int64_t i) : first(s.interleaved ? 2 * i : i), second(s.interleaved ? 2 * i + 1 : i + s.half) {}
};

// Rows of queries rotated back by the frame of an entry: for raw and quantised rows, whose keys have as many channels as queries.
inline void rotate_back(const Segment& s, int64_t entry, const float* query, int64_t rows, int64_t dim, float* out) {
    const float *cos = s.cos + entry * s.half, *sin = s.sin + entry * s.half;
    for (int64_t row = 0; row < rows; ++row, query += dim, out += dim) {
        if (s.interleaved) {
            for (int64_t i = 0; i < s.half; ++i) {
                out[2 * i] = query[2 * i] * cos[i] + query[2 * i + 1] * sin[i];
                out[2 * i + 1] = query[2 * i + 1] * cos[i] - query[2 * i] * sin[i];
            }
        } else {
            const float* const second = query + s.half;
            float* const out_second = out + s.half;
            for (int64_t i = 0; i < s.half; ++i) {
                const float a = query[i], b = second[i];
                out[i] = a * cos[i] + b * sin[i];
                out_second[i] = b * cos[i] - a * sin[i];
            }
        }
        for (int64_t d = 2 * s.half; d < dim; ++d) out[d] = query[d];
    }
}

// The queries of a batch row and a set, rotated back by a tile's frame and mapped: what the keys of an entry meet.
class EntryQueries {
  public:
    EntryQueries(const Call& call, const Segment& s, const Shape& shape, Arena& arena) : call_(call), s_(s), shape_(shape) {
        line_ = padded(s.keys.channels);
        query_ = arena.take(shape.rows * call.dim);
        rotated_ = s.half ? arena.take(shape.rows * call.dim) : nullptr;
        map_ = s.q_map.data ? arena.take(call.dim * line_) : nullptr;
        mapped_ = map_ || call.dim != line_ ? arena.take(shape.rows * line_) : nullptr;
    }

    int64_t line() const { return line_; }

    void open_set(int64_t set) {
        const float* const map = s_.q_map.data + (s_.head ? 0 : set) * s_.q_map.first;
        if (map_) copy_map(map, call_.dim, s_.q_map.second, s_.keys.channels, 1, map_, line_);
    }

    void load(const float* query) {
        for (int64_t i = 0; i < shape_.real_rows * call_.dim; ++i) query_[i] = query[i] * call_.scale;
        entry_ = -1;
    }

    // [rows, line()], 0 behind the channels. What stands in the place of rows that fill up a block does not matter.
    const float* of(int64_t entry) {
        if (entry == entry_ || (entry_ >= 0 && !s_.half)) return found_;
        const int64_t dim = call_.dim;
        entry_ = entry;
        found_ = query_;
        if (s_.half) rotate_back(s_, entry, query_, shape_.rows, dim, rotated_), found_ = rotated_;
        if (map_) small_product(found_, dim, shape_.rows, map_, line_, dim, line_, ByRow{mapped_, line_});
        else if (mapped_) copy_map(found_, shape_.rows, dim, dim, 1, mapped_, line_);
        return found_ = mapped_ ? mapped_ : found_;
    }

  private:
    const Call& call_;
    const Segment& s_;
    const Shape& shape_;
    int64_t line_, entry_ = -1;
    float *query_, *rotated_, *map_, *mapped_;
    const float* found_ = nullptr;
};

// Rotated and mapped queries of many tiles as one product.
//
// With c and s the cosines and sines of a tile's frame, a rotated query times its map is linear in them: for channels a, b that rotate
// together, c (q_a m_a + q_b m_b) + s (q_b m_a - q_a m_b). What stands in brackets is the same for all tiles of a batch row, so the queries
// of its tiles are [c, s, 1] times it, 1 for channels that are not rotated; without frames that is all.
struct QueryMap {
    int64_t features;        // of a tile: 2 half + 1, or without the 1
    int64_t columns, line;   // rows * C, filled up; and room behind the last row
    float *map, *of_tiles;   // [features, line], [TILES, features]

    QueryMap(const Segment& s, int64_t rows, int64_t dim, Arena& arena) {
        features = 2 * s.half + (2 * s.half < dim);
        columns = padded(rows * s.keys.channels);
        line = columns + LANES;
        map = arena.take(features * line);
        of_tiles = arena.take(TILES * features);
    }

    // For a batch row and a set; query [rows of the set, D]. What stands in the place of rows that fill up a block does not matter.
    void load_queries(const Segment& s, const Call& call, int64_t set, const float* query, int64_t real_rows) {
        const int64_t dim = call.dim, count = s.keys.channels;
        for (int64_t i = 0; i < s.half; ++i) {
            const Pair pair(s, i);
            float *cos = map + i * line, *sin = map + (s.half + i) * line;
            for (int64_t row = 0; row < real_rows; ++row, cos += count, sin += count) {
                const float* const q_map = s.q_map.data + (set * s.heads + row / call.rows) * s.q_map.first;
                const float *a = q_map + pair.first * s.q_map.second, *b = q_map + pair.second * s.q_map.second;
                const Floats q_a = splat(query[row * dim + pair.first] * call.scale);
                const Floats q_b = splat(query[row * dim + pair.second] * call.scale);
                for (int64_t c = 0; c < count; c += LANES) {
                    const Floats m_a = load_part(a + c, count - c), m_b = load_part(b + c, count - c);
                    store(cos + c, q_a * m_a + q_b * m_b);  // the next row's numbers come over what is too much
                    store(sin + c, q_b * m_a - q_a * m_b);
                }
            }
        }
        if (2 * s.half == dim) return;
        float* rest = map + 2 * s.half * line;
        for (int64_t row = 0; row < real_rows; ++row, rest += count) {
            const float* const q_map = s.q_map.data + (set * s.heads + row / call.rows) * s.q_map.first;
            for (int64_t c = 0; c < count; c += LANES) {
                Floats sum = {};
                for (int64_t d = 2 * s.half; d < dim; ++d)
                    sum += splat(query[row * dim + d] * call.scale) * load_part(q_map + d * s.q_map.second + c, count - c);
                store(rest + c, sum);
            }
        }
    }

    void set_tile(const Segment& s, int64_t tile, int64_t entry) {
        float* const to = of_tiles + tile * features;
        std::memcpy(to, s.cos + entry * s.half, s.half * sizeof(float));
        std::memcpy(to + s.half, s.sin + entry * s.half, s.half * sizeof(float));
        if (features > 2 * s.half) to[2 * s.half] = 1;
    }
};

}  // namespace kvcapsule
