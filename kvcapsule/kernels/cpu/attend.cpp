// Attention over segments in one pass over each: products of the queries with the stored keys, score_map, softmax,
// value_map and sums of the stored values of eight tiles while all of it is in the nearest caches (docs/kernels.md).
// The reference is kernels/reference.py. The interface is C and needs libm alone: it serves every version of PyTorch.
#include "coefficient_reader.h"
#include "online_softmax.h"
#include "row_reader.h"

namespace kvcapsule {

template <class Reader> class Pass {
  public:
    Pass(const Source& src, Arena& arena)
        : src_(src), s_(src.s), call_(src.call), reader_(src, arena), channels_(padded(s_.values.channels)),
          columns_(s_.out_map.data ? padded(call_.dim) : channels_) {
        const int64_t lines = TILES * src_.rows;
        scores_ = arena.take(lines * src_.score_line);
        products_ = s_.score_map.data ? arena.take(lines * src_.key_line) : scores_;
        weights_ = s_.value_map.data ? arena.take(lines * src_.value_line) : scores_;
        to_tokens_ = arena.take (s_.score_map.data ? s_.keys.rows * src_.score_line : 0);
        to_rows_ = arena.take (s_.value_map.data ? src_.tokens * src_.value_line : 0);
        softmax_ = {arena.take(src_.rows), arena.take(src_.rows), arena.take(src_.rows)};
        sums_ = arena.take((src_.rows + 8) * channels_);
        copied_out_ = arena.take(out_is_dense() ? 0 : s_.out_map.data ? s_.heads * s_.values.channels * columns_ : 0);
        out_ = s_.out_map.data ? arena.take((src_.rows + 8) * columns_) : sums_;
    }

    // Piece `piece` of all tiles, counted through, a set after the other.
    void run(int64_t piece, Sums results) {
        const int64_t total = (s_.head ? 1 : s_.sets) * s_.entries * src_.chunks;
        const int64_t end = total * (piece + 1) / call_.pieces;
        int64_t open = -1;
        for (int64_t i = total * piece / call_.pieces; i < end;) {
            const int64_t set = set_of(i), owner = s_.owner[tile_at(i).index];
            if (set != open) open_set(set), open = set;
            reader_.load_queries(call_.query + place(set, owner) * call_.dim);
            softmax_.begin(src_.rows);
            // Tiles of one set and batch row.
            const auto same = [&] { return i < end && set_of(i) == set && s_.owner[tile_at(i).index] == owner; };
            while (same()) {
                Tile tile[2 * TILES];
                int64_t tiles = 0, next = 0;
                for (; tiles < TILES && same(); ++i)
                    if (has_tokens(tile_at(i))) tile[tiles++] = tile_at(i);
                for (; next < TILES && i + next < end && set_of(i + next) == set; ++next)
                    tile[tiles + next] = tile_at(i + next);
                if (tiles) read_tiles(set, tile, tiles, next);
            }
            finish(set, place(set, owner), results);
        }
    }

  private:
    int64_t set_of(int64_t i) const { return s_.head ? s_.head[i / src_.chunks] : i / (src_.chunks * s_.entries); }
    Tile tile_at(int64_t i) const {
        const int64_t index = i / src_.chunks % s_.entries, token = i % src_.chunks * src_.tokens;
        const int64_t rest = (s_.counts ? s_.counts[index] : s_.tokens) - token;
        return {index, s_.place ? s_.place[index] : index, token, rest < src_.tokens ? rest : src_.tokens};
    }
    bool has_tokens(const Tile& tile) const {
        return tile.count > 0 && (!s_.mask || memchr(s_.mask + tile.index * s_.tokens, 1, s_.tokens));
    }
    int64_t place(int64_t set, int64_t owner) const { return (owner * s_.sets + set) * s_.heads * call_.rows; }

    // Whether out_map lies in memory as it is multiplied.
    bool out_is_dense() const {
        const Strided& out = s_.out_map;
        return out.third == 1 && out.second == columns_ && columns_ == call_.dim &&
               (s_.heads == 1 || out.first == s_.values.channels * columns_);
    }

    void open_set(int64_t set) {
        const Strided &score = s_.score_map, &value = s_.value_map, &out = s_.out_map;
        const int64_t tokens = src_.tokens, channels = s_.values.channels, head = s_.head ? 0 : set * s_.heads;
        if (score.data)
            copy_map(score.data + set * score.first, s_.keys.rows, score.third, tokens, score.second, to_tokens_,
                     src_.score_line);
        if (value.data)
            copy_map(value.data + set * value.first, tokens, value.second, s_.values.rows, value.third, to_rows_,
                     src_.value_line);
        out_map_ = out_is_dense() ? out.data + head * out.first : copied_out_;
        for (int64_t i = 0; out.data && !out_is_dense() && i < s_.heads; ++i)
            copy_map(out.data + (head + i) * out.first, channels, out.second, call_.dim, out.third,
                     copied_out_ + i * channels * columns_, columns_);
        reader_.open_set(set);
    }

    void read_tiles(int64_t set, const Tile* tile, int64_t tiles, int64_t next) {
        // Where tiles lie side by side in twos, one that is not there has no token.
        const int64_t even = (tiles + 1) / 2 * 2, lines = even * src_.rows;
        reader_.score_rows(tile, tiles, next, products_);
        if (s_.score_map.data)
            product<Reader::PAIR>(products_, Reader::PAIR * src_.key_line, lines, to_tokens_, s_.keys.rows,
                                  src_.score_line, ByRow{scores_, src_.score_line});
        for (int64_t j = 0; j < even; ++j) {
            const Tile& mine = j < tiles ? tile[j] : Tile{0, 0, 0, 0};
            if (mine.count < src_.score_line || s_.bias.data || src_.hides())
                add_bias_and_mask(scores_ + src_.line(j, 0) * src_.score_line, mine, set, src_);
        }
        if (softmax_.update(scores_, src_, Reader::PAIR == 2 ? even : tiles))
            for (int64_t row = 0; row < src_.real_rows; ++row)
                if (softmax_.factors[row] != 1) reader_.rescale(row, softmax_.factors[row]);
        if (s_.value_map.data)
            product<1>(scores_, src_.score_line, lines, to_rows_, src_.tokens, src_.value_line,
                       reader_.weights_place(weights_));
        reader_.add_values(tile, tiles, next, weights_);
    }

    // What has been added up of a batch row and a set, with value_mean and behind out_map.
    void finish(int64_t set, int64_t place, Sums& results) {
        const int64_t channels = s_.values.channels, rows = call_.rows;
        reader_.finish(sums_);
        for (int64_t row = 0; s_.value_mean.data && row < src_.real_rows; ++row) {
            const float* const mean = s_.value_mean.data + (set * s_.heads + row / rows) * s_.value_mean.first;
            for (int64_t c = 0; c < channels; ++c) sums_[row * channels_ + c] += softmax_.mass[row] * mean[c];
        }
        for (int64_t head = 0; s_.out_map.data && head < s_.heads; ++head)
            product<1>(sums_ + head * rows * channels_, channels_, rows, out_map_ + head * channels * columns_,
                       channels, columns_, ByRow{out_ + head * rows * columns_, columns_});
        results.join(place, src_.real_rows, call_.dim, {out_, softmax_.top, softmax_.mass}, columns_);
    }

    const Source& src_;
    const Segment& s_;
    const Call& call_;
    Reader reader_;
    Softmax softmax_;
    int64_t channels_, columns_;              // lengths of lines of `sums_` and `out_`
    float *scores_, *products_, *weights_;        // lines of tokens: scores, then weights; of key rows; of value rows
    float *to_tokens_, *to_rows_, *copied_out_;   // the maps of a set, [M, N], [N, M] and [heads, C, D], filled up
    const float* out_map_ = nullptr;              // of a set, copied or not
    float *sums_, *out_;
};

// While one lives, numbers below 1.2e-38 count as 0. Where blocks are filled up, a workspace holds anything, and with
// such numbers Intel's CPUs take a hundred times as long.
struct WithoutDenormals {
#ifdef __SSE__
    const unsigned before = __builtin_ia32_stmxcsr();
    WithoutDenormals() { __builtin_ia32_ldmxcsr(before | 0x8040); }  // Results are flushed, and inputs read, as 0.
    ~WithoutDenormals() { __builtin_ia32_ldmxcsr(before); }
#endif
};

// Calls body with what makes a pass over a segment, and what it needs of a workspace.
template <class Body> void with_pass(const Call& call, int64_t i, Arena arena, const Body& body) {
    const Source src(call, i);
    if (src.s.form == CELLS) {
        Pass<CoefficientReader> pass(src, arena);
        body(pass, arena.used);
    } else {
        Pass<RowReader> pass(src, arena);
        body(pass, arena.used);
    }
}

}  // namespace kvcapsule

using namespace kvcapsule;

#define EXPORT extern "C" __attribute__((visibility("default")))

// What `workspace_size` must be.
EXPORT int64_t kvcapsule_workspace_size(const Call* call) {
    int64_t most = 0;
    for (int64_t i = 0; i < call->count; ++i)
        with_pass(*call, i, {nullptr}, [&](auto&, int64_t used) { most = used > most ? used : most; });
    return most;
}

EXPORT void kvcapsule_run_piece(const Call* call, int64_t piece) {
    const WithoutDenormals guard;
    const int64_t rows = call->batch * call->heads * call->rows;
    const Sums results{call->sums + piece * rows * call->dim, call->top + piece * rows, call->mass + piece * rows};
    for (int64_t i = 0; i < call->count; ++i)
        with_pass(*call, i, {call->workspace + piece * call->workspace_size},
                  [&](auto& pass, int64_t) { pass.run(piece, results); });
}

// The pieces of one thread of an OpenMP team, which may be smaller than was asked for.
EXPORT void kvcapsule_run_thread(const Call* call) {
    const auto number = [](const void* function) { return reinterpret_cast<int (*)()>(const_cast<void*>(function))(); };
    for (int64_t piece = number(call->thread); piece < call->pieces; piece += number(call->threads))
        kvcapsule_run_piece(call, piece);
}

// Joins all parts: `out` is the attention then, 0 where a query sees no token.
EXPORT void kvcapsule_finish(const Call* call) {
    const int64_t rows = call->batch * call->heads * call->rows, dim = call->dim;
    Sums all{call->sums, call->top, call->mass};
    for (int64_t part = 1; part < call->parts; ++part)
        all.join(0, rows, dim, {all.sums + part * rows * dim, all.top + part * rows, all.mass + part * rows}, dim);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t d = row * dim; d < (row + 1) * dim; ++d)
            call->out[d] = all.mass[row] == 0 ? 0 : all.sums[d] / all.mass[row];
}
