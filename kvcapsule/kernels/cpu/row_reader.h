// The reader of rows that are stored one by one: raw, or quantised to few bits, which become numbers a tile at a time.
//
// A reader has (Pass in attend.cpp calls them in this order, for each set; from load_queries on for each batch row):
//   open_set(set)                     makes what is the same for all tiles of a set
//   load_queries(query)               of a batch row; what has been added up begins at 0
//   score_rows(tile, tiles, next, z)  products of the queries with the stored keys of some tiles; `next` tiles follow behind these
//   map_weights(p, lines, map, w)     weights of the stored values from those of the tokens, where there is a value_map
//   add_values(tile, tiles, next, w, caps)
//   rescale(row, factor)              of what has been added up
//   finish(out)                       what has been added up: [rows, padded(C)]
#pragma once

#include "online_softmax.h"
#include "rotary_queries.h"

namespace kvcapsule {

// Sixteen codes of a channel, of which eight fill `BITS` bytes; `count` are there to be read, a multiple of 8.
template <int BITS> INLINE Ints codes_of_run(const uint8_t* from, int64_t count) {
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

    RowReader(const Call& call, const Segment& s, const Shape& shape, Arena& arena)
        : s_(s), shape_(shape), queries_(call, s, shape, arena), line_(padded(s.values.channels)) {
        keys_ = arena.take(shape.key_line * queries_.line());
        values_ = arena.take(shape.value_line * line_);
        sums_ = arena.take(shape.rows * line_);
    }

    void open_set(int64_t set) {
        set_ = s_.head ? 0 : set;
        queries_.open_set(set);
    }

    void load_queries(const float* query) {
        queries_.load(query);
        std::memset(sums_, 0, shape_.rows * line_ * sizeof(float));
    }

    void score_rows(const Tile* tile, int64_t tiles, int64_t, float* z) {
        for (int64_t i = 0; i < tiles; ++i) {
            const int64_t count = s_.score_map.data ? s_.keys.rows : tile[i].count;
            const float* const query = queries_.of(tile[i].entry);
            int64_t apart;
            const float* const key = rows_of(s_.keys, tile[i], count, false, keys_, queries_.line(), apart);
            with_block(shape_.block, [&](auto size) {
                constexpr int R = decltype(size)::value;
                for (int64_t row = 0; row < shape_.rows; row += R)
                    dots<R>(query + row * queries_.line(), queries_.line(), key, apart, count, queries_.line(),
                            z + shape_.line(i, row) * shape_.key_line, 2 * shape_.key_line);
            });
        }
    }

    void map_weights(const float* p, int64_t lines, const float* map, float* w) const {
        product<1>(p, shape_.score_line, lines, map, shape_.value_line, shape_.tokens, shape_.value_line, ByRow{w, shape_.value_line});
    }

    void add_values(const Tile* tile, int64_t tiles, int64_t, const float* w, const float* caps) {
        for (int64_t i = 0; i < tiles; ++i) {
            const int64_t count = s_.value_map.data ? s_.values.rows : tile[i].count;
            const float* const cap = caps + i * shape_.score_line;
            bool hidden = false;
            for (int64_t n = 0; !s_.value_map.data && n < count; ++n) hidden = hidden || !(cap[n] > 0);
            int64_t apart;
            const float* const value = rows_of(s_.values, tile[i], count, hidden, values_, line_, apart);
            // What nobody sees may be anything: a weight of 0 would not silence what is not a number.
            for (int64_t n = 0; hidden && n < count; ++n)
                if (!(cap[n] > 0)) std::memset(values_ + n * line_, 0, line_ * sizeof(float));
            with_block(shape_.block, [&](auto size) {
                constexpr int R = decltype(size)::value, V = R <= 2 ? 8 : R == 4 ? 4 : 2;
                for (int64_t row = 0; row < shape_.rows; row += R) {
                    const float* const weights = w + shape_.line(i, row) * shape_.value_line;
                    int64_t column = 0;
                    for (; column + V * LANES <= line_; column += V * LANES) add<R, V>(weights, value + column, apart, count, row, column);
                    for (; column < line_; column += LANES) add<R, 1>(weights, value + column, apart, count, row, column);
                }
            });
        }
    }

    void rescale(int64_t row, float factor) {
        for (int64_t c = 0; c < line_; c += LANES) store(sums_ + row * line_ + c, load(sums_ + row * line_ + c) * splat(factor));
    }

    void finish(float* out) const { std::memcpy(out, sums_, shape_.real_rows * line_ * sizeof(float)); }

  private:
    // A tile's rows, `apart`: where they are, or copied into `buffer` [count, line] and filled up with zeros.
    const float* rows_of(const Rows& rows, const Tile& tile, int64_t count, bool copied, float* buffer, int64_t line, int64_t& apart) const {
        apart = line;
        if (s_.form == QUANTIZED) {
            switch (rows.bits) {
                case 1: read_codes<1>(rows, tile, count, buffer, line); break;
                case 2: read_codes<2>(rows, tile, count, buffer, line); break;
                case 3: read_codes<3>(rows, tile, count, buffer, line); break;
                case 4: read_codes<4>(rows, tile, count, buffer, line); break;
                default: read_codes<8>(rows, tile, count, buffer, line);
            }
            return buffer;
        }
        const float* const from = static_cast<const float*>(rows.data) + tile.entry * rows.entry + set_ * rows.head + tile.token * rows.row;
        if (copied || rows.channels % LANES) return copy_map(from, count, rows.row, rows.channels, 1, buffer, line), buffer;
        return apart = rows.row, from;
    }

    // x = step * code + least value, step and least value of each channel of an entry.
    template <int BITS> void read_codes(const Rows& rows, const Tile& tile, int64_t count, float* out, int64_t line) const {
        const int64_t written = (rows.rows + 7) / 8 * 8 - tile.token, first = (tile.entry * (s_.head ? 1 : s_.sets) + set_) * rows.channels;
        const uint8_t* const codes = static_cast<const uint8_t*>(rows.data) + tile.entry * rows.entry + set_ * rows.head + tile.token / 8 * BITS;
        for (int64_t c = 0; c < rows.channels; c += LANES) {
            const int many = rows.channels - c < LANES ? static_cast<int>(rows.channels - c) : LANES;
            for (int64_t n = 0; n < count; n += LANES) {
                Floats numbers[LANES];
                const uint8_t* from = codes + c * rows.row + n / 8 * BITS;
                UNROLL
                for (int i = 0; i < LANES; ++i, from += i < many ? rows.row : 0) {
                    const int channel = static_cast<int>(first + c) + (i < many ? i : 0);
                    const Floats code = __builtin_convertvector(codes_of_run<BITS>(from, written - n), Floats);
                    numbers[i] = code * splat(rows.step[channel]) + splat(rows.offset[channel]);
                }
                store_transposed(numbers, out + n * line + c, line);
            }
        }
    }

    template <int R, int V>
    INLINE void add(const float* weights, const float* value, int64_t apart, int64_t count, int64_t row, int64_t column) {
        float* const to = sums_ + row * line_ + column;
        Floats sum[R][V];
        UNROLL
        for (int r = 0; r < R; ++r)
            UNROLL
            for (int v = 0; v < V; ++v) sum[r][v] = load(to + r * line_ + v * LANES);
        // The next tile's values are on their way meanwhile.
        accumulate<R, V, 1>(sum, weights, 2 * shape_.value_line, value, apart, count, s_.value_map.data ? 0 : CHUNK * apart);
        UNROLL
        for (int r = 0; r < R; ++r)
            UNROLL
            for (int v = 0; v < V; ++v) store(to + r * line_ + v * LANES, sum[r][v]);
    }

    const Segment& s_;
    const Shape& shape_;
    EntryQueries queries_;
    int64_t line_, set_ = 0;
    float *keys_, *values_;  // of a tile
    float* sums_;            // [rows, line]
};

}  // namespace kvcapsule
