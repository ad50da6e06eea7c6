// Rows of a width per channel (mixed_width_rows.py) as numbers: a row is a string of bits, one code after the other.
#pragma once

#include "workspace.h"

namespace kvcapsule {

class MixedRows {
  public:
    MixedRows(const Rows& rows, Arena& arena)
        : rows_(rows), width_(padded(rows.channels)), scale_(arena.take(width_)), minimum_(arena.take(width_)),
          reach_(arena.take(width_)), side_(reinterpret_cast<uint8_t*>(arena.take(width_ / 4))),
          blocks_(reinterpret_cast<Block*>(arena.take(width_ / LANES * sizeof(Block) / sizeof(float)))) {}

    void open_set(int64_t set) {
        const int64_t channels = rows_.channels, *const first = rows_.cells + 2 * set;
        const int32_t* const codes = rows_.bounds + set * channels;
        first_ = first[0] * rows_.rows, bytes_ = first[2] - first[0], coded_ = first[1];
        all_ = first[3] - first[1] == channels;
        unit_ = rows_.scale + set * channels, centre_ = rows_.offset + set * channels;
        for (int64_t c = 0; c < width_; ++c) {
            // Behind the last channel as if there were more that have no bits.
            const int32_t code = c < channels ? codes[c] : codes[channels - 1] >> 4 << 4;
            const int64_t byte = code >> 7, lane = c % LANES;
            Block& block = blocks_[c / LANES];
            const int64_t end = bytes_ < READ ? 0 : bytes_ - READ;
            if (lane == 0) block.first = byte < end ? byte : end;
            const int32_t at = static_cast<int32_t>(byte - block.first);
            // A code of no bits may begin behind the row.
            block.place[lane] = code & 15 ? at | (at + 1) << 8 | 0x80800000 : 0x80808080;
            block.shift[lane] = code >> 4 & 7;
            block.codes[lane] = (1 << (code & 15)) - 1;
            reach_[c] = static_cast<float>(block.codes[lane]) / 6;
        }
    }

    // `count` rows of an entry from row `row` on, [count, padded(C)].
    void read(int64_t entry, int64_t row, int64_t count, float* out) {
        open_entry(entry);
        const uint8_t* from = static_cast<const uint8_t*>(rows_.data) + entry * rows_.entry + first_ + row * bytes_;
        // The next entry's are on their way meanwhile.
        for (int64_t at = 0; at < count * bytes_; at += 64) prefetch(from + rows_.entry + at);
        if (bytes_ >= READ) read_rows(from, bytes_, Constant<READ>(), count, out);
        else read_rows(from, bytes_, bytes_, count, out);
    }

  private:
    static constexpr int READ = 16;

    template <class Size>
    void read_rows(const uint8_t* from, int64_t row, const Size& size, int64_t count, float* out) const {
        // Blocks outside: what is the same for all rows stays in registers.
        const int64_t width = width_;
        for (int64_t c = 0; c < width; c += LANES) {
            const Block& block = blocks_[c / LANES];
            const Floats scale = load(scale_ + c), minimum = load(minimum_ + c);
            const Ints place = load(block.place), shift = load(block.shift), codes = load(block.codes);
            const uint8_t* bytes = from + block.first;
            float* to = out + c;
            for (int64_t n = 0; n < count; ++n, bytes += row, to += width) {
                Bytes sixteen = {};
                memcpy(&sixteen, bytes, size);
                const Ints code = (windows(sixteen, place) >> shift) & codes;
                store(to, convert<Floats>(code) * scale + minimum);
            }
        }
    }

    // Sixteen channels: the row's bytes from `first` on hold them; of each channel the two bytes that its code is in
    // (and two that are 0), the bits below it there, and its greatest code.
    struct Block {
        int32_t place[LANES], shift[LANES], codes[LANES];
        int64_t first, unused[7];
    };

    // The bytes that `place` names, four for each lane; 0 for 0x80.
    static INLINE Ints windows(Bytes bytes, Ints place) {
#if AVX512
        return each_register<Ints>([&](int i) INLINE_LAMBDA {
            return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(reinterpret_cast<__m128i>(bytes)),
                                       reinterpret_cast<__m512i>(place.part[i]));
        });
#elif __AVX2__
        return each_register<Ints>([&](int i) INLINE_LAMBDA {
            return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(reinterpret_cast<__m128i>(bytes)),
                                       reinterpret_cast<__m256i>(place.part[i]));
        });
#else
        int32_t words[LANES];
        EACH(i, LANES) {
            const int at = place[i] & 255;
            words[i] = at < 128 ? bytes[at] | bytes[(at + 1) % READ] << 8 : 0;
        }
        return load(words);
#endif
    }

    // 2^((a - 6) / 3), for a from 0 to 15.
    static INLINE Floats powers(Ints a) {
#if AVX512
        static constexpr float table[LANES] = {
            0.25f,       0.314980263f, 0.396850264f, 0.5f, 0.629960525f, 0.793700528f, 1.0f, 1.25992107f,
            1.58740103f, 2.0f,         2.51984215f,  3.17480206f, 4.0f,  5.03968430f,  6.34960413f, 8.0f};
        return each_register<Floats>([&](int i) INLINE_LAMBDA {
            return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(a.part[i]), _mm512_loadu_ps(table));
        });
#else
        constexpr float THIRD = 0.231049060f, TENTH = 10.0793684f;  // log(2) / 3, 2^(10 / 3)
        return exp_of_negative((convert<Floats>(a) - 16.0f) * THIRD) * TENTH;
#endif
    }

    // Scales and minima of an entry, of bytes 16 b + a: 2^((a - 6) / 3) units, and (b - 8) / 6 of the range from the
    // centre.
    void open_entry(int64_t entry) {
        const int64_t channels = rows_.channels;
        const uint8_t* const side = rows_.side + entry * rows_.bits + coded_;
        for (int64_t at = 0; at < rows_.bits; at += 64) prefetch(side + rows_.bits + at);
        // Without channels that have no bits the bytes lie as they are needed.
        const bool dense = all_ && channels == width_;
        for (int64_t c = 0, coded = 0; c < channels && !dense; ++c) side_[c] = reach_[c] > 0 ? side[coded++] : 128;
        for (int64_t c = 0; c < width_; c += LANES) {
            Bytes bytes;
            memcpy(&bytes, (dense ? side : side_) + c, LANES);
            const Ints both = from_bytes(bytes);
            const Floats power = powers(both & 15);
            const Floats scale = load_part(unit_ + c, channels - c) * power;
            store(scale_ + c, scale);
            store(minimum_ + c, load_part(centre_ + c, channels - c) +
                                    scale * load(reach_ + c) * (convert<Floats>(both >> 4) - 8.0f));
        }
    }

    const Rows& rows_;
    const int64_t width_;
    float *scale_, *minimum_, *reach_;  // of the channels of an entry; of a set: greatest code / 6
    uint8_t* side_;                     // an entry's bytes
    Block* blocks_;
    int64_t first_ = 0, bytes_ = 0, coded_ = 0;  // of a set: first byte in an entry, bytes of a row, first side byte
    bool all_ = false;                           // whether all channels of the set have bits
    const float *unit_ = nullptr, *centre_ = nullptr;
};

}  // namespace kvcapsule
