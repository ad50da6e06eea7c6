// What Python hands over: pointers into tensors, sizes, and strides that count elements. arguments.py reads the fields.
//
// B batch rows, E entries (each owned by a batch row), H KV heads, S sets of KV heads that read the same stored rows,
// G query heads of a KV head, Q queries, N tokens of an entry, M stored rows, D head dim, C stored channels.
// What a segment does not have is null.
#pragma once

#include <stdint.h>

namespace kvcapsule {

enum Form : int64_t { RAW, QUANTIZED, CELLS, MIXED };

// A tensor of up to three axes.
struct Strided {
    const float* data;
    int64_t first, second, third;
};

// Stored keys or values, [E, S, M, C].
struct Rows {
    const void* data;  // fp32 rows, codes or packed cells
    int64_t rows, channels;
    // RAW: strides, of which `row` or `column` is 1. QUANTIZED: those of the codes [E, H, C, bytes], `row` of channels.
    // CELLS, MIXED: `entry` alone.
    int64_t entry, head, row, column;
    // QUANTIZED: scale and minimum [E, H, 1, C]. MIXED: unit and centre [H, C]. CELLS: scale [S, M / 8, C], and offset
    // of all entries [S, M, C].
    const float *scale, *offset;
    int64_t bits;           // QUANTIZED: of a code. MIXED: K
    const uint8_t* side;    // MIXED: [E, K], see mixed_width_rows.py
    const uint8_t* widths;  // CELLS: [S, M / 8, C]
    int64_t bytes;          // CELLS: of `data`
    const int32_t* bounds;  // CELLS, this and the rest: CellTables of cell_words.py. MIXED: WidthForm.places, .firsts
    const int64_t* cells;
    const int32_t* ranges;
};

struct Segment {
    int64_t form, entries, sets, heads, tokens;  // heads: KV heads of a set
    const int64_t *owner, *head;                 // [E]: batch rows; KV heads, where entries hold one each
    const int64_t *place, *counts;               // [E]: where rows, bias and frame are in a pool; tokens that are written
    const uint8_t* mask;                         // [E, N]: which tokens there are
    const float *cos, *sin;                      // [E, half]: rotations of the tiles' frames
    int64_t half, interleaved;                   // interleaved: channels 2 i and 2 i + 1 rotate together
    float bias_unit;                             // 0: `bias` is of float; else of int8, in this unit
    Strided bias, q_map;                         // [E, H, N]; [H, D, C], third stride 1
    Strided score_map, value_map;                // [S, N, M]
    Strided value_mean, out_map;                 // [H, C], second stride 1; [H, C, D]
    Rows keys, values;
};

// One call of attention. Results of the pieces of the work are parts that are joined at the end; others may add a part.
struct Call {
    const float* query;  // [B, H, R, D]: R = G Q query rows of a KV head
    float* out;
    int64_t batch, heads, rows, queries, dim;
    const Segment* const* segments;
    int64_t count;
    const uint8_t* visible;              // [E, Q, N] of the last segment
    float *sums, *top, *mass;            // [parts, B, H, R, D], and greatest scores and masses [parts, B, H, R]
    int64_t parts, pieces;               // pieces: that the work is cut into, at most `parts`
    float* workspace;                    // [pieces, workspace_size]
    int64_t workspace_size;
    const void *thread, *threads;        // int f(): the number of a thread in its OpenMP team, and how many these are
    float scale;
};

}  // namespace kvcapsule
