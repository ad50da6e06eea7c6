// Attention over segments in one pass over each: products of the queries with the stored keys, score_map, softmax, value_map and sums of the
// stored values of eight tiles while all of it is in the nearest caches. docs/kernels.md; the reference is kernels/reference.py.
//
// The library has a C interface and needs nothing but libm: one build serves every version of Python and PyTorch.
#include "coefficient_reader.h"
#include "row_reader.h"

namespace kvcapsule {

// Entries that have a token, by the KV head that they are of (where heads store apart) and by their batch rows.
class Entries {
  public:
    Entries(const Call& call, const Segment& s, Arena& arena) : s_(s), batch_(call.batch), groups_(s.head ? s.sets : 1) {
        order_ = arena.take<int64_t>(s.entries);
        begin_ = arena.take<int64_t>(groups_ * batch_ + 1);
    }

    void sort() {
        std::memset(begin_, 0, (groups_ * batch_ + 1) * sizeof(int64_t));
        for (int64_t e = 0; e < s_.entries; ++e)
            if (present(e)) ++begin_[key(e) + 1];
        for (int64_t k = 0; k < groups_ * batch_; ++k) begin_[k + 1] += begin_[k];
        for (int64_t e = 0; e < s_.entries; ++e)
            if (present(e)) order_[begin_[key(e)]++] = e;
        for (int64_t k = groups_ * batch_; k > 0; --k) begin_[k] = begin_[k - 1];
        begin_[0] = 0;
    }

    const int64_t* of_set(int64_t set) const { return order_ + begin_[s_.head ? set * batch_ : 0]; }
    int64_t count(int64_t set) const { return s_.head ? begin_[(set + 1) * batch_] - begin_[set * batch_] : begin_[batch_]; }

  private:
    int64_t key(int64_t e) const { return (s_.head ? s_.head[e] * batch_ : 0) + s_.owner[e]; }
    bool present(int64_t e) const { return !s_.mask || std::memchr(s_.mask + e * s_.tokens, 1, s_.tokens); }

    const Segment& s_;
    int64_t batch_, groups_, *order_, *begin_;
};

template <class Reader> class Pass {
  public:
    Pass(const Call& call, const Segment& s, const uint8_t* visible, Arena& arena)
        : call_(call), s_(s), visible_(visible), shape_(call, s), entries_(call, s, arena), reader_(call, s, shape_, arena) {
        const int64_t lines = TILES * shape_.rows;
        scores_ = arena.take(lines * shape_.score_line);
        products_ = s.score_map.data ? arena.take(lines * shape_.key_line) : scores_;
        weights_ = s.value_map.data ? arena.take(lines * shape_.value_line) : scores_;
        to_tokens_ = s.score_map.data ? arena.take(s.keys.rows * shape_.score_line) : nullptr;
        to_rows_ = s.value_map.data ? arena.take(shape_.tokens * shape_.value_line) : nullptr;
        caps_ = arena.take(TILES * shape_.score_line);
        softmax_ = {arena.take(shape_.rows), arena.take(shape_.rows), arena.take(shape_.rows)};
        const int64_t channels = padded(s.values.channels);
        sums_ = arena.take(shape_.rows * channels);
        out_map_ = s.out_map.data && (s.out_map.third != 1 || call.dim % LANES) ? arena.take(s.heads * s.values.channels * padded(call.dim)) : nullptr;
        out_ = s.out_map.data ? arena.take(shape_.rows * padded(call.dim)) : sums_;
    }

    // Piece `piece` of all tiles, counted through, a set after the other.
    void run(int64_t piece, Sums found) {
        entries_.sort();
        int64_t total = 0, base = 0;
        for (int64_t set = 0; set < s_.sets; ++set) total += entries_.count(set) * shape_.chunks;
        const int64_t begin = total * piece / call_.pieces, end = total * (piece + 1) / call_.pieces;
        for (int64_t& count : capped_) count = -1;
        for (int64_t set = 0; set < s_.sets; ++set) {
            const int64_t count = entries_.count(set) * shape_.chunks;
            const int64_t first = begin > base ? begin - base : 0, last = end - base < count ? end - base : count;
            base += count;
            if (first >= last) continue;
            open_set(set);
            for (int64_t i = first, stop; i < last; i = stop) {
                const int64_t owner = s_.owner[tile_at(set, i).entry];
                stop = i + 1;
                while (stop < last && s_.owner[tile_at(set, stop).entry] == owner) ++stop;
                read_tiles(set, owner, i, stop, found);
            }
        }
    }

  private:
    Tile tile_at(int64_t set, int64_t i) const {
        const int64_t token = i % shape_.chunks * shape_.tokens, rest = s_.tokens - token;
        return {entries_.of_set(set)[i / shape_.chunks], token, rest < shape_.tokens ? rest : shape_.tokens};
    }

    void open_set(int64_t set) {
        const Strided &score = s_.score_map, &value = s_.value_map, &out = s_.out_map;
        if (score.data)
            copy_map(score.data + set * score.first, s_.keys.rows, score.third, shape_.tokens, score.second, to_tokens_, shape_.score_line);
        if (value.data)
            copy_map(value.data + set * value.first, shape_.tokens, value.second, s_.values.rows, value.third, to_rows_, shape_.value_line);
        for (int64_t head = 0; out_map_ && head < s_.heads; ++head) {
            float* const to = out_map_ + head * s_.values.channels * padded(call_.dim);
            const int64_t place = s_.head ? 0 : set * s_.heads + head;
            copy_map(out.data + place * out.first, s_.values.channels, out.second, call_.dim, out.third, to, padded(call_.dim));
        }
        reader_.open_set(set);
    }

    // Tiles `first` to `last` of a set, all of one batch row.
    void read_tiles(int64_t set, int64_t owner, int64_t first, int64_t last, Sums& found) {
        const int64_t place = (owner * s_.sets + set) * s_.heads * call_.rows;
        reader_.load_queries(call_.query + place * call_.dim);
        softmax_.begin(shape_.rows);
        Tile tile[2 * TILES];
        for (int64_t i = first; i < last; i += TILES) {
            const int64_t tiles = last - i < TILES ? last - i : TILES, next = last - i - tiles < TILES ? last - i - tiles : TILES;
            for (int64_t j = 0; j < tiles + next; ++j) tile[j] = tile_at(set, i + j);
            // Where tiles lie side by side in twos, one that is not there has no token.
            const int64_t lines = Reader::PAIRED ? (tiles + 1) / 2 * 2 : tiles;
            for (int64_t j = 0; j < lines; ++j) {
                const Tile& mine = j < tiles ? tile[j] : Tile{0, 0, 0};
                if (capped_[j] == mine.count && !s_.mask && !visible_) continue;
                set_caps(caps_ + j * shape_.score_line, shape_.score_line, mine, s_, visible_, call_.queries);
                capped_[j] = mine.count;
            }
            reader_.score_rows(tile, tiles, next, products_);
            const int64_t all = ((tiles + 1) / 2 * 2 * shape_.rows + 7) / 8 * 8;
            if (s_.score_map.data) map_scores(all);
            for (int64_t j = 0; (s_.bias.data || visible_) && j < tiles; ++j)
                add_bias_and_mask(scores_ + shape_.line(j, 0) * shape_.score_line, 2 * shape_.score_line, shape_.real_rows, call_.rows,
                                  set * s_.heads, tile[j], s_, visible_, call_.queries);
            if (softmax_.update(scores_, caps_, shape_, lines))
                for (int64_t row = 0; row < shape_.real_rows; ++row)
                    if (softmax_.factors[row] != 1) reader_.rescale(row, softmax_.factors[row]);
            if (s_.value_map.data) reader_.map_weights(scores_, all, to_rows_, weights_);
            reader_.add_values(tile, tiles, next, weights_, caps_);
        }
        finish(set, place, found);
    }

    void map_scores(int64_t lines) {
        const ByRow place{scores_, shape_.score_line};
        const int64_t count = s_.keys.rows, width = shape_.score_line;
        if (Reader::PAIRED)
            product<2>(products_, 2 * count, lines, to_tokens_, width, count, width, place);
        else
            product<1>(products_, shape_.key_line, lines, to_tokens_, width, count, width, place);
    }

    // What has been added up of a batch row and a set, behind out_map.
    void finish(int64_t set, int64_t place, Sums& found) {
        const int64_t channels = s_.values.channels, line = padded(channels), rows = call_.rows, dim = call_.dim;
        reader_.finish(sums_);
        for (int64_t row = 0; s_.value_mean.data && row < shape_.real_rows; ++row) {
            const float* const mean = s_.value_mean.data + (set * s_.heads + row / rows) * s_.value_mean.first;
            for (int64_t c = 0; c < channels; ++c) sums_[row * line + c] += softmax_.mass[row] * mean[c];
        }
        int64_t apart = line;
        if (s_.out_map.data) {
            apart = padded(dim);
            for (int64_t head = 0; head < s_.heads; ++head) {
                const float* map = out_map_ + head * channels * apart;
                int64_t step = apart;
                if (!out_map_) map = s_.out_map.data + (s_.head ? 0 : set * s_.heads + head) * s_.out_map.first, step = s_.out_map.second;
                small_product(sums_ + head * rows * line, line, rows, map, step, channels, apart, ByRow{out_ + head * rows * apart, apart});
            }
        }
        found.join(place, shape_.real_rows, dim, out_, apart, softmax_.top, softmax_.mass);
    }

    const Call& call_;
    const Segment& s_;
    const uint8_t* visible_;
    Shape shape_;
    Entries entries_;
    Reader reader_;
    Softmax softmax_;
    int64_t capped_[TILES];  // tokens that caps are of
    float *scores_, *products_, *weights_;  // [lines, ..]: scores and then weights of tokens, products with key rows, weights of value rows
    float *to_tokens_, *to_rows_;           // the maps of a set, [M, N] and [N, M], filled up
    float *caps_, *sums_, *out_map_, *out_;
};

// Calls body with what makes a pass of the kind that a segment needs.
template <class Body> void with_pass(const Call& call, int64_t i, Arena& arena, const Body& body) {
    const Segment& s = *call.segments[i];
    const uint8_t* const visible = i == call.count - 1 ? call.visible : nullptr;
    if (s.form == CELLS) {
        Pass<CoefficientReader> pass(call, s, visible, arena);
        body(pass);
    } else {
        Pass<RowReader> pass(call, s, visible, arena);
        body(pass);
    }
}

// The workspace is [pieces, top and mass of all rows], [pieces - 1, sums of all rows], [pieces, workspace of a pass].
struct Layout {
    int64_t rows, of_piece, sums, of_pass;

    explicit Layout(const Call& call) : rows(call.batch * call.heads * call.rows), of_piece(2 * padded(rows)), sums(padded(rows * call.dim)) {
        of_pass = 0;
        for (int64_t i = 0; i < call.count; ++i) {
            Arena arena{nullptr};
            with_pass(call, i, arena, [](auto&) {});
            of_pass = arena.used > of_pass ? arena.used : of_pass;
        }
    }

    int64_t size(const Call& call) const { return call.pieces * (of_piece + sums + of_pass); }

    Sums found(const Call& call, int64_t piece) const {
        float* const top = call.workspace + piece * of_piece;
        return {piece ? call.workspace + call.pieces * of_piece + (piece - 1) * sums : call.out, top, top + padded(rows)};
    }

    float* pass(const Call& call, int64_t piece) const { return call.workspace + call.pieces * (of_piece + sums) + piece * of_pass; }
};

void run_piece(const Call& call, int64_t piece) {
    const Layout layout(call);
    const Sums found = layout.found(call, piece);
    for (int64_t row = 0; row < layout.rows; ++row) found.top[row] = NONE, found.mass[row] = 0;
    for (int64_t i = 0; i < call.count; ++i) {
        Arena arena{layout.pass(call, piece)};
        with_pass(call, i, arena, [&](auto& pass) { pass.run(piece, found); });
    }
}

}  // namespace kvcapsule

using kvcapsule::Call;

#define EXPORT extern "C" __attribute__((visibility("default")))

// What arguments.py must agree with.
EXPORT void kvcapsule_sizes(int64_t* sizes) { sizes[0] = sizeof(kvcapsule::Rows), sizes[1] = sizeof(kvcapsule::Segment), sizes[2] = sizeof(Call); }

// Numbers that `workspace` must have.
EXPORT int64_t kvcapsule_workspace(const Call* call) { return kvcapsule::Layout(*call).size(*call); }

EXPORT void kvcapsule_run_piece(const Call* call, int64_t piece) { kvcapsule::run_piece(*call, piece); }

// The pieces of one thread of an OpenMP team, which may be smaller than was asked for.
EXPORT void kvcapsule_run_thread(void* data) {
    const Call& call = *static_cast<const Call*>(data);
    for (int64_t piece = call.thread(); piece < call.pieces; piece += call.threads()) kvcapsule::run_piece(call, piece);
}

// Joins what all pieces have found: `out` is the attention then, 0 where a query sees no token.
EXPORT void kvcapsule_finish(const Call* call) {
    const kvcapsule::Layout layout(*call);
    kvcapsule::Sums all = layout.found(*call, 0);
    const auto join = [&](const float* sums, const float* top, const float* mass) {
        all.join(0, layout.rows, call->dim, sums, call->dim, top, mass);
    };
    for (int64_t piece = 1; piece < call->pieces; ++piece) {
        const kvcapsule::Sums part = layout.found(*call, piece);
        join(part.out, part.top, part.mass);
    }
    if (call->rest_sums) join(call->rest_sums, call->rest_top, call->rest_mass);
    for (int64_t row = 0; row < layout.rows; ++row) {
        float* const out = all.out + row * call->dim;
        const bool any = all.top[row] != kvcapsule::NONE;
        const float mass = all.mass[row] > 1.17549435e-38f ? all.mass[row] : 1.17549435e-38f;
        for (int64_t d = 0; d < call->dim; ++d) out[d] = any ? out[d] / mass : 0;
    }
}

// For tests: the words of a set's cells, [words, 8], of entries that begin at base[8].
EXPORT void kvcapsule_lay_words(const kvcapsule::Rows* rows, const int64_t* base, int64_t set, uint32_t* out) {
    kvcapsule::lay_words(*rows, base, set, out);
}

// For tests: e^x of sixteen numbers.
EXPORT void kvcapsule_exp(const float* x, float* out) { kvcapsule::store(out, kvcapsule::exp_of_negative(kvcapsule::load(x))); }
