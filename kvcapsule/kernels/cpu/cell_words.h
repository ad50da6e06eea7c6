// Cells of 1 to 4 bits as words of 32 bits, those of eight tiles side by side, and how words become numbers.
//
// A word of two tiles is then one number of 64 bits that is sent to all lanes as it is loaded: what loops over cells wait for is loads.
// Codes of three bits, which lie in two places of three bytes, become fields of four bits on the way; others stay as they are.
#pragma once

#include "workspace.h"

namespace kvcapsule {

constexpr int WIDTHS = 5;               // of 8, 4, 3, 2 and 1 bits, in this order
constexpr int64_t WORD_CHUNK = 16;      // bytes of a tile that are read at once: four words, or twelve bytes of cells of three bits
constexpr int KINDS = 8;                // a width and the place of a cell in its word: cell_words.py numbers them
constexpr int KIND_WIDTH[KINDS] = {1, 1, 1, 1, 2, 2, 3, 4}, KIND_PLACE[KINDS] = {0, 1, 2, 3, 0, 1, 0, 0};

struct KindTables {
    alignas(64) int32_t shift[KINDS][LANES] = {};   // how far the code of each lane is from the word's lowest bit: two tiles side by side
    alignas(64) float levels[KINDS][LANES] = {};    // a code less the middle of all; what stands above its bits does not matter
    alignas(64) int32_t codes[KINDS][LANES] = {};

    constexpr KindTables() {
        for (int kind = 0; kind < KINDS; ++kind)
            for (int lane = 0; lane < LANES; ++lane) {
                const int width = KIND_WIDTH[kind];
                shift[kind][lane] = (width == 3 ? 4 : width) * (lane / 2) + 8 * width * KIND_PLACE[kind];
                levels[kind][lane] = static_cast<float>(lane % (1 << width)) - static_cast<float>((1 << width) - 1) / 2;
                codes[kind][lane] = (1 << width) - 1;
            }
    }
};
constexpr KindTables TABLES;

// The numbers of cells of a kind, times a step: the same instructions whatever their width.
struct Decoder {
    Ints shift;
#if AVX512
    Floats levels;

    INLINE Decoder(int64_t kind, float step)
        : shift(*reinterpret_cast<const Ints*>(TABLES.shift[kind])), levels(*reinterpret_cast<const Floats*>(TABLES.levels[kind]) * splat(step)) {}

    INLINE Floats numbers(const uint32_t* words) const {
        const __m512i both = reinterpret_cast<__m512i>(splat_pair(reinterpret_cast<const float*>(words)));
        return _mm512_permutexvar_ps(_mm512_srlv_epi32(both, reinterpret_cast<__m512i>(shift)), levels);
    }
#else
    Ints codes;
    Floats step, middle;

    INLINE Decoder(int64_t kind, float step_)
        : shift(*reinterpret_cast<const Ints*>(TABLES.shift[kind])), codes(*reinterpret_cast<const Ints*>(TABLES.codes[kind])),
          step(splat(step_)), middle(splat(TABLES.levels[kind][0])) {}

    INLINE Floats numbers(const uint32_t* words) const {
        const Ints both = reinterpret_cast<Ints>(splat_pair(reinterpret_cast<const float*>(words)));
        return (__builtin_convertvector((both >> shift) & codes, Floats) + middle) * step;
    }
#endif
};

// Cells of 8 bits of two tiles.
INLINE Floats eight_bit_numbers(const uint8_t* first, const uint8_t* second, float step) {
#if AVX512
    const __m128i codes = _mm_unpacklo_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(first)),
                                            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(second)));
    const Floats numbers = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes));
#else
    Floats numbers;
    for (int i = 0; i < 8; ++i) numbers[2 * i] = first[i], numbers[2 * i + 1] = second[i];
#endif
    return (numbers - splat(127.5f)) * splat(step);
}

// Three bytes, [eight fields of 2 bits | eight of 1 bit], as eight fields of 4 bits; for one word or a vector of them.
template <class Word> INLINE Word fields_of_three(Word word) {
    Word low = word & 0xffff, high = (word >> 16) & 0xff;
    low = (low | low << 8) & 0x00ff00ff;
    low = (low | low << 4) & 0x0f0f0f0f;
    low = (low | low << 2) & 0x33333333;
    high = (high | high << 12) & 0x000f000f;
    high = (high | high << 6) & 0x03030303;
    high = (high | high << 3) & 0x11111111;
    return low | high << 2;
}

// Four words of eight tiles: out [4, TILES].
INLINE void lay_chunk(const uint8_t* const (&from)[TILES], bool three, uint32_t* out) {
#if AVX512
    const __m128i bytes_of_three = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
    __m128i tile[TILES];
    for (int i = 0; i < TILES; ++i) {
        tile[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[i]));
        if (three) tile[i] = _mm_shuffle_epi8(tile[i], bytes_of_three);
    }
    const auto four = [&](int i) {
        const __m256i low = _mm256_set_m128i(tile[i + 1], tile[i]), high = _mm256_set_m128i(tile[i + 3], tile[i + 2]);
        return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    };
    const __m512i low = four(0), high = four(4);
    for (int half = 0; half < 2; ++half) {
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
        __m512i words = _mm512_permutex2var_epi32(low, _mm512_add_epi32(order, _mm512_set1_epi32(2 * half)), high);
        if (three) {
            typedef uint32_t Words __attribute__((vector_size(64)));
            words = reinterpret_cast<__m512i>(fields_of_three(reinterpret_cast<Words>(words)));
        }
        _mm512_storeu_si512(out + 2 * TILES * half, words);
    }
#else
    for (int i = 0; i < TILES; ++i)
        for (int word = 0; word < 4; ++word) {
            uint32_t bits = 0;
            std::memcpy(&bits, from[i] + (three ? 3 : 4) * word, three ? 3 : 4);
            out[word * TILES + i] = three ? fields_of_three(bits) : bits;
        }
#endif
}

// The cells of a set of eight tiles, of the entries whose bytes begin at base[:].
inline void lay_words(const Rows& rows, const int64_t (&base)[TILES], int64_t set, uint32_t* out) {
    const uint8_t* const data = static_cast<const uint8_t*>(rows.data);
    int64_t last = 0;
    for (const int64_t begin : base) last = begin > last ? begin : last;
    for (int i = 1; i < WIDTHS; ++i) {
        const int32_t* const range = rows.ranges + (set * WIDTHS + i) * 3;
        uint32_t* to = out + range[2] * TILES;
        const bool three = i == 2;
        for (int64_t at = range[0]; at < range[1]; at += three ? 12 : WORD_CHUNK, to += 4 * TILES) {
            const uint8_t* from[TILES];
            uint8_t copies[TILES][WORD_CHUNK];
            const bool beyond = last + at + WORD_CHUNK > rows.bytes;  // what would be read behind the last entry's last byte
            for (int tile = 0; tile < TILES; ++tile) {
                from[tile] = data + base[tile] + at;
                if (beyond) {
                    const int64_t rest = rows.bytes - base[tile] - at;
                    std::memset(copies[tile], 0, WORD_CHUNK);
                    std::memcpy(copies[tile], from[tile], rest < WORD_CHUNK ? rest : WORD_CHUNK);
                    from[tile] = copies[tile];
                }
            }
            lay_chunk(from, three, to);
        }
    }
}

// Words of any set's cells, of one tile.
inline int64_t words_of_a_set(const Rows& rows, int64_t sets) {
    int64_t most = 0;
    for (int64_t set = 0; set < sets; ++set) {
        const int32_t* const range = rows.ranges + (set * WIDTHS + WIDTHS - 1) * 3;  // those of one bit come last
        const int64_t words = range[2] + (range[1] - range[0] + WORD_CHUNK - 1) / WORD_CHUNK * 4;
        most = words > most ? words : most;
    }
    return most;
}

}  // namespace kvcapsule
