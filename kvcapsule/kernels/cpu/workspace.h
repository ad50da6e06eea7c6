// What a pass over a segment works on: the segment with the sizes of its tiles, and memory.
#pragma once

#include "simd.h"
#include "structs.h"

namespace kvcapsule {

constexpr int64_t TILES = 8;   // go through a pass together, two side by side
constexpr int64_t CHUNK = 64;  // tokens of a tile where there are no maps along the tokens

// Hands out parts of a workspace, each beginning with a line of the cache; without memory it counts what is needed.
struct Arena {
    float* memory;
    int64_t used = 0;

    float* take(int64_t count) {
        float* const part = memory ? memory + used : nullptr;
        used += padded(count);
        return part;
    }
};

// Some tokens of an entry, or all of it.
struct Tile {
    int64_t index, entry, token, count;  // index: of the entry; entry: where its rows, bias and frame are
};

// A segment in a call. A query row of two neighbouring tiles is two lines of scores, one behind the other (`line`).
struct Source {
    const Call& call;
    const Segment& s;
    const uint8_t* visible;                    // [E, Q, N], or null
    int64_t real_rows, rows;                   // query rows of a set; filled up to blocks
    int64_t block = 8, blocks;                 // rows of a block: as many as kernels hold sums of in registers
    int64_t tokens, chunks;                    // of a tile; tiles of an entry: one, where there are maps along tokens
    int64_t score_line, key_line, value_line;  // lengths of lines, filled up: tokens, stored rows of keys and of values

    Source(const Call& call_, int64_t i)
        : call(call_), s(*call.segments[i]), visible(i == call.count - 1 ? call.visible : nullptr) {
        constexpr int64_t smaller[] = {7, 4, 2, 1};
        real_rows = s.heads * call.rows;
        const auto cost = [&](int64_t size) { return (real_rows + size - 1) / size * (size + 1); };
        for (const int64_t size : smaller) block = cost(size) < cost(block) ? size : block;
        blocks = (real_rows + block - 1) / block;
        rows = blocks * block;
        tokens = s.score_map.data || s.value_map.data || s.tokens < CHUNK ? s.tokens : CHUNK;
        chunks = (s.tokens + tokens - 1) / tokens;
        score_line = padded(tokens);
        key_line = !s.score_map.data ? score_line : s.form == CELLS ? s.keys.rows : padded(s.keys.rows);
        value_line = s.value_map.data ? padded(s.values.rows) : score_line;
    }

    bool hides() const { return s.mask || visible; }
    bool sees(const Tile& tile, int64_t query, int64_t n) const {
        const int64_t token = tile.token + n;
        return !(s.mask && !s.mask[tile.index * s.tokens + token]) &&
               !(visible && !visible[(tile.index * call.queries + query) * s.tokens + token]);
    }
    int64_t line(int64_t tile, int64_t row) const { return (tile / 2 * rows + row) * 2 + tile % 2; }
};

// Calls body with a number as a constant, one of `NUMBERS`.
template <int... NUMBERS, class Body> INLINE void with_constant(int64_t number, const Body& body) {
    (void)((number == NUMBERS && (body(Constant<NUMBERS>()), true)) || ...);
}
template <class Body> INLINE void with_block(int64_t size, const Body& body) {
    with_constant<1, 2, 4, 7, 8>(size, body);
}

}  // namespace kvcapsule
