// The reader of rows that are stored one by one: raw, or quantised to few bits, which become numbers a tile at a time.
//
// A reader has (Pass in attend.cpp calls them in this order, for each set; from load_queries on for each batch row):
//   open_set(set)                    makes what is the same for all tiles of a set
//   load_queries(query)              of a batch row; what has been added up begins at 0
//   score_rows(tile, tiles, next, z) products of the queries with the stored keys of some tiles; `next` follow these
//   weights_place(weights)           where the product with value_map puts the weights of the stored values
//   add_values(tile, tiles, next, weights)
//   rescale(row, factor)             of what has been added up
//   finish(out)                      what has been added up: [rows, padded(C)]
#pragma once

#include "mixed_rows.h"
#include "rotary_queries.h"

namespace kvcapsule {

// Sixteen codes of a channel, of which eight fill BITS bytes; `count` are there to be read, a multiple of 8.
template <int BITS> INLINE Ints codes_of_channel(const uint8_t* from, int64_t count) {
    if constexpr (BITS == 8) {
        Bytes codes = {};
        if (count >= LANES) memcpy(&codes, from, LANES);
        else if (count > 0) memcpy(&codes, from, 8);
        return from_bytes(codes);
    } else {
        uint64_t bytes = 0;
        if (count >= LANES) memcpy(&bytes, from, 2 * BITS);
        else if (count > 0) memcpy(&bytes, from, BITS);
        // Each lane gets the word of eight codes that its own is in.
        const int32_t low = static_cast<int32_t>(bytes), high = static_cast<int32_t>(bytes >> 8 * BITS);
        const Ints words = halves(low, high), lane = ints<0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7>();
        // Of 3 bits: two bytes of low bits, one of high ones.
        if (BITS == 3) return ((words >> (2 * lane)) & 3) | (((words >> (16 + lane)) & 1) << 2);
        return (words >> (BITS * lane)) & ((1 << BITS) - 1);
    }
}

class RowReader {
  public:
    static constexpr int PAIR = 1;

    RowReader(const Source& src, Arena& arena)
        : src_(src), s_(src.s), queries_(src, arena), mixed_keys_(s_.keys, arena), mixed_values_(s_.values, arena),
          width_(padded(s_.values.channels)) {
        mapped_ = arena.take(s_.q_map.data ? TILES * (src.rows + 8) * queries_.width : 0);
        keys_ = arena.take(src.key_line * queries_.width);
        values_ = arena.take(src.value_line * width_);
        block_sums_ = arena.take(8 * width_);
        sums_ = arena.take(src.rows * width_);
    }

    void open_set(int64_t set) {
        set_ = s_.head ? 0 : set;
        queries_.open_set(set);
        if (s_.form == MIXED) mixed_keys_.open_set(set), mixed_values_.open_set(set);
    }

    void load_queries(const float* query) {
        queries_.load(query);
        memset(sums_, 0, src_.rows * width_ * sizeof(float));
    }

    void score_rows(const Tile* tile, int64_t tiles, int64_t, float* z) {
        const int64_t width = queries_.width, line = src_.key_line;
        const float* queries = queries_.rotate(tile, tiles);
        if (s_.q_map.data) queries_.map(0, tiles, ByRow{mapped_, width}), queries = mapped_;
        for (int64_t i = 0; i < tiles; ++i) {
            const int64_t count = s_.score_map.data ? s_.keys.rows : tile[i].count;
            const Stored keys = read(s_.keys, mixed_keys_, tile[i], count, false, keys_, line);
            with_block(src_.block, [&](auto size) {
                for (int64_t row = 0; row < src_.rows; row += size) {
                    const float* const query = queries + ((i / 2 * src_.call.rows + row) * 2 + i % 2) * width;
                    float* const to = z + src_.line(i, row) * line;
                    constexpr int R = decltype(size)::value, V = fitting(R, R <= 4 ? 4 : 2);
                    int64_t n = 0;
                    if (s_.form != QUANTIZED && s_.keys.column == 1) {
                        dots<R>(query, 2 * width, keys.rows, keys.apart, count, width, to, 2 * line, ahead(s_.keys));
                    } else {
                        // Rows in memory end with a block's last whole vector; those in the buffer fill the line.
                        const int64_t end = s_.form == RAW ? padded(count) : line;
                        for (; n + V * LANES <= end; n += V * LANES) score_codes<R, V>(query, keys, n, to);
                        for (; n < end; n += LANES) score_codes<R, 1>(query, keys, n, to);
                    }
                }
            });
        }
    }

    ByRow weights_place(float* weights) const { return {weights, src_.value_line}; }

    void add_values(const Tile* tile, int64_t tiles, int64_t, const float* weights) {
        const int64_t line = src_.value_line;
        for (int64_t i = 0; i < tiles; ++i) {
            const int64_t count = s_.value_map.data ? s_.values.rows : tile[i].count;
            // What nobody sees may be anything: a weight of 0 would not silence what is not a number. Codes always are.
            const bool hides = s_.form == RAW && !s_.value_map.data && src_.hides();
            const Stored values = read(s_.values, mixed_values_, tile[i], count, hides, values_, line);
            for (int64_t n = 0, query; hides && n < count; ++n) {
                for (query = 0; query < src_.call.queries && !src_.sees(tile[i], query, n);) ++query;
                if (query == src_.call.queries) memset(values_ + n * width_, 0, width_ * sizeof(float));
            }
            with_block(src_.block, [&](auto size) {
                constexpr int R = decltype(size)::value, V = fitting(R, R <= 2 ? 8 : R == 4 ? 4 : 2);
                for (int64_t row = 0; row < src_.rows; row += R) {
                    const float* const w = weights + src_.line(i, row) * line;
                    int64_t c = 0;
                    if (s_.form != QUANTIZED) {
                        for (; c + V * LANES <= width_; c += V * LANES) add<R, V>(w, values, count, row, c);
                        for (; c < width_; c += LANES) add<R, 1>(w, values, count, row, c);
                    } else {
                        dots<R>(w, 2 * line, values.rows, line, s_.values.channels, line, block_sums_, width_, 0);
                        for (; c < R * width_; ++c) sums_[row * width_ + c] += block_sums_[c];
                    }
                }
            });
        }
    }

    void rescale(int64_t row, float factor) {
        for (int64_t c = row * width_; c < (row + 1) * width_; ++c) sums_[c] *= factor;
    }

    void finish(float* out) const { memcpy(out, sums_, src_.real_rows * width_ * sizeof(float)); }

  private:
    // How far the next tile's rows are behind those of a tile.
    int64_t ahead(const Rows& rows) const {
        return s_.form == MIXED ? 0 : src_.chunks > 1 ? CHUNK * rows.row : rows.entry;
    }

    struct Stored {
        const float* rows;
        int64_t apart;
    };

    // A tile's rows as they are, [count, C] or [C, line]; or in `buffer`: copied [count, padded(C)], or made of codes
    // [C, line].
    Stored read(const Rows& rows, MixedRows& mixed, const Tile& tile, int64_t count, bool copied, float* buffer,
                int64_t line) const {
        const int64_t first = tile.entry * rows.entry + set_ * rows.head, width = padded(rows.channels);
        if (s_.form == MIXED) return mixed.read(tile.entry, tile.token, count, buffer), Stored{buffer, width};
        if (s_.form == QUANTIZED) {
            // x = scale * code + minimum, scale and minimum of each channel of an entry.
            const int64_t scales = (tile.entry * (s_.head ? 1 : s_.sets) + set_) * rows.channels;
            const int64_t written = (rows.rows + 7) / 8 * 8 - tile.token, channels = rows.channels, apart = rows.row;
            const float *const scale = rows.scale + scales, *const minimum = rows.offset + scales;
            const uint8_t* from = static_cast<const uint8_t*>(rows.data) + first + tile.token / 8 * rows.bits;
            with_constant<1, 2, 3, 4, 8>(rows.bits, [&](auto bits) {
                for (int64_t c = 0; c < channels; ++c, from += apart)
                    for (int64_t n = 0; n < line; n += LANES) {
                        const Ints code = codes_of_channel<bits>(from + n / 8 * bits, written - n);
                        const Floats number = convert<Floats>(code);
                        store(buffer + c * line + n, number * scale[c] + minimum[c]);
                    }
            });
            return {buffer, line};
        }
        const float* const from = static_cast<const float*>(rows.data) + first + tile.token * rows.row;
        if (rows.column != 1) return {from, rows.column};
        if (!copied && rows.channels == width) return {from, rows.row};
        copy_map(from, count, rows.row, rows.channels, 1, buffer, width);
        return {buffer, width};
    }

    template <int R, int V> INLINE void score_codes(const float* query, const Stored& keys, int64_t n, float* z) const {
        Floats sum[R][V] = {};
        accumulate<R, V, 1>(sum, query, 2 * queries_.width, keys.rows + n, keys.apart, s_.keys.channels);
        ByRow{z + n, 2 * src_.key_line}.put(sum, 0, 0);
    }

    template <int R, int V>
    INLINE void add(const float* weights, const Stored& values, int64_t count, int64_t row, int64_t column) {
        float* const to = sums_ + row * width_ + column;
        Floats sum[R][V];
        EACH(r, R) EACH(v, V) sum[r][v] = load(to + r * width_ + v * LANES);
        // The next tile's values are on their way meanwhile.
        accumulate<R, V, 1>(sum, weights, 2 * src_.value_line, values.rows + column, values.apart, count,
                            ahead(s_.values));
        ByRow{to, width_}.put(sum, 0, 0);
    }

    const Source& src_;
    const Segment& s_;
    Queries queries_;
    MixedRows mixed_keys_, mixed_values_;
    int64_t width_, set_ = 0;
    float *mapped_, *keys_, *values_, *block_sums_, *sums_;  // queries; rows and sums of a tile; [rows, width]
};

}  // namespace kvcapsule
