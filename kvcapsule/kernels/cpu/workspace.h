// Memory of one piece of the work, and the shapes of what lies in it.
#pragma once

#include "simd.h"
#include "structs.h"

namespace kvcapsule {

constexpr int TILES = 8;      // go through the pass together, two side by side
constexpr int64_t CHUNK = 64;  // tokens of a tile where there are no maps along the tokens

// Hands out parts of a workspace, each beginning with a line of the cache; without memory it counts what is needed.
struct Arena {
    float* memory;
    int64_t used = 0;

    template <class T = float> T* take(int64_t count) {
        T* const part = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
        used += padded((count * static_cast<int64_t>(sizeof(T)) + 3) / 4);
        return part;
    }
};

// Sizes of a segment's tiles. A query row of two neighbouring tiles is two lines of scores, one behind the other (`line`).
struct Shape {
    int64_t real_rows;  // query rows of a set
    int64_t block;      // of 1, 2, 4, 7 or 8 rows: as many as kernels hold sums of in registers
    int64_t blocks;
    int64_t rows;  // blocks * block: real ones, filled up
    bool mapped;   // a tile is an entry; else CHUNK tokens of one
    int64_t tokens, chunks;
    int64_t score_line, key_line, value_line;  // lengths of lines: tokens, and stored rows of keys and of values, filled up

    Shape(const Call& call, const Segment& s) {
        real_rows = s.heads * call.rows;
        constexpr int64_t sizes[] = {8, 7, 4, 2, 1};
        int64_t least = INT64_MAX;
        for (const int64_t size : sizes) {
            const int64_t cost = (real_rows + size - 1) / size * (size + 1);
            if (cost < least) least = cost, block = size;
        }
        blocks = (real_rows + block - 1) / block;
        rows = blocks * block;
        mapped = s.score_map.data || s.value_map.data;
        tokens = mapped || s.tokens < CHUNK ? s.tokens : CHUNK;
        chunks = mapped ? 1 : (s.tokens + tokens - 1) / tokens;
        score_line = padded(tokens);
        key_line = s.score_map.data ? padded(s.keys.rows) : score_line;
        value_line = s.value_map.data ? padded(s.values.rows) : score_line;
    }

    int64_t line(int64_t tile, int64_t row) const { return (tile / 2 * rows + row) * 2 + tile % 2; }
};

// Some tokens of an entry, or all of it.
struct Tile {
    int64_t entry, token, count;
};

// Calls body with the size of a block as a constant.
template <class Body> INLINE void with_block(int64_t size, const Body& body) {
    switch (size) {
        case 1: return body(std::integral_constant<int, 1>());
        case 2: return body(std::integral_constant<int, 2>());
        case 4: return body(std::integral_constant<int, 4>());
        case 7: return body(std::integral_constant<int, 7>());
        default: return body(std::integral_constant<int, 8>());
    }
}

}  // namespace kvcapsule
