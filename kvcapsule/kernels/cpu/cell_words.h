// Cells of 1 to 4 bits as words of 32 bits, those of eight tiles side by side, and how words become numbers.
//
// A word of two tiles is then one number of 64 bits that is sent to all lanes as it is loaded: loops over cells wait
// for loads. Codes of three bits, which lie in two places of three bytes, become fields of four bits on the way.
#pragma once

#include "workspace.h"

namespace kvcapsule {

constexpr int WIDTHS = 5;  // of 8, 4, 3, 2 and 1 bits, in this order
constexpr int KINDS = 8;   // a width and the place of a cell in its word: cell_words.py numbers them
constexpr int KIND_WIDTH[KINDS] = {1, 1, 1, 1, 2, 2, 3, 4}, KIND_PLACE[KINDS] = {0, 1, 2, 3, 0, 1, 0, 0};

struct KindTables {
    alignas(64) int32_t shift[KINDS][LANES] = {};  // from the word's lowest bit to each lane's code: two tiles in turn
    alignas(64) float levels[KINDS][LANES] = {};   // a code less the middle of all, whatever stands above its bits
    int32_t codes[KINDS] = {};                     // the greatest code

    constexpr KindTables() {
        for (int kind = 0; kind < KINDS; ++kind) {
            codes[kind] = (1 << KIND_WIDTH[kind]) - 1;
            for (int lane = 0; lane < LANES; ++lane) {
                const int width = KIND_WIDTH[kind];
                shift[kind][lane] = (width == 3 ? 4 : width) * (lane / 2) + 8 * width * KIND_PLACE[kind];
                levels[kind][lane] = static_cast<float>(lane % (1 << width)) - static_cast<float>(codes[kind]) / 2;
            }
        }
    }
};
constexpr KindTables TABLES;

// The numbers of cells of a kind, times a step: the same instructions whatever their width.
struct Decoder {
    Ints shift, codes;
    Floats levels, step;

    INLINE Decoder(int64_t kind, float step_)
        : shift(load(TABLES.shift[kind])), codes(TABLES.codes[kind]), levels(load(TABLES.levels[kind]) * step_),
          step(step_) {}

    INLINE Floats numbers(const uint32_t* words) const {
        const Ints code = bits_as<Ints>(splat_pair(words)) >> shift;
#if AVX512
        return each_register<Floats>([&](int i) INLINE_LAMBDA {
            return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(code.part[i]), levels.part[i]);
        });
#else
        // No register has sixteen levels to look up: bits are cut off and made numbers.
        return convert<Floats>(code & codes) * step + levels[0];
#endif
    }
};

// Cells of 8 bits of two tiles.
INLINE Floats eight_bit_numbers(const uint8_t* first, const uint8_t* second, float step) {
    uint64_t low, high;
    memcpy(&low, first, sizeof low), memcpy(&high, second, sizeof high);
    typedef uint64_t Longs __attribute__((vector_size(16)));
    const Bytes x = reinterpret_cast<Bytes>(Longs{low}), y = reinterpret_cast<Bytes>(Longs{high});
    const Bytes both = SHUFFLE_REGISTERS(Bytes, x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return (convert<Floats>(from_bytes(both)) - 127.5f) * step;
}

// Words that begin with three bytes, [eight fields of 2 bits | eight of 1 bit], as eight fields of 4 bits.
INLINE Ints fields_of_three(Ints words) {
    Ints low = words & 0xffff, high = (words >> 16) & 0xff;
    low = (low | low << 8) & 0x00ff00ff;
    low = (low | low << 4) & 0x0f0f0f0f;
    low = (low | low << 2) & 0x33333333;
    high = (high | high << 12) & 0x000f000f;
    high = (high | high << 6) & 0x03030303;
    high = (high | high << 3) & 0x11111111;
    return low | high << 2;
}

// Four words of eight tiles, [4, TILES], from sixteen bytes of each (twelve, of cells of three bits).
INLINE void lay_four(const uint8_t* const (&from)[TILES], bool three, uint32_t* out) {
#if AVX512
    const __m128i apart = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
    __m128i tile[TILES];
    EACH(i, TILES) {
        tile[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[i]));
        if (three) tile[i] = _mm_shuffle_epi8(tile[i], apart);
    }
    const auto four = [&](int i) INLINE_LAMBDA {
        const __m512i two = _mm512_castsi256_si512(_mm256_set_m128i(tile[i + 1], tile[i]));
        return _mm512_inserti64x4(two, _mm256_set_m128i(tile[i + 3], tile[i + 2]), 1);
    };
    const __m512i low = four(0), high = four(4);
    EACH(half, 2) {
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
        Ints words;
        words.part[0] = reinterpret_cast<Ints::Register>(
            _mm512_permutex2var_epi32(low, _mm512_add_epi32(order, _mm512_set1_epi32(2 * half)), high));
        store(reinterpret_cast<int32_t*>(out) + half * LANES, three ? fields_of_three(words) : words);
    }
#else
    for (int i = 0; i < 4 * TILES; ++i) memcpy(out + i, from[i % TILES] + i / TILES * (three ? 3 : 4), 4);
    int32_t* const words = reinterpret_cast<int32_t*>(out);
    for (int i = 0; three && i < 4 * TILES; i += LANES) store(words + i, fields_of_three(load(words + i)));
#endif
}

// The cells of a set of eight tiles, of the entries whose bytes begin at base[:].
inline void lay_words(const Rows& rows, const int64_t* base, int64_t set, uint32_t* out) {
    constexpr int64_t READ = 16;
    const uint8_t* const data = static_cast<const uint8_t*>(rows.data);
    int64_t last = 0;
    for (int64_t tile = 0; tile < TILES; ++tile) last = base[tile] > last ? base[tile] : last;
    for (int i = 1; i < WIDTHS; ++i) {
        const int32_t* const range = rows.ranges + (set * WIDTHS + i) * 3;
        uint32_t* to = out + range[2] * TILES;
        for (int64_t at = range[0]; at < range[1]; at += i == 2 ? 12 : READ, to += 4 * TILES) {
            uint8_t copies[TILES][READ] = {};
            const uint8_t* from[TILES];
            // Nothing is read behind the last entry's last byte.
            const bool beyond = last + at + READ > rows.bytes;
            for (int64_t tile = 0; tile < TILES; ++tile) {
                const int64_t rest = rows.bytes - base[tile] - at;
                from[tile] = data + base[tile] + at;
                if (beyond) memcpy(copies[tile], from[tile], rest < READ ? rest : READ), from[tile] = copies[tile];
            }
            lay_four(from, i == 2, to);
        }
    }
}

}  // namespace kvcapsule
