// The reader of coefficient rows: a cell's eight numbers of two tiles lie side by side in one vector.
//
// Two groups of rows (keys) meet the same queries, and two channels (values) the same weights: what is loaded once serves both.
#pragma once

#include "cell_words.h"
#include "rotary_queries.h"

namespace kvcapsule {

// Keys or values in cells, with what loops over a set's cells need.
struct Cells {
    const Rows& rows;
    int64_t pairs;     // of groups (keys) or channels (values)
    float* step;       // in the order of the lines; 0 where there is no cell, or one of no bits
    float* shift;      // keys: 16 numbers a cell, its rows' offset, twice each
    uint32_t* words;   // [words of a set, TILES]
    int64_t base[TILES];
    int64_t first_line;  // of the set

    Cells(const Rows& rows_, int64_t sets, int64_t blocks, bool with_offset, Arena& arena) : rows(rows_), pairs((blocks + 1) / 2) {
        int64_t most = 0;
        for (int64_t set = 0; set < sets; ++set) {
            const int64_t count = bounds(set, pairs - 1)[2] - bounds(set, 0)[0];
            most = count > most ? count : most;
        }
        step = arena.take(2 * most);
        shift = with_offset ? arena.take(2 * LANES * most) : nullptr;
        words = arena.take<uint32_t>((words_of_a_set(rows, sets) + 1) * TILES);
    }

    const int32_t* bounds(int64_t set, int64_t pair) const { return rows.bounds + (set * pairs + pair) * 3; }

    void open_set(int64_t set) {
        first_line = bounds(set, 0)[0];
        const int64_t count = 2 * (bounds(set, pairs - 1)[2] - first_line), channels = rows.channels;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t cell = rows.numbers[2 * first_line + i];
            const bool valid = cell < rows.cells;
            step[i] = valid && rows.widths[cell] ? rows.step[cell] : 0;
            if (!shift) continue;
            const float* const offset = rows.offset + cell / channels * 8 * channels + cell % channels;
            for (int m = 0; m < 8; ++m) shift[i * LANES + 2 * m] = shift[i * LANES + 2 * m + 1] = valid ? offset[m * channels] : 0;
        }
    }

    void lay(int64_t set) { lay_words(rows, base, set, words); }

    // Fetches one of some parts of the cells of the next tiles.
    void expect(const Tile* next, int64_t tiles, int64_t set, int64_t part, int64_t parts) const {
        for (int64_t tile = part * tiles / parts; tile < (part + 1) * tiles / parts; ++tile)
            for (int i = 0; i < WIDTHS; ++i) {
                const int32_t* const range = rows.ranges + (set * WIDTHS + i) * 3;
                const uint8_t* const data = static_cast<const uint8_t*>(rows.data) + next[tile].entry * rows.entry;
                for (int64_t at = range[0]; at < range[1] + 63; at += 64) prefetch(data + (at < range[1] ? at : range[1] - 1));
            }
    }

    // Calls body(line, what its cells meet, numbers) for each line of a pair of blocks; numbers(half, tile) of two tiles from `tile` on.
    template <class Body> INLINE void each_line(int64_t set, int64_t pair, const Body& body) const {
        const int32_t* const bound = bounds(set, pair);
        const int64_t* const lines = rows.lines;
        for (int64_t i = bound[0]; i < bound[1]; ++i) {
            const float* const steps = step + 2 * (i - first_line);
            const uint64_t first = lines[2 * i], second = lines[2 * i + 1];
            const Decoder decoders[2] = {{static_cast<int64_t>((first & 0xffffffff) >> 24), steps[0]},
                                         {static_cast<int64_t>((second & 0xffffffff) >> 24), steps[1]}};
            const uint32_t* const at[2] = {words + (first & 0xffffff) * TILES, words + (second & 0xffffff) * TILES};
            body(i - first_line, static_cast<int64_t>(first >> 32),
                 [&](int half, int64_t tile) INLINE_LAMBDA { return decoders[half].numbers(at[half] + tile); });
        }
        for (int64_t i = bound[1]; i < bound[2]; ++i) {
            const float* const steps = step + 2 * (i - first_line);
            const uint64_t first = lines[2 * i], second = lines[2 * i + 1];
            const uint8_t* const at[2] = {static_cast<const uint8_t*>(rows.data) + (first & 0xffffffff),
                                          static_cast<const uint8_t*>(rows.data) + (second & 0xffffffff)};
            body(i - first_line, static_cast<int64_t>(first >> 32), [&](int half, int64_t tile) INLINE_LAMBDA {
                return eight_bit_numbers(at[half] + base[tile], at[half] + base[tile + 1], steps[half]);
            });
        }
    }
};

class CoefficientReader {
  public:
    static constexpr bool PAIRED = true;   // lines of stored keys: two tiles side by side

    CoefficientReader(const Call& call, const Segment& s, const Shape& shape, Arena& arena)
        : call_(call), s_(s), shape_(shape), queries_map_(s, shape.rows, call.dim, arena),
          keys_(s.keys, s.sets, s.keys.rows / 8, true, arena), values_(s.values, s.sets, s.values.channels, false, arena) {
        queries_ = arena.take(TILES * queries_map_.columns);
        weights_ = arena.take(shape.blocks * shape.value_line * 2 * shape.block);
        sums_ = arena.take(shape.blocks * s.values.channels * 8);
        offset_ = arena.take(s.values.rows * padded(s.values.channels));
        row_weights_ = arena.take(shape.rows * shape.value_line);
    }

    void open_set(int64_t set) {
        set_ = set;
        keys_.open_set(set);
        values_.open_set(set);
        const int64_t channels = s_.values.channels;
        copy_map(s_.values.offset + set * s_.values.rows * channels, s_.values.rows, channels, channels, 1, offset_, padded(channels));
    }

    void load_queries(const float* query) {
        queries_map_.load_queries(s_, call_, set_, query, shape_.real_rows);
        std::memset(weights_, 0, shape_.blocks * shape_.value_line * 2 * shape_.block * sizeof(float));
        std::memset(sums_, 0, shape_.blocks * s_.values.channels * 8 * sizeof(float));
    }

    // z [pairs of tiles, rows, M, 2]: products of the queries with the key rows.
    void score_rows(const Tile* tile, int64_t tiles, int64_t next_tiles, float* z) {
        for (int64_t i = 0; i < TILES; ++i) {
            // Words are laid out for all tiles; what stands in the place of one that is not there is not read.
            const int64_t entry = tile[i < tiles ? i : 0].entry;
            keys_.base[i] = entry * s_.keys.entry, values_.base[i] = entry * s_.values.entry;
            queries_map_.set_tile(s_, i, entry);
        }
        keys_.lay(set_);
        const Interleaved place{queries_, 2 * queries_map_.columns, 2};
        product<1>(queries_map_.of_tiles, queries_map_.features, TILES, queries_map_.map, queries_map_.line, queries_map_.features,
                   queries_map_.columns, place);
        const int64_t pairs = (tiles + 1) / 2;
        with_block(shape_.block, [&](auto size) {
            constexpr int R = decltype(size)::value, P = R <= 2 ? 4 : R == 4 ? 2 : 1;
            for (int64_t block = 0; block < shape_.blocks; ++block)
                for (int64_t pair = 0; pair < keys_.pairs; ++pair) {
                    // The next tiles' cells, a few at a time: what is asked for at once has to be waited for.
                    if (!block) keys_.expect(tile + tiles, next_tiles, set_, pair, keys_.pairs);
                    int64_t p = 0;
                    for (; p + P <= pairs; p += P) score_pair<R, P>(block, pair, p, z);
                    for (; P > 1 && p < pairs; ++p) score_pair<R, 1>(block, pair, p, z);
                }
        });
    }

    // Weights of the value rows [pairs, blocks, M / 8, R, 8, 2] from those of the tokens [lines, N].
    void map_weights(const float* p, int64_t lines, const float* map, float* w) const {
        const WeightGroups place{w, shape_.block, shape_.blocks, shape_.value_line / 8};
        product<1>(p, shape_.score_line, lines, map, shape_.value_line, shape_.tokens, shape_.value_line, place);
    }

    void add_values(const Tile* tile, int64_t tiles, int64_t next_tiles, const float* w, const float*) {
        const int64_t pairs = (tiles + 1) / 2, size = shape_.blocks * shape_.value_line * 2 * shape_.block;
        for (int64_t at = 0; at < size; at += LANES) {
            Floats sum = load(weights_ + at);
            for (int64_t pair = 0; pair < pairs; ++pair) sum += load(w + pair * size + at);
            store(weights_ + at, sum);
        }
        values_.lay(set_);
        with_block(shape_.block, [&](auto count) {
            for (int64_t block = 0; block < shape_.blocks; ++block)
                for (int64_t pair = 0; pair < values_.pairs; ++pair) {
                    if (!block) values_.expect(tile + tiles, next_tiles, set_, pair, values_.pairs);
                    add_pair<decltype(count)::value>(block, pair, pairs, w, size);
                }
        });
    }

    void rescale(int64_t row, float factor) {
        const int64_t block = row / shape_.block, r = row % shape_.block;
        for (int64_t c = 0; c < s_.values.channels; ++c) sums_[(block * s_.values.channels + c) * 8 + r] *= factor;
        for (int64_t group = 0; group < shape_.value_line / 8; ++group) {
            float* const at = weights_ + ((block * shape_.value_line / 8 + group) * shape_.block + r) * LANES;
            store(at, load(at) * splat(factor));
        }
    }

    // The sums [rows, padded(C)], offset included.
    void finish(float* out) {
        const int64_t channels = s_.values.channels, line = padded(channels);
        for (int64_t row = 0; row < shape_.real_rows; ++row) {
            const int64_t block = row / shape_.block, r = row % shape_.block;
            for (int64_t m = 0; m < s_.values.rows; ++m) {
                const float* const at = weights_ + ((block * shape_.value_line / 8 + m / 8) * shape_.block + r) * LANES + m % 8 * 2;
                row_weights_[row * shape_.value_line + m] = at[0] + at[1];
            }
        }
        small_product(row_weights_, shape_.value_line, shape_.real_rows, offset_, line, s_.values.rows, line, ByRow{out, line});
        for (int64_t row = 0; row < shape_.real_rows; ++row) {
            const float* const sums = sums_ + row / shape_.block * channels * 8 + row % shape_.block;
            for (int64_t c = 0; c < channels; ++c) out[row * line + c] += sums[c * 8];
        }
    }

  private:
    // Rows 2 i and 2 i + 1 are two tiles, whose numbers lie side by side: pair i at out + i * pair, columns at out + column * step.
    struct Interleaved {
        float* out;
        int64_t pair, step;

        template <int A, int V> INLINE void put(const Floats (&sum)[A][V], int64_t row, int64_t column) const {
            for (int a = 0; a < A; a += 2)
                UNROLL
                for (int v = 0; v < V; ++v) {
                    Floats low, high;
                    interleave(sum[a][v], sum[a + 1][v], low, high);
                    float* const to = out + (row + a) / 2 * pair + (column + v * LANES) * step;
                    store(to, low);
                    store(to + LANES, high);
                }
        }
    };

    // The same with groups of eight columns outside of a block's rows.
    struct WeightGroups {
        float* out;
        int64_t block, blocks, groups;

        template <int A, int V> INLINE void put(const Floats (&sum)[A][V], int64_t line, int64_t column) const {
            for (int a = 0; a < A; a += 2) {
                const int64_t row = (line + a) / 2;  // of all pairs of tiles
                float* const to = out + (row / block * groups + column / 8) * block * LANES + row % block * LANES;
                UNROLL
                for (int v = 0; v < V; ++v) {
                    Floats low, high;
                    interleave(sum[a][v], sum[a + 1][v], low, high);
                    store(to + 2 * v * block * LANES, low);
                    store(to + (2 * v + 1) * block * LANES, high);
                }
            }
        }
    };

    // Products of a block of R queries of P pairs of tiles from p on with two groups of key rows.
    template <int R, int P> INLINE void score_pair(int64_t block, int64_t pair, int64_t p, float* z) const {
        Floats sum[2][P][R] = {};
        const int64_t channels = s_.keys.channels, apart = 2 * queries_map_.columns;
        const float* const queries = queries_ + p * apart + block * R * channels * 2;
        keys_.each_line(set_, pair, [&](int64_t line, int64_t channel, const auto& numbers) INLINE_LAMBDA {
            const Floats shift[2] = {load(keys_.shift + 2 * LANES * line), load(keys_.shift + 2 * LANES * line + LANES)};
            UNROLL
            for (int i = 0; i < P; ++i) {
                const Floats first = numbers(0, 2 * (p + i)) + shift[0], second = numbers(1, 2 * (p + i)) + shift[1];
                UNROLL
                for (int r = 0; r < R; ++r) {
                    const Floats query = splat_pair(queries + i * apart + (r * channels + channel) * 2);
                    sum[0][i][r] += first * query;
                    sum[1][i][r] += second * query;
                }
            }
        });
        const int64_t rows = s_.keys.rows;
        UNROLL
        for (int i = 0; i < P; ++i)
            UNROLL
            for (int r = 0; r < R; ++r) {
                float* const to = z + ((p + i) * shape_.rows + block * R + r) * 2 * rows + pair * 2 * LANES;
                store(to, sum[0][i][r]);
                if (pair * 16 + 8 < rows) store(to + LANES, sum[1][i][r]);
            }
    }

    // Adds two channels of the value rows of so many pairs of tiles.
    template <int R> INLINE void add_pair(int64_t block, int64_t pair, int64_t pairs, const float* w, int64_t apart) {
        Floats sum[2 * R] = {};
        const float* const weights = w + block * shape_.value_line * 2 * R;
        values_.each_line(set_, pair, [&](int64_t, int64_t group, const auto& numbers) INLINE_LAMBDA {
            const float* here = weights + group * LANES * R;
            for (int64_t p = 0; p < pairs; ++p, here += apart) {
                const Floats first = numbers(0, 2 * p), second = numbers(1, 2 * p);
                UNROLL
                for (int r = 0; r < R; ++r) {
                    const Floats weight = load(here + r * LANES);
                    sum[r] += first * weight;
                    sum[R + r] += second * weight;
                }
            }
        });
        float found[(2 * R + 3) / 4 * 4];
        sums_of_lanes(sum, found);
        float* const to = sums_ + (block * s_.values.channels + 2 * pair) * 8;
        UNROLL
        for (int r = 0; r < R; ++r) to[r] += found[r];
        UNROLL
        for (int r = 0; r < R && 2 * pair + 1 < s_.values.channels; ++r) to[8 + r] += found[R + r];
    }

    const Call& call_;
    const Segment& s_;
    const Shape& shape_;
    QueryMap queries_map_;
    Cells keys_, values_;
    int64_t set_ = 0;
    float* queries_;      // [pairs, rows * C filled up, 2]
    float* weights_;      // [blocks, M / 8, R, 8, 2]: of a batch row's tiles together
    float* sums_;         // [blocks, C, 8]
    float* offset_;       // [M, padded(C)]
    float* row_weights_;  // [rows, M filled up]
};

}  // namespace kvcapsule
