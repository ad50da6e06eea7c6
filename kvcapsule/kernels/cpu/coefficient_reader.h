// The reader of coefficient rows: a cell's eight numbers of two tiles lie side by side in one vector.
#pragma once

#include "cell_words.h"
#include "rotary_queries.h"

namespace kvcapsule {

// Keys or values in cells, and what loops over cells need. A block is a group of keys or a channel of values.
struct Cells {
    const Rows& rows;
    bool of_channels;
    int64_t blocks;
    float *scale, *shift;  // of a set's cells: 0 for one of no bits; of keys their rows' offset, twice each [n, 16]
    int32_t* query;        // of a set's cells of keys: where the queries of its channel begin (see ByChannel)
    uint32_t* words;       // [words of a set, TILES]
    int64_t base[TILES], first = 0;

    Cells(const Rows& rows_, int64_t sets, bool of_channels_, Arena& arena) : rows(rows_), of_channels(of_channels_) {
        blocks = of_channels ? rows.channels : rows.rows / 8;
        int64_t cells = 0, most = 0;
        for (int64_t set = 0; set < sets; ++set) {
            const int32_t* const last = rows.ranges + (set * WIDTHS + WIDTHS - 1) * 3;
            const int64_t count = bounds(set, blocks - 1)[2] - bounds(set, 0)[0];
            const int64_t end = last[2] + (last[1] - last[0] + 15) / 16 * 4 + 4;
            cells = count > cells ? count : cells;
            most = end > most ? end : most;
        }
        scale = arena.take(cells);
        shift = arena.take(of_channels ? 0 : LANES * cells);
        query = reinterpret_cast<int32_t*>(arena.take(of_channels ? 0 : cells));
        words = reinterpret_cast<uint32_t*>(arena.take(most * TILES));
    }

    const int32_t* bounds(int64_t set, int64_t block) const { return rows.bounds + (set * blocks + block) * 3; }

    // size: query rows of a block.
    void open_set(int64_t set, int64_t size) {
        const int64_t channels = rows.channels, groups = rows.rows / 8;
        first = bounds(set, 0)[0];
        for (int64_t block = 0; block < blocks; ++block)
            for (int64_t i = bounds(set, block)[0]; i < bounds(set, block)[2]; ++i) {
                const int64_t met = rows.cells[i] >> 32, group = set * groups + (of_channels ? met : block);
                const int64_t channel = of_channels ? block : met, cell = group * channels + channel;
                if (!of_channels) query[i - first] = (channel / LANES * LANES * size + channel % LANES) * 2;
                scale[i - first] = rows.widths[cell] ? rows.scale[cell] : 0;
                for (int64_t m = 0; !of_channels && m < LANES; ++m)
                    shift[(i - first) * LANES + m] = rows.offset[(8 * group + m / 2) * channels + channel];
            }
    }

    // Lays out the words of some tiles. What stands in the place of a tile that is not there is not read.
    void open_tiles(const Tile* tile, int64_t tiles, int64_t set) {
        for (int64_t i = 0; i < TILES; ++i) base[i] = tile[i < tiles ? i : 0].entry * rows.entry;
        lay_words(rows, base, set, words);
    }

    // Fetches one of some parts of the cells of the next tiles: what is asked for at once has to be waited for.
    void expect(const Tile* next, int64_t tiles, int64_t set, int64_t part) const {
        const int32_t *const begin = rows.ranges + set * WIDTHS * 3, *const end = begin + WIDTHS * 3;
        for (int64_t tile = part * tiles / blocks; tile < (part + 1) * tiles / blocks; ++tile)
            for (const int32_t* range = begin; range < end; range += 3)
                for (int64_t at = range[0]; at < range[1] + 63; at += 64)
                    prefetch(static_cast<const uint8_t*>(rows.data) + next[tile].entry * rows.entry + at);
    }

    // Whether a block and the next one have a cell of few bits for each thing they meet, so that each_cell reads both.
    bool alike(int64_t set, int64_t block) const {
        const int64_t all = of_channels ? rows.rows / 8 : rows.channels;
        const auto plain = [&](const int32_t* bound) { return bound[1] - bound[0] == all && bound[2] == bound[1]; };
        return block + 1 < blocks && plain(bounds(set, block)) && plain(bounds(set, block + 1));
    }

    // Calls body(cell, what it meets, numbers) for each cell of a block, or of two that are alike;
    // numbers(tile, g): of two tiles from `tile` on, of the first or the second block.
    template <int BLOCKS, class Body> INLINE void each_cell(int64_t set, int64_t block, const Body& body) const {
        const int32_t* const bound = bounds(set, block);
        const uint8_t* const data = static_cast<const uint8_t*>(rows.data);
        for (int64_t i = bound[0]; i < bound[2]; ++i) {
            const int64_t met = rows.cells[i] >> 32, place = rows.cells[i] & 0xffffffff;
            const float factor = scale[i - first];
            if (i < bound[1]) {
                const int64_t other = i + (BLOCKS - 1) * (bound[1] - bound[0]), place2 = rows.cells[other] & 0xffffffff;
                const Decoder decoder(place >> 24, factor), decoder2(place2 >> 24, scale[other - first]);
                const uint32_t* const at = words + (place & 0xffffff) * TILES;
                const uint32_t* const at2 = words + (place2 & 0xffffff) * TILES;
                body(i - first, met, [&](int64_t tile, int g) INLINE_LAMBDA {
                    return g ? decoder2.numbers(at2 + tile) : decoder.numbers(at + tile);
                });
            } else if (BLOCKS == 1) {
                body(i - first, met, [&](int64_t tile, int) INLINE_LAMBDA {
                    return eight_bit_numbers(data + base[tile] + place, data + base[tile + 1] + place, factor);
                });
            }
        }
    }
};

// Where a product's sums belong whose rows 2 i and 2 i + 1 are two tiles: their numbers in turn.
struct SideBySide {
    float* out;
    int64_t rows, pair, row, group;  // rows of a pair; how far pairs, rows and groups of eight columns are apart

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

// Where mapped queries belong, as score_groups reads them: [pairs of tiles, blocks, C / 16, R, 16, 2].
struct ByChannel {
    float* const* places;  // of the first channels of each pair of lines
    int64_t lines, block;

    template <int A, int V> INLINE void put(const Floats (&sum)[A][V], int64_t line, int64_t column) const {
        UNROLL for (int a = 0; a < A; a += 2) {
            if (line + a >= lines) return;
            float* const to = places[(line + a) / 2] + column * block * 2;
            EACH(v, V) {
                store(to + v * block * 2 * LANES, lower_interleaved(sum[a][v], sum[a + 1][v]));
                store(to + v * block * 2 * LANES + LANES, upper_interleaved(sum[a][v], sum[a + 1][v]));
            }
        }
    }
};

class CoefficientReader {
  public:
    static constexpr int PAIR = 2;  // products with key rows are [pairs of tiles, rows, M, 2]

    CoefficientReader(const Source& src, Arena& arena)
        : src_(src), s_(src.s), rotary_(src, arena), keys_(s_.keys, s_.sets, false, arena),
          values_(s_.values, s_.sets, true, arena), columns_(padded(s_.values.channels)),
          weight_count_(src.rows * src.value_line * 2) {
        queries_ = arena.take(TILES * src.rows * rotary_.width);
        places_ = reinterpret_cast<float**>(arena.take(TILES * src.real_rows));
        weights_ = arena.take(weight_count_);
        row_weights_ = arena.take((src.rows + 8) * src.value_line);
        sums_ = arena.take(src.blocks * s_.values.channels * 8);
        offset_ = arena.take(s_.values.rows * columns_);
    }

    void open_set(int64_t set) {
        const int64_t rows = s_.values.rows, channels = s_.values.channels;
        set_ = set;
        rotary_.open_set(set);
        const int64_t width = rotary_.width, queries = src_.call.rows, pair_lines = TILES / 2 * queries;
        memset(queries_, 0, TILES * src_.rows * width * sizeof(float));
        for (int64_t i = 0; i < s_.heads * pair_lines; ++i) {
            const int64_t row = i / pair_lines * queries + i % queries, pair = i % pair_lines / queries;
            const int64_t begin = row / src_.block * src_.block;
            places_[i] = queries_ + ((pair * src_.rows + begin) * width + (row - begin) * LANES) * 2;
        }
        keys_.open_set(set, src_.block);
        values_.open_set(set, src_.block);
        copy_map(s_.values.offset + set * rows * channels, rows, channels, channels, 1, offset_, columns_);
    }

    void load_queries(const float* query) {
        rotary_.load(query);
        memset(weights_, 0, weight_count_ * sizeof(float));
        memset(sums_, 0, src_.blocks * s_.values.channels * 8 * sizeof(float));
    }

    void score_rows(const Tile* tile, int64_t tiles, int64_t next, float* z) {
        const int64_t pairs = (tiles + 1) / 2;
        rotary_.rotate(tile, tiles);
        const int64_t lines = TILES / 2 * src_.call.rows;
        for (int64_t head = 0; head < s_.heads; ++head)
            rotary_.map(head, tiles, ByChannel{places_ + head * lines, pairs * 2 * src_.call.rows, src_.block});
        keys_.open_tiles(tile, tiles, set_);
        with_block(src_.block, [&](auto size) {
            constexpr int R = decltype(size)::value, P = fitting(R, R <= 2 ? 4 : 2);
            for (int64_t block = 0; block < src_.blocks; ++block)
                for (int64_t group = 0, two; group < keys_.blocks; group += 1 + two) {
                    two = REGISTERS == 1 && R < 8 && keys_.alike(set_, group);
                    for (int64_t i = group; !block && i <= group + two; ++i) keys_.expect(tile + tiles, next, set_, i);
                    int64_t p = 0;
                    for (; two && p + P <= pairs; p += P) score_groups<R, P, 2>(block, group, p, z);
                    for (; !two && p + P <= pairs; p += P) score_groups<R, P, 1>(block, group, p, z);
                    for (; p < pairs; ++p)
                        for (int64_t i = group; i <= group + two; ++i) score_groups<R, 1, 1>(block, i, p, z);
                }
        });
    }

    // Weights of the value rows are [pairs of tiles, M / 8, rows, 8, 2].
    SideBySide weights_place(float* weights) const {
        return {weights, src_.rows, weight_count_, LANES, src_.rows * LANES};
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
                for (int64_t channel = 0; channel < values_.blocks; ++channel) {
                    if (!block) values_.expect(tile + tiles, next, set_, channel);
                    add_channel<size>(block, channel, pairs, weights);
                }
        });
    }

    void rescale(int64_t row, float factor) {
        float* const sums = sums_ + row / src_.block * s_.values.channels * 8 + row % src_.block;
        for (int64_t c = 0; c < s_.values.channels; ++c) sums[c * 8] *= factor;
        for (int64_t at = row * LANES; at < weight_count_; at += src_.rows * LANES)
            store(weights_ + at, load(weights_ + at) * factor);
    }

    void finish(float* out) {
        for (int64_t row = 0; row < src_.real_rows; ++row)
            for (int64_t m = 0; m < s_.values.rows; ++m) {
                const float* const at = weights_ + (m / 8 * src_.rows + row) * LANES + m % 8 * 2;
                row_weights_[row * src_.value_line + m] = at[0] + at[1];
            }
        const ByRow place{out, columns_};
        product<1>(row_weights_, src_.value_line, src_.real_rows, offset_, s_.values.rows, columns_, place);
        for (int64_t row = 0; row < src_.real_rows; ++row) {
            const float* const sums = sums_ + row / src_.block * s_.values.channels * 8 + row % src_.block;
            for (int64_t c = 0; c < s_.values.channels; ++c) out[row * columns_ + c] += sums[c * 8];
        }
    }

  private:
    // Products of a block of R queries of P pairs of tiles from p on with one or two groups of key rows.
    template <int R, int P, int G> INLINE void score_groups(int64_t block, int64_t group, int64_t p, float* z) const {
        Floats sum[G][P][R] = {};
        const int64_t width = rotary_.width, apart = 2 * src_.rows * width, channels = s_.keys.channels;
        const float* const queries = queries_ + p * apart + block * R * width * 2;
        keys_.each_cell<G>(set_, group, [&](int64_t cell, int64_t, const auto& numbers) INLINE_LAMBDA {
            const float* const shift = keys_.shift + LANES * cell;
            const float* const mine = queries + keys_.query[cell];
            EACH(pair, P) {
                Floats keys[G];
                EACH(g, G) keys[g] = held(numbers(2 * (p + pair), g) + load(shift + g * channels * LANES));
                EACH(r, R) {
                    const Floats query = held(splat_pair(mine + pair * apart + r * 2 * LANES));
                    EACH(g, G) sum[g][pair][r] += keys[g] * query;
                }
            }
        });
        float* const to = z + ((p * src_.rows + block * R) * s_.keys.rows + 8 * group) * 2;
        EACH(g, G) EACH(pair, P) EACH(r, R)
            store(to + (pair * src_.rows + r) * s_.keys.rows * 2 + g * LANES, sum[g][pair][r]);
    }

    // Adds a channel of the value rows of some pairs of tiles; P pairs have their own sums, so none waits for another.
    template <int R> INLINE void add_channel(int64_t block, int64_t channel, int64_t pairs, const float* weights) {
        constexpr int P = fitting(R, R <= 2 ? 4 : R == 4 ? 2 : 1), ROUND = (R + 3) / 4 * 4;
        Floats sum[P][ROUND] = {};
        const int64_t apart = src_.rows * LANES, count = weight_count_;
        const float* const from = weights + block * R * LANES;
        values_.each_cell<1>(set_, channel, [&](int64_t, int64_t group, const auto& numbers) INLINE_LAMBDA {
            const float* const here = from + group * apart;
            const auto add = [&](int i, int64_t p) INLINE_LAMBDA {
                const Floats value = numbers(2 * p, 0);
                EACH(r, R) sum[i][r] += value * load(here + p * count + r * LANES);
            };
            if (pairs == TILES / 2) {
                EACH(p, TILES / 2) add(p % P, p);
            } else {
                for (int64_t p = 0; p < pairs; ++p) add(0, p);
            }
        });
        EACH(i, P - 1) EACH(r, R) sum[0][r] += sum[i + 1][r];
        float sums[ROUND];
        EACH(i, ROUND / 4) store_four_sums(sums + 4 * i, sum[0] + 4 * i);
        float* const to = sums_ + (block * s_.values.channels + channel) * 8;
        EACH(r, ROUND) to[r] += sums[r];
    }

    const Source& src_;
    const Segment& s_;
    Queries rotary_;
    Cells keys_, values_;
    int64_t set_ = 0, columns_, weight_count_;
    float** places_;                        // [heads, TILES / 2, query rows of a head]: see ByChannel
    float *queries_, *weights_;             // see ByChannel; [M / 8, rows, 8, 2]: of all tiles
    float *sums_, *offset_, *row_weights_;  // [blocks, C, 8], [M, columns], [rows, M filled up]
};

}  // namespace kvcapsule
