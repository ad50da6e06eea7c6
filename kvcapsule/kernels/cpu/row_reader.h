// The reader of rows that are stored one by one: raw, or quantised to few bits, which become numbers a tile at a time.
//
// A reader has (Pass in attend.cpp calls them in this order, for each set; from load_queries on for each batch row):
//   open_set(set)                    makes what is the same for all tiles of a set
//   load_queries(query)              of a batch row; what has been added up begins at 0
//   score_rows(tile, tiles, next)    products of the queries with the stored keys of some tiles; `next` follow behind these
//   map_scores(lines, map, scores)   where there is a score_map: scores of the tokens from these products,
//   map_weights(scores, lines, map)  and where there is a value_map, weights of the stored values from those of the tokens
//   add_values(tile, tiles, next, weights, caps)
//   rescale(row, factor)             of what has been added up
//   finish(out)                      what has been added up: [rows, padded(C)]
#pragma once

#include "rotary_queries.h"

namespace kvcapsule {

// Sixteen codes of a channel, of which eight fill BITS bytes; `count` are there to be read, a multiple of 8.
template <int BITS> INLINE Ints codes_of_channel(const uint8_t* from, int64_t count) {
    if constexpr (BITS == 8) {
        typedef uint8_t Bytes __attribute__((vector_size(16)));
        Bytes codes = {};
        if (count >= LANES) std::memcpy(&codes, from, 16);
        else std::memcpy(&codes, from, 8);
        return __builtin_convertvector(codes, Ints);
    } else {
        uint64_t bytes = 0;
        if (count >= LANES) std::memcpy(&bytes, from, 2 * BITS);
        else std::memcpy(&bytes, from, BITS);
        // Each lane gets the word of eight codes that its own is in.
        const int32_t low = static_cast<int32_t>(bytes), high = static_cast<int32_t>(bytes >> 8 * BITS);
        const Ints words = {low, low, low, low, low, low, low, low, high, high, high, high, high, high, high, high};
        const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7};
        // Of 3 bits: two bytes of low bits, one of high ones.
        if (BITS == 3) return ((words >> (2 * lane)) & 3) | (((words >> (16 + lane)) & 1) << 2);
        return (words >> (BITS * lane)) & ((1 << BITS) - 1);
    }
}

class RowReader {
  public:
    static constexpr bool PAIRED = false;

    RowReader(const Source& src, Arena& arena) : src_(src), s_(src.s), queries_(src, arena), width_(padded(s_.values.channels)) {
        mapped_ = arena.take(s_.q_map.data ? TILES * (src.rows + 8) * queries_.width : 0);
        keys_ = arena.take(src.key_line * queries_.width);
        values_ = arena.take(src.value_line * width_);
        sums_ = arena.take(src.rows * width_);
    }

    void open_set(int64_t set) {
        set_ = s_.head ? 0 : set;
        queries_.open_set(set);
    }

    void load_queries(const float* query) {
        queries_.load(query);
        std::memset(sums_, 0, src_.rows * width_ * sizeof(float));
    }

    void score_rows(const Tile* tile, int64_t tiles, int64_t, float* z) {
        const int64_t width = queries_.width;
        const float* queries = queries_.rotate(tile, tiles);
        if (s_.q_map.data) queries_.map(0, tiles, ByRow{mapped_, width}), queries = mapped_;
        for (int64_t i = 0; i < tiles; ++i) {
            const int64_t count = s_.score_map.data ? s_.keys.rows : tile[i].count;
            const float* const query = queries + (i / 2 * src_.call.rows * 2 + i % 2) * width;
            int64_t apart;
            const float* const keys = rows_of(s_.keys, tile[i], count, false, keys_, width, apart);
            with_block(src_.block, [&](auto size) {
                for (int64_t row = 0; row < src_.rows; row += size)
                    dots<size>(query + 2 * row * width, 2 * width, keys, apart, count, width,
                               z + src_.line(i, row) * src_.key_line, 2 * src_.key_line);
            });
        }
    }

    void map_scores(const float* z, int64_t lines, const float* map, float* scores) const {
        product<1>(z, src_.key_line, lines, map, s_.keys.rows, src_.score_line, ByRow{scores, src_.score_line});
    }

    void map_weights(const float* scores, int64_t lines, const float* map, float* weights) const {
        product<1>(scores, src_.score_line, lines, map, src_.tokens, src_.value_line, ByRow{weights, src_.value_line});
    }

    void add_values(const Tile* tile, int64_t tiles, int64_t, const float* weights, const float* caps) {
        for (int64_t i = 0; i < tiles; ++i, caps += src_.score_line) {
            const int64_t count = s_.value_map.data ? s_.values.rows : tile[i].count;
            bool hidden = false;
            for (int64_t n = 0; !s_.value_map.data && n < count; ++n) hidden = hidden || caps[n] < 0;
            int64_t apart;
            const float* const values = rows_of(s_.values, tile[i], count, hidden, values_, width_, apart);
            // What nobody sees may be anything: a weight of 0 would not silence what is not a number.
            for (int64_t n = 0; hidden && n < count; ++n)
                if (caps[n] < 0) std::memset(values_ + n * width_, 0, width_ * sizeof(float));
            with_block(src_.block, [&](auto size) {
                constexpr int R = decltype(size)::value, V = R <= 2 ? 8 : R == 4 ? 4 : 2;
                for (int64_t row = 0; row < src_.rows; row += R) {
                    const float* const w = weights + src_.line(i, row) * src_.value_line;
                    int64_t c = 0;
                    for (; c + V * LANES <= width_; c += V * LANES) add<R, V>(w, values + c, apart, count, row, c);
                    for (; c < width_; c += LANES) add<R, 1>(w, values + c, apart, count, row, c);
                }
            });
        }
    }

    void rescale(int64_t row, float factor) {
        for (int64_t c = row * width_; c < (row + 1) * width_; ++c) sums_[c] *= factor;
    }

    void finish(float* out) const { std::memcpy(out, sums_, src_.real_rows * width_ * sizeof(float)); }

  private:
    // A tile's rows, `apart`: where they are, or made in `buffer` [count, width], filled up with zeros.
    const float* rows_of(const Rows& rows, const Tile& tile, int64_t count, bool copied, float* buffer, int64_t width,
                         int64_t& apart) const {
        const int64_t first = tile.entry * rows.entry + set_ * rows.head;
        const float* const from = static_cast<const float*>(rows.data) + first + tile.token * rows.row;
        apart = width;
        if (s_.form == QUANTIZED) {
            const uint8_t* const codes = static_cast<const uint8_t*>(rows.data) + first + tile.token / 8 * rows.bits;
            with_constant<1, 2, 3, 4, 8>(rows.bits, [&](auto bits) { read_codes<bits>(rows, tile, count, codes, buffer, width); });
        } else if (copied || rows.channels % LANES) {
            copy_map(from, count, rows.row, rows.channels, 1, buffer, width);
        } else {
            return apart = rows.row, from;
        }
        return buffer;
    }

    // x = step * code + least value, step and least value of each channel of an entry.
    template <int BITS>
    void read_codes(const Rows& rows, const Tile& tile, int64_t count, const uint8_t* codes, float* out, int64_t width) const {
        const int64_t written = (rows.rows + 7) / 8 * 8 - tile.token;
        const int64_t scales = (tile.entry * (s_.head ? 1 : s_.sets) + set_) * rows.channels;
        for (int64_t c = 0; c < rows.channels; c += LANES)
            for (int64_t n = 0; n < count; n += LANES) {
                Floats numbers[LANES];
                EACH(i, LANES) {
                    const int64_t channel = c + i < rows.channels ? c + i : c;
                    const uint8_t* const from = codes + channel * rows.row + n / 8 * BITS;
                    const Floats code = __builtin_convertvector(codes_of_channel<BITS>(from, written - n), Floats);
                    numbers[i] = code * splat(rows.step[scales + channel]) + splat(rows.offset[scales + channel]);
                }
                store_transposed(numbers, out + n * width + c, width);
            }
    }

    template <int R, int V>
    INLINE void add(const float* weights, const float* values, int64_t apart, int64_t count, int64_t row, int64_t column) {
        float* const to = sums_ + row * width_ + column;
        Floats sum[R][V];
        EACH(r, R)
            EACH(v, V) sum[r][v] = load(to + r * width_ + v * LANES);
        // The next tile's values are on their way meanwhile.
        accumulate<R, V, 1>(sum, weights, 2 * src_.value_line, values, apart, count, values == values_ ? 0 : CHUNK * apart);
        ByRow{to, width_}.put(sum, 0, 0);
    }

    const Source& src_;
    const Segment& s_;
    Queries queries_;
    int64_t width_, set_ = 0;
    float *mapped_, *keys_, *values_, *sums_;  // queries; rows of a tile that are made; [rows, width]
};

}  // namespace kvcapsule
