// The readers of rows that are stored one by one: raw, and quantised to few bits.
//
// A reader has (the pass in attend.cpp calls them in this order, for each set; from load_queries on for each batch row):
//   open_set(set)                    makes what is the same for all tiles of a set
//   load_queries(query)              of a batch row; what has been added up begins at 0
//   score_rows(tile, tiles, next, z) products of the queries with the stored keys of some tiles; `next` tiles follow behind these
//   map_weights(p, lines, map, w)    weights of the stored values from those of the tokens, where there is a value_map
//   add_values(tile, tiles, next, w, caps)
//   rescale(row, factor)             of what has been added up
//   finish(out)                      what has been added up: [rows, padded(C)]
#pragma once

#include "online_softmax.h"
#include "rotary_queries.h"

namespace kvcapsule {

// The queries of a batch row and a set, rotated back by a tile's frame and mapped: what an entry's keys meet.
class EntryQueries {
  public:
    EntryQueries(const Call& call, const Segment& s, const Shape& shape, Arena& arena) : call_(call), s_(s), shape_(shape) {
        line_ = padded(s.keys.channels);
        query_ = arena.take(shape.rows * padded(call.dim));
        rotated_ = s.half ? arena.take(shape.rows * call.dim) : nullptr;
        map_ = s.q_map.data ? arena.take(call.dim * line_) : nullptr;
        mapped_ = map_ || call.dim != line_ ? arena.take(shape.rows * line_) : nullptr;
    }

    int64_t line() const { return line_; }

    void open_set(int64_t set) {
        if (s_.q_map.data)
            copy_map(s_.q_map.data + (s_.head ? 0 : set) * s_.q_map.first, call_.dim, s_.q_map.second, s_.keys.channels, 1, map_, line_);
    }

    void load(const float* query) {
        for (int64_t i = 0; i < shape_.real_rows * call_.dim; ++i) query_[i] = query[i] * call_.scale;
        for (int64_t i = shape_.real_rows * call_.dim; i < shape_.rows * call_.dim; ++i) query_[i] = 0;
        entry_ = -1;
    }

    // [rows, line()], 0 behind the channels. The same memory at each call.
    const float* of(int64_t entry) {
        if (entry == entry_ || (entry_ >= 0 && !s_.half)) return found_;
        const int64_t dim = call_.dim;
        found_ = query_;
        if (s_.half) rotate_back(s_, entry, query_, shape_.rows, dim, rotated_), found_ = rotated_;
        if (map_) {
            small_product(found_, dim, shape_.rows, map_, line_, dim, line_, ByRow{mapped_, line_});
            found_ = mapped_;
        } else if (mapped_) {
            copy_map(found_, shape_.rows, dim, dim, 1, mapped_, line_);
            found_ = mapped_;
        }
        entry_ = entry;
        return found_;
    }

  private:
    const Call& call_;
    const Segment& s_;
    const Shape& shape_;
    int64_t line_, entry_ = -1;
    float *query_, *rotated_, *map_, *mapped_;
    const float* found_ = nullptr;
};

class RawReader {
  public:
    static constexpr bool PAIRED = false;

    RawReader(const Call& call, const Segment& s, const Shape& shape, Arena& arena)
        : s_(s), shape_(shape), queries_(call, s, shape, arena), line_(padded(s.values.channels)) {
        keys_ = s.keys.channels % LANES ? arena.take(shape.key_line * queries_.line()) : nullptr;
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
            const float* key = place(s_.keys, tile[i]);
            int64_t apart = s_.keys.row;
            if (keys_) copy_map(key, count, apart, s_.keys.channels, 1, keys_, queries_.line()), key = keys_, apart = queries_.line();
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
            const float* value = place(s_.values, tile[i]);
            int64_t apart = s_.values.row;
            bool seen = true;
            for (int64_t n = 0; !s_.value_map.data && n < count; ++n) seen = seen && caps[i * shape_.score_line + n] > 0;
            if (!seen || s_.values.channels % LANES) {
                // What nobody sees may be anything: a weight of 0 would not silence what is not a number.
                copy_map(value, count, apart, s_.values.channels, 1, values_, line_);
                for (int64_t n = 0; !seen && n < count; ++n)
                    if (!(caps[i * shape_.score_line + n] > 0)) std::memset(values_ + n * line_, 0, line_ * sizeof(float));
                value = values_, apart = line_;
            }
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
    static constexpr int64_t AHEAD = 64;

    const float* place(const Rows& rows, const Tile& tile) const {
        return static_cast<const float*>(rows.data) + tile.entry * rows.entry + set_ * rows.head + tile.token * rows.row;
    }

    template <int R, int V>
    INLINE void add(const float* weights, const float* value, int64_t apart, int64_t count, int64_t row, int64_t column) {
        float* const to = sums_ + row * line_ + column;
        Floats sum[R][V];
        UNROLL
        for (int r = 0; r < R; ++r)
            UNROLL
            for (int v = 0; v < V; ++v) sum[r][v] = load(to + r * line_ + v * LANES);
        accumulate<R, V, 1>(sum, weights, 2 * shape_.value_line, value, apart, count, s_.value_map.data ? 0 : AHEAD * apart);
        UNROLL
        for (int r = 0; r < R; ++r)
            UNROLL
            for (int v = 0; v < V; ++v) store(to + r * line_ + v * LANES, sum[r][v]);
    }

    const Segment& s_;
    const Shape& shape_;
    EntryQueries queries_;
    int64_t line_, set_ = 0;
    float *keys_, *values_;  // of a tile, filled up; values also without those that nobody sees
    float* sums_;            // [rows, line]
};

// Sixteen codes of a run of codes, less 2^(bits - 1). `count` are there to be read, a multiple of 8.
template <int BITS> INLINE Floats centred_codes(const uint8_t* from, int64_t count) {
    const float half = 1 << (BITS - 1);
#if AVX512
    if constexpr (BITS == 8) {
        const __m128i bytes = count >= LANES ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))
                                             : _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_xor_si128(bytes, _mm_set1_epi8(-128))));
    } else {
        // The word of a lane's code in each lane, moved to the code's place: two words of eight codes, or one of all sixteen.
        uint64_t bytes = 0;
        if (count >= LANES)
            std::memcpy(&bytes, from, 2 * BITS);
        else
            std::memcpy(&bytes, from, BITS);
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i in_word = _mm512_and_si512(lane, _mm512_set1_epi32(BITS <= 2 ? 15 : 7));
        __m512i words = _mm512_set1_epi32(static_cast<int32_t>(bytes));
        if (BITS > 2) {
            __m128i two = _mm_cvtsi64_si128(static_cast<int64_t>(bytes));
            if (BITS == 3) two = _mm_shuffle_epi8(two, _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, -1, -1, -1, -1, -1, -1, -1, -1));
            words = _mm512_permutexvar_epi32(_mm512_srli_epi32(lane, 3), _mm512_castsi128_si512(two));
        }
        if (BITS == 3) {
            const __m512i low = _mm512_and_si512(_mm512_srlv_epi32(words, _mm512_slli_epi32(in_word, 1)), _mm512_set1_epi32(3));
            const __m512i high = _mm512_srlv_epi32(words, _mm512_add_epi32(in_word, _mm512_set1_epi32(16)));
            words = _mm512_or_si512(low, _mm512_slli_epi32(_mm512_and_si512(high, _mm512_set1_epi32(1)), 2));
        } else {
            words = _mm512_srlv_epi32(words, _mm512_mullo_epi32(in_word, _mm512_set1_epi32(BITS)));
        }
        // The four lowest bits are looked up; what stands above a code does not matter.
        const __m512i code = _mm512_and_si512(lane, _mm512_set1_epi32((1 << BITS) - 1));
        return _mm512_permutexvar_ps(words, _mm512_cvtepi32_ps(code) - splat(half));
    }
#else
    Floats numbers = {};
    for (int i = 0; i < LANES && i < count; ++i) {
        const uint8_t* const group = from + i / 8 * BITS;
        const int n = i % 8;
        int code;
        if (BITS == 3)
            code = (group[n / 4] >> (n % 4 * 2) & 3) | (group[2] >> n & 1) << 2;
        else
            code = group[n * BITS / 8] >> (n * BITS % 8) & ((1 << BITS) - 1);
        numbers[i] = static_cast<float>(code) - half;
    }
    return numbers;
#endif
}

// x = step * (code - 2^(bits - 1)) + middle, step and middle of each channel of an entry: both are left to the ends of the products.
class QuantizedReader {
  public:
    static constexpr bool PAIRED = false;

    QuantizedReader(const Call& call, const Segment& s, const Shape& shape, Arena& arena)
        : s_(s), shape_(shape), queries_(call, s, shape, arena), line_(padded(s.values.channels)) {
        stepped_ = arena.take(shape.rows * s.keys.channels);
        constant_ = arena.take(shape.rows);
        sums_ = arena.take(shape.rows * line_);
    }

    void open_set(int64_t set) {
        set_ = s_.head ? 0 : set;
        queries_.open_set(set);
    }

    void load_queries(const float* query) {
        queries_.load(query);
        entry_ = -1;
        std::memset(sums_, 0, shape_.rows * line_ * sizeof(float));
    }

    void score_rows(const Tile* tile, int64_t tiles, int64_t, float* z) {
        for (int64_t i = 0, end; i < tiles; i = end) {
            end = end_of_run(tile, i, tiles);
            set_entry(tile[i].entry);
            with_bits(s_.keys.bits, [&](auto bits) {
                with_block(shape_.block, [&](auto size) {
                    for (int64_t row = 0; row < shape_.rows; row += size) score_run<bits, size>(tile, i, end, row, z);
                });
            });
        }
    }

    void map_weights(const float* p, int64_t lines, const float* map, float* w) const {
        product<1>(p, shape_.score_line, lines, map, shape_.value_line, shape_.tokens, shape_.value_line, ByRow{w, shape_.value_line});
    }

    void add_values(const Tile* tile, int64_t tiles, int64_t, const float* w, const float*) {
        for (int64_t i = 0, end; i < tiles; i = end) {
            end = end_of_run(tile, i, tiles);
            with_bits(s_.values.bits, [&](auto bits) {
                with_block(shape_.block, [&](auto size) {
                    for (int64_t row = 0; row < shape_.rows; row += size) add_run<bits, size>(tile, i, end, row, w);
                });
            });
        }
    }

    void rescale(int64_t row, float factor) {
        for (int64_t c = 0; c < line_; c += LANES) store(sums_ + row * line_ + c, load(sums_ + row * line_ + c) * splat(factor));
    }

    void finish(float* out) const { std::memcpy(out, sums_, shape_.real_rows * line_ * sizeof(float)); }

  private:
    static constexpr int64_t CHANNELS = 8;  // whose codes are read side by side: more lines would push each other out of the cache

    template <class Body> INLINE static void with_bits(int64_t bits, const Body& body) {
        switch (bits) {
            case 1: return body(std::integral_constant<int, 1>());
            case 2: return body(std::integral_constant<int, 2>());
            case 3: return body(std::integral_constant<int, 3>());
            case 4: return body(std::integral_constant<int, 4>());
            default: return body(std::integral_constant<int, 8>());
        }
    }

    // Where the tiles end that lie one behind the other in the entry of tile i.
    static int64_t end_of_run(const Tile* tile, int64_t i, int64_t tiles) {
        int64_t end = i + 1;
        while (end < tiles && tile[end].entry == tile[i].entry) ++end;
        return end;
    }

    // Codes of a channel from a token on, a multiple of 8, and steps and least values of all channels.
    const uint8_t* codes(const Rows& rows, int64_t entry, int64_t channel, int64_t token) const {
        const uint8_t* const data = static_cast<const uint8_t*>(rows.data);
        return data + entry * rows.entry + set_ * rows.head + channel * rows.row + token / 8 * rows.bits;
    }
    int64_t channels_of(const Rows& rows, int64_t entry) const { return (entry * (s_.head ? 1 : s_.sets) + set_) * rows.channels; }

    // The queries times the steps of an entry's keys, [blocks, C, R], and with their middles.
    void set_entry(int64_t entry) {
        if (entry == entry_) return;
        entry_ = entry;
        const float* const query = queries_.of(entry);
        const int64_t count = s_.keys.channels, block = shape_.block;
        const float *step = s_.keys.step + channels_of(s_.keys, entry), *least = s_.keys.offset + channels_of(s_.keys, entry);
        const float half = static_cast<float>(1 << (s_.keys.bits - 1));
        for (int64_t row = 0; row < shape_.rows; ++row) {
            float* const to = stepped_ + row / block * block * count + row % block;
            Floats sum = {};
            for (int64_t c = 0; c < count; c += LANES) {
                const Floats q = load(query + row * queries_.line() + c), steps = load_part(step + c, count - c);
                const Floats times = q * steps;
                sum += q * (load_part(least + c, count - c) + steps * splat(half));
                for (int64_t i = 0; i < LANES && c + i < count; ++i) to[(c + i) * block] = times[i];
            }
            constant_[row] = sum_of_lanes(sum);
        }
    }

    template <int BITS, int R> void score_run(const Tile* tile, int64_t begin, int64_t end, int64_t row, float* z) const {
        const int64_t count = s_.keys.channels, first = tile[begin].token, line = shape_.key_line;
        const int64_t tokens = s_.score_map.data ? s_.keys.rows : tile[end - 1].token + tile[end - 1].count - first;
        const int64_t written = (s_.keys.rows + 7) / 8 * 8 - first;
        for (int64_t channel = 0; channel < count; channel += CHANNELS) {
            const int64_t many = channel + CHANNELS < count ? CHANNELS : count - channel;
            const float* const queries = stepped_ + row * count + channel * R;
            for (int64_t n = 0; n < tokens; n += 2 * LANES) {
                // The second vector may be of the next tile.
                const bool both = n + LANES < tokens;
                float* to[2];
                UNROLL
                for (int v = 0; v < 2; ++v) {
                    const int64_t at = n + v * (both ? LANES : 0), place = s_.score_map.data ? 0 : at / line;
                    to[v] = z + shape_.line(begin + place, row) * line + at - place * line;
                }
                Floats sum[R][2];
                UNROLL
                for (int r = 0; r < R; ++r)
                    UNROLL
                    for (int v = 0; v < 2; ++v) sum[r][v] = channel ? load(to[v] + 2 * r * line) : splat(constant_[row + r]);
                const uint8_t* from = codes(s_.keys, tile[begin].entry, channel, first + n);
                for (int64_t c = 0; c < many; ++c, from += s_.keys.row) {
                    const Floats low = centred_codes<BITS>(from, written - n);
                    const Floats high = both ? centred_codes<BITS>(from + 2 * BITS, written - n - LANES) : low;
                    UNROLL
                    for (int r = 0; r < R; ++r) {
                        const Floats query = splat(queries[c * R + r]);
                        sum[r][0] += low * query;
                        sum[r][1] += high * query;
                    }
                }
                UNROLL
                for (int r = 0; r < R; ++r)
                    for (int v = 0; v < (both ? 2 : 1); ++v) store(to[v] + 2 * r * line, sum[r][v]);
            }
        }
    }

    template <int BITS, int R> void add_run(const Tile* tile, int64_t begin, int64_t end, int64_t row, const float* w) {
        const int64_t count = s_.values.channels, first = tile[begin].token, line = shape_.value_line, entry = tile[begin].entry;
        const int64_t tokens = s_.value_map.data ? s_.values.rows : tile[end - 1].token + tile[end - 1].count - first;
        const int64_t written = (s_.values.rows + 7) / 8 * 8 - first;
        const auto weights = [&](int64_t n) INLINE_LAMBDA {
            const int64_t place = s_.value_map.data ? 0 : n / line;
            return w + shape_.line(begin + place, row) * line + n - place * line;
        };
        Floats mass[R] = {};
        for (int64_t n = 0; n < tokens; n += LANES)
            UNROLL
            for (int r = 0; r < R; ++r) mass[r] += load(weights(n) + 2 * r * line);
        float masses[(R + 3) / 4 * 4];
        sums_of_lanes(mass, masses);
        const float *step = s_.values.step + channels_of(s_.values, entry), *least = s_.values.offset + channels_of(s_.values, entry);
        const float half = static_cast<float>(1 << (BITS - 1));
        for (int64_t channel = 0; channel < count; channel += 2) {
            const bool both = channel + 1 < count;
            const uint8_t *low_from = codes(s_.values, entry, channel, first), *high_from = low_from + (both ? s_.values.row : 0);
            Floats sum[2 * R] = {};
            for (int64_t n = 0; n < tokens; n += LANES, low_from += 2 * BITS, high_from += 2 * BITS) {
                const Floats low = centred_codes<BITS>(low_from, written - n), high = centred_codes<BITS>(high_from, written - n);
                const float* const here = weights(n);
                UNROLL
                for (int r = 0; r < R; ++r) {
                    const Floats weight = load(here + 2 * r * line);
                    sum[r] += low * weight;
                    sum[R + r] += high * weight;
                }
            }
            float found[(2 * R + 3) / 4 * 4];
            sums_of_lanes(sum, found);
            for (int c = 0; c < (both ? 2 : 1); ++c)
                UNROLL
                for (int r = 0; r < R; ++r)
                    sums_[(row + r) * line_ + channel + c] +=
                        step[channel + c] * found[c * R + r] + masses[r] * (least[channel + c] + step[channel + c] * half);
        }
    }

    const Segment& s_;
    const Shape& shape_;
    EntryQueries queries_;
    int64_t line_, set_ = 0, entry_ = -1;
    float *stepped_, *constant_, *sums_;
};

}  // namespace kvcapsule
