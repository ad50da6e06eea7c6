// What Python hands over (arguments.py has the same structs): pointers into tensors, and sizes. Strides count elements.
//
// B batch rows, E entries (each owned by a batch row), H KV heads, S sets of KV heads that read the same stored rows, G query heads of a KV
// head, Q queries, N tokens of an entry, M stored rows, D head dim, C stored channels.
#pragma once

#include <cstdint>

namespace kvcapsule {

enum Form : int64_t { RAW, QUANTIZED, CELLS };

// A tensor of up to three axes, or null.
struct Strided {
    const float* data;
    int64_t first, second, third;
};

// Stored keys or values, [E, S, M, C].
struct Rows {
    const void* data;  // fp32 rows, codes or packed cells
    int64_t rows, channels;
    int64_t entry, head, row;  // RAW: strides. QUANTIZED: of the codes [E, H, C, bytes]; `row` is that of channels. CELLS: `entry` alone
    const float* step;         // QUANTIZED: [E, H, 1, C]. CELLS: [S, M / 8, C]
    const float* offset;       // QUANTIZED: the least value [E, H, 1, C]. CELLS: what is added to all entries' rows [S, M, C]
    int64_t bits;              // QUANTIZED: of a code
    // CELLS: see cell_words.py.
    int64_t bytes;  // of `data`
    const uint8_t* widths;
    int64_t cells;  // S * M / 8 * C
    const int32_t* bounds;
    const int64_t* lines;
    const int32_t* numbers;
    const int32_t* ranges;
};

struct Segment {
    int64_t form, entries, sets, heads, tokens;  // heads: KV heads of a set
    const int64_t* owner;                        // [E]: batch rows
    const int64_t* head;                         // [E]: the KV head that each entry is of, or null: entries hold all heads
    const uint8_t* mask;                         // [E, N]: which tokens there are, or null
    Strided bias;                                // [E, H, N]
    const float *cos, *sin;                      // [E, half]: rotations of the tiles' frames, or null
    int64_t half, interleaved;                   // interleaved: channels 2 i and 2 i + 1 rotate together, not i and i + half
    Strided q_map;                               // [H, D, C], third stride 1
    Strided score_map, value_map;                // [S, N, M]
    Strided value_mean;                          // [H, C], second stride 1
    Strided out_map;                             // [H, C, D]
    Rows keys, values;
};

// One call of attention.
struct Call {
    const float* query;  // [B, H, R, D]: R = G Q query rows of a KV head
    float* out;
    int64_t batch, heads, rows, queries, dim;
    const Segment* const* segments;
    int64_t count;
    const uint8_t* visible;  // [E, Q, N] of the last segment, or null
    // Sums, greatest scores and masses of segments that somebody else has read, or null.
    const float *rest_sums, *rest_top, *rest_mass;
    float* workspace;
    int64_t pieces;       // that the work is cut into
    int (*thread)();      // of an OpenMP team: the number of the calling thread,
    int (*threads)();     // and how many there are
    float scale;
};

}  // namespace kvcapsule
