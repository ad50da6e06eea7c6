// The reader of coefficient rows: a cell's eight numbers of two tiles lie side by side in one vector.
//
// Two groups of rows (keys) meet the same queries, and two channels (values) the same weights: what is loaded serves both.
#pragma once

#include "cell_words.h"
#include "rotary_queries.h"

namespace kvcapsule {

// Keys or values in cells, and what loops over the cells of a set need; see cell_words.py for lines.
struct Cells {
    const Rows& rows;
    int64_t pairs;       // of groups (keys) or channels (values)
    float *step, *shift; // of each cell of the lines, [2 n], 0 in null cells; of keys the rows' offset, twice each [2 n, 16]
    uint32_t* words;     // [words of a set, TILES]
    int64_t base[TILES], first_line = 0;

    Cells(const Rows& rows_, int64_t sets, bool of_channels, Arena& arena) : rows(rows_) {
        pairs = ((of_channels ? rows.channels : rows.rows / 8) + 1) / 2;
        int64_t lines = 0, most = 0;
        for (int64_t set = 0; set < sets; ++set) {
            const int32_t* const last = rows.ranges + (set * WIDTHS + WIDTHS - 1) * 3;
            const int64_t count = bounds(set, pairs - 1)[2] - bounds(set, 0)[0], end = last[2] + (last[1] - last[0]) / 4 + 4;
            lines = count > lines ? count : lines;
            most = end > most ? end : most;
        }
        step = arena.take(2 * lines);
        shift = of_channels ? nullptr : arena.take(2 * LANES * lines);
        words = reinterpret_cast<uint32_t*>(arena.take(most * TILES));
    }

    const int32_t* bounds(int64_t set, int64_t pair) const { return rows.bounds + (set * pairs + pair) * 3; }

    void open_set(int64_t set) {
        first_line = bounds(set, 0)[0];
        const int64_t channels = rows.channels, count = 2 * (bounds(set, pairs - 1)[2] - first_line);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t cell = rows.numbers[2 * first_line + i], valid = cell < rows.cells;
            step[i] = valid && rows.widths[cell] ? rows.step[cell] : 0;
            const float* const offset = rows.offset + cell / channels * 8 * channels + cell % channels;
            for (int m = 0; shift && m < 8; ++m)
                shift[i * LANES + 2 * m] = shift[i * LANES + 2 * m + 1] = valid ? offset[m * channels] : 0;
        }
    }

    // Lays out the words of some tiles. What stands in the place of a tile that is not there is not read.
    void open_tiles(const Tile* tile, int64_t tiles, int64_t set) {
        for (int64_t i = 0; i < TILES; ++i) base[i] = tile[i < tiles ? i : 0].entry * rows.entry;
        lay_words(rows, base, set, words);
    }

    // Fetches one of some parts of the cells of the next tiles: what is asked for at once has to be waited for.
    void expect(const Tile* next, int64_t tiles, int64_t set, int64_t part) const {
        for (int64_t tile = part * tiles / pairs; tile < (part + 1) * tiles / pairs; ++tile)
            for (const int32_t* range = rows.ranges + set * WIDTHS * 3; range < rows.ranges + (set + 1) * WIDTHS * 3; range += 3)
                for (int64_t at = range[0]; at < range[1] + 63; at += 64)
                    prefetch(static_cast<const uint8_t*>(rows.data) + next[tile].entry * rows.entry + at);
    }

    // Calls body(line, what its cells meet, numbers) for each line of a pair; numbers(half, tile): of two tiles from `tile` on.
    template <class Body> INLINE void each_line(int64_t set, int64_t pair, const Body& body) const {
        const int32_t* const bound = bounds(set, pair);
        const uint8_t* const data = static_cast<const uint8_t*>(rows.data);
        for (int64_t i = bound[0]; i < bound[2]; ++i) {
            const uint64_t first = rows.lines[2 * i], second = rows.lines[2 * i + 1], met = first >> 32;
            const uint32_t low[2] = {static_cast<uint32_t>(first), static_cast<uint32_t>(second)};
            const float* const steps = step + 2 * (i - first_line);
            if (i < bound[1]) {
                const Decoder decoders[2] = {{low[0] >> 24, steps[0]}, {low[1] >> 24, steps[1]}};
                const uint32_t* const at[2] = {words + (low[0] & 0xffffff) * TILES, words + (low[1] & 0xffffff) * TILES};
                body(i - first_line, met,
                     [&](int half, int64_t tile) INLINE_LAMBDA { return decoders[half].numbers(at[half] + tile); });
            } else {
                body(i - first_line, met, [&](int half, int64_t tile) INLINE_LAMBDA {
                    return eight_bit_numbers(data + base[tile] + low[half], data + base[tile + 1] + low[half], steps[half]);
                });
            }
        }
    }
};

// Where a product's sums belong whose rows 2 i and 2 i + 1 are two tiles: their numbers in turn, eight columns a vector.
struct SideBySide {
    float* out;
    int64_t rows, pair, row, group;  // rows of a pair of tiles; how far pairs, rows and groups of eight columns are apart

    template <int A, int V> INLINE void put(const Floats (&sum)[A][V], int64_t line, int64_t column) const {
        UNROLL for (int a = 0; a < A; a += 2) {
            const int64_t i = (line + a) / 2;
            float* const to = out + i / rows * pair + i % rows * row + column / 8 * group;
            EACH(v, V) {
                store(to + 2 * v * group, lower_interleaved(sum[a][v], sum[a + 1][v]));
                store(to + (2 * v + 1) * group, upper_interleaved(sum[a][v], sum[a + 1][v]));
            }
        }
    }
};

class CoefficientReader {
  public:
    static constexpr bool PAIRED = true;  // products with key rows are [pairs of tiles, rows, M, 2]

    CoefficientReader(const Source& src, Arena& arena)
        : src_(src), s_(src.s), query_map_(src, arena), keys_(s_.keys, s_.sets, false, arena),
          values_(s_.values, s_.sets, true, arena), columns_(padded(s_.values.channels)),
          weight_count_(src.rows * src.value_line * 2) {
        queries_ = arena.take(TILES * src.rows * query_map_.width);
        weights_ = arena.take(weight_count_);
        row_weights_ = arena.take((src.rows + 8) * src.value_line);
        sums_ = arena.take(src.blocks * s_.values.channels * 8);
        offset_ = arena.take(s_.values.rows * columns_);
    }

    void open_set(int64_t set) {
        const int64_t rows = s_.values.rows, channels = s_.values.channels;
        set_ = set;
        query_map_.open_set(set);
        keys_.open_set(set);
        values_.open_set(set);
        copy_map(s_.values.offset + set * rows * channels, rows, channels, channels, 1, offset_, columns_);
    }

    void load_queries(const float* query) {
        query_map_.load(query);
        memset(weights_, 0, weight_count_ * sizeof(float));
        memset(sums_, 0, src_.blocks * s_.values.channels * 8 * sizeof(float));
    }

    void score_rows(const Tile* tile, int64_t tiles, int64_t next, float* z) {
        const int64_t line = 2 * query_map_.width, pairs = (tiles + 1) / 2;
        query_map_.rotate(tile, tiles);
        for (int64_t head = 0; head < s_.heads; ++head)
            query_map_.map(head, tiles, SideBySide{queries_ + head * src_.call.rows * line, src_.call.rows, src_.rows * line, line, LANES});
        keys_.open_tiles(tile, tiles, set_);
        with_block(src_.block, [&](auto size) {
            constexpr int R = decltype(size)::value, P = R <= 2 ? 4 : R == 4 ? 2 : 1;
            for (int64_t block = 0; block < src_.blocks; ++block)
                for (int64_t groups = 0; groups < keys_.pairs; ++groups) {
                    if (!block) keys_.expect(tile + tiles, next, set_, groups);
                    int64_t p = 0;
                    for (; p + P <= pairs; p += P) score_groups<R, P>(block, groups, p, z);
                    for (; P > 1 && p < pairs; ++p) score_groups<R, 1>(block, groups, p, z);
                }
        });
    }

    void map_scores(const float* z, int64_t lines, const float* map, float* scores) const {
        product<2>(z, 2 * s_.keys.rows, lines, map, s_.keys.rows, src_.score_line, ByRow{scores, src_.score_line});
    }

    // Weights of the value rows are [pairs of tiles, M / 8, rows, 8, 2].
    void map_weights(const float* scores, int64_t lines, const float* map, float* weights) const {
        product<1>(scores, src_.score_line, lines, map, src_.tokens, src_.value_line,
                   SideBySide{weights, src_.rows, weight_count_, LANES, src_.rows * LANES});
    }

    void add_values(const Tile* tile, int64_t tiles, int64_t next, const float* weights) {
        const int64_t pairs = (tiles + 1) / 2;
        for (int64_t at = 0; at < weight_count_; at += LANES) {
            Floats sum = load(weights_ + at);
            for (int64_t pair = 0; pair < pairs; ++pair) sum += load(weights + pair * weight_count_ + at);
            store(weights_ + at, sum);
        }
        values_.open_tiles(tile, tiles, set_);
        with_block(src_.block, [&](auto size) {
            for (int64_t block = 0; block < src_.blocks; ++block)
                for (int64_t channels = 0; channels < values_.pairs; ++channels) {
                    if (!block) values_.expect(tile + tiles, next, set_, channels);
                    add_channels<size>(block, channels, pairs, weights);
                }
        });
    }

    void rescale(int64_t row, float factor) {
        float* const sums = sums_ + row / src_.block * s_.values.channels * 8 + row % src_.block;
        for (int64_t c = 0; c < s_.values.channels; ++c) sums[c * 8] *= factor;
        for (int64_t at = row * LANES; at < weight_count_; at += src_.rows * LANES)
            store(weights_ + at, load(weights_ + at) * splat(factor));
    }

    void finish(float* out) {
        for (int64_t row = 0; row < src_.real_rows; ++row)
            for (int64_t m = 0; m < s_.values.rows; ++m) {
                const float* const at = weights_ + (m / 8 * src_.rows + row) * LANES + m % 8 * 2;
                row_weights_[row * src_.value_line + m] = at[0] + at[1];
            }
        product<1>(row_weights_, src_.value_line, src_.real_rows, offset_, s_.values.rows, columns_, ByRow{out, columns_});
        for (int64_t row = 0; row < src_.real_rows; ++row) {
            const float* const sums = sums_ + row / src_.block * s_.values.channels * 8 + row % src_.block;
            for (int64_t c = 0; c < s_.values.channels; ++c) out[row * columns_ + c] += sums[c * 8];
        }
    }

  private:
    // Products of a block of R queries of P pairs of tiles from p on with two groups of key rows.
    template <int R, int P> INLINE void score_groups(int64_t block, int64_t groups, int64_t p, float* z) const {
        Floats sum[2][P][R] = {};
        const int64_t line = 2 * query_map_.width, apart = src_.rows * line, rows = s_.keys.rows;
        const float* const queries = queries_ + p * apart + block * R * line;
        keys_.each_line(set_, groups, [&](int64_t i, int64_t channel, const auto& numbers) INLINE_LAMBDA {
            const Floats shift[2] = {load(keys_.shift + 2 * LANES * i), load(keys_.shift + 2 * LANES * i + LANES)};
            EACH(pair, P) {
                const Floats first = numbers(0, 2 * (p + pair)) + shift[0], second = numbers(1, 2 * (p + pair)) + shift[1];
                EACH(r, R) {
                    const Floats query = splat_pair(queries + pair * apart + r * line + channel * 2);
                    sum[0][pair][r] += first * query;
                    sum[1][pair][r] += second * query;
                }
            }
        });
        EACH(pair, P) EACH(r, R) {
                float* const to = z + ((p + pair) * src_.rows + block * R + r) * 2 * rows + groups * 2 * LANES;
                store(to, sum[0][pair][r]);
                if (groups * 16 + 8 < rows) store(to + LANES, sum[1][pair][r]);
            }
    }

    // Adds two channels of the value rows of so many pairs of tiles.
    template <int R> INLINE void add_channels(int64_t block, int64_t channels, int64_t pairs, const float* weights) {
        Floats sum[(2 * R + 3) / 4 * 4] = {};
        const int64_t apart = src_.rows * LANES;
        values_.each_line(set_, channels, [&](int64_t, int64_t group, const auto& numbers) INLINE_LAMBDA {
            const float* here = weights + block * R * LANES + group * apart;
            for (int64_t p = 0; p < pairs; ++p, here += weight_count_) {
                const Floats first = numbers(0, 2 * p), second = numbers(1, 2 * p);
                EACH(r, R) {
                    const Floats weight = held(load(here + r * LANES));
                    sum[r] += first * weight;
                    sum[R + r] += second * weight;
                }
            }
        });
        float found[(2 * R + 3) / 4 * 4];
        UNROLL for (int i = 0; i < 2 * R; i += 4) store_four_sums(found + i, sum + i);
        float* const to = sums_ + (block * s_.values.channels + 2 * channels) * 8;
        for (int half = 0; half < 2 && 2 * channels + half < s_.values.channels; ++half)
            for (int r = 0; r < R; ++r) to[half * 8 + r] += found[half * R + r];
    }

    const Source& src_;
    const Segment& s_;
    Queries query_map_;
    Cells keys_, values_;
    int64_t set_ = 0, columns_, weight_count_;
    float *queries_, *weights_;             // [pairs, rows, width, 2]; [M / 8, rows, 8, 2]: of a batch row's tiles together
    float *sums_, *offset_, *row_weights_;  // [blocks, C, 8], [M, columns], [rows, M filled up]
};

}  // namespace kvcapsule
