// Parts of the CPU kernels that tests look at by themselves.
#include "cell_words.h"

extern "C" void probe_exp(const float* x, float* out) { kvcapsule::store(out, kvcapsule::exp_of_negative(kvcapsule::load(x))); }

// The words of a set's cells, [words, 8], of entries that begin at base[8].
extern "C" void probe_words(const kvcapsule::Rows* rows, const int64_t* base, int64_t set, uint32_t* out) {
    kvcapsule::lay_words(*rows, base, set, out);
}
