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

    constexpr KindTables() {
        for (int kind = 0; kind < KINDS; ++kind)
            for (int lane = 0; lane < LANES; ++lane) {
                const int width = KIND_WIDTH[kind];
                shift[kind][lane] = (width == 3 ? 4 : width) * (lane / 2) + 8 * width * KIND_PLACE[kind];
                levels[kind][lane] = static_cast<float>(lane % (1 << width)) - static_cast<float>((1 << width) - 1) / 2;
            }
    }
};
constexpr KindTables TABLES;

// The numbers of cells of a kind, times a step: the same instructions whatever their width.
struct Decoder {
    Ints shift;
    Floats levels;

    INLINE Decoder(int64_t kind, float step)
        : shift(reinterpret_cast<const Ints&>(TABLES.shift[kind])), levels(load(TABLES.levels[kind]) * splat(step)) {}

    INLINE Floats numbers(const uint32_t* words) const {
        typedef uint32_t Words __attribute__((vector_size(64)));
        const Words code = reinterpret_cast<Words>(splat_pair(words)) >> reinterpret_cast<Words>(shift);
#if AVX512
        return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(code), levels);
#else
        Floats found;
        for (int i = 0; i < LANES; ++i) found[i] = levels[code[i] & 15];
        return found;
#endif
    }
};

// Cells of 8 bits of two tiles.
INLINE Floats eight_bit_numbers(const uint8_t* first, const uint8_t* second, float step) {
#if AVX512
    const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(first));
    const __m128i high = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(second));
    const Floats codes = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high)));
#else
    Floats codes;
    for (int i = 0; i < 8; ++i) codes[2 * i] = first[i], codes[2 * i + 1] = second[i];
#endif
    return (codes - splat(127.5f)) * splat(step);
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

// The cells of a set of eight tiles, of the entries whose bytes begin at base[:].
inline void lay_words(const Rows& rows, const int64_t* base, int64_t set, uint32_t* out) {
    const uint8_t* const data = static_cast<const uint8_t*>(rows.data);
    for (int i = 1; i < WIDTHS; ++i) {
        const int32_t* const range = rows.ranges + (set * WIDTHS + i) * 3;
        const int64_t begin = range[0], length = range[1] - begin;
        const int64_t bytes = i == 2 ? 3 : 4, count = (length + bytes - 1) / bytes;
        uint32_t* const to = out + range[2] * TILES;
        for (int64_t tile = 0; tile < TILES; ++tile) {
            const uint8_t* const from = data + base[tile] + begin;
            // A word may end behind the last entry's last byte: of such a one only what is there is read.
            const int64_t rest = rows.bytes - base[tile] - begin, all = length + 4 <= rest ? count : rest / 4;
            for (int64_t word = 0; word < count; ++word) {
                uint32_t& place = to[word * TILES + tile] = 0;
                const int64_t left = length - word * bytes;
                memcpy(&place, from + word * bytes, word < all || left > 4 ? 4 : left);
            }
        }
        float* const words = reinterpret_cast<float*>(to);
        for (int64_t at = 0; bytes == 3 && at < count * TILES; at += LANES)
            store(words + at, reinterpret_cast<Floats>(fields_of_three(reinterpret_cast<Ints>(load(words + at)))));
    }
}

}  // namespace kvcapsule
