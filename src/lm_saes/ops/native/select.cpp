// Selection from rows of pre-activations h [n, F], by gate values q = h, or h times the norm of the decoder row.
//
// The k largest of a row in two passes over it while it is in cache. First the maxima of many small groups: the k-th largest of
// those is a lower bound of the k-th largest of all, and a tight one, since few groups hold two of the best. Then whatever reaches
// the bound, a little more than k entries, of which the k largest are kept.

#include "select.h"

#include <cstdlib>
#include <type_traits>

#include "threads.h"

namespace {

// A vector of a row, with zeros past its end.
template <bool TAIL>
inline Floats read(const float* row, int64_t j, int64_t length) {
    return TAIL ? load_tail(row + j, length - j) : load(row + j);
}

// found(j), in ascending order, for all j < length where comparison(whether the vector at j is incomplete, j) is true.
template <class Comparison, class Found>
inline void scan(int64_t length, const Comparison& comparison, const Found& found) {
    constexpr int AT_ONCE = 4;  // vectors per look: entries are few
    int64_t j = 0;
    for (; j + AT_ONCE * LANES <= length; j += AT_ONCE * LANES) {
        uint64_t word = 0;
        for (int v = 0; v < AT_ONCE; v++) word |= bits(comparison(std::false_type{}, j + v * LANES)) << (v * LANES);
        for (; word; word &= word - 1) found(j + __builtin_ctzll(word));
    }
    for (; j + LANES <= length; j += LANES) {
        for (uint64_t word = bits(comparison(std::false_type{}, j)); word; word &= word - 1) found(j + __builtin_ctzll(word));
    }
    if (j < length) {
        const uint64_t inside = (uint64_t{1} << (length - j)) - 1;
        for (uint64_t word = bits(comparison(std::true_type{}, j)) & inside; word; word &= word - 1) found(j + __builtin_ctzll(word));
    }
}

// The maxima of groups of numbers, at least 0 each: q(tail, j) gives the vector at j. At least `wanted` groups, or one for each number; each
// lane of consecutive vectors is a group. Returns how many maxima it wrote; there is room for length + LANES.
template <class Values>
inline int64_t group_maxima(int64_t length, int64_t wanted, const Values& q, int32_t* maxima) {
    const int64_t n_vectors = (length + LANES - 1) / LANES;
    const int64_t per_group = n_vectors * LANES / wanted > 0 ? n_vectors * LANES / wanted : 1;
    int64_t written = 0;
    for (int64_t v = 0; v < n_vectors; v += per_group) {
        Floats maximum = {};
        const int64_t end = v + per_group < n_vectors ? v + per_group : n_vectors;
        for (int64_t i = v; i < end; i++) {
            const bool tail = (i + 1) * LANES > length;
            maximum = larger(tail ? q(std::true_type{}, i * LANES) : q(std::false_type{}, i * LANES), maximum);
        }
        store(reinterpret_cast<float*>(maxima + written), maximum);
        written += LANES;
    }
    return written;
}

template <bool WITH_NORM>
void topk_row(const float* h, const float* norm, int64_t n_latents, int64_t k, Candidates found, float* values, int64_t* indices) {
    const auto q = [=](auto tail, int64_t j) {
        const Floats vector = read<decltype(tail)::value>(h, j, n_latents);
        return WITH_NORM ? vector * read<decltype(tail)::value>(norm, j, n_latents) : vector;
    };
    const int64_t groups = group_maxima(n_latents, GROUPS_PER_ENTRY * k, q, found.keys);
    const int32_t reached = kth_largest(found.keys, groups, k, k / 16);
    const Floats bound = float_of(reached > 0 ? reached : 1) - Floats{};
    found.n = 0;
    scan(n_latents, [&](auto tail, int64_t j) { return q(tail, j) >= bound; }, [&](int64_t j) {
        found.keys[found.n] = key_of(WITH_NORM ? h[j] * norm[j] : h[j]);
        found.values[found.n] = h[j];
        found.latents[found.n++] = static_cast<int32_t>(j);
    });
    take_largest(found, k, values, indices);
}

template <bool WITH_NORM>
void topk(const float* h, const float* norm, int64_t n_rows, int64_t n_latents, int64_t k, float* values, int64_t* indices, int threads) {
    for_pieces(n_rows, ROWS, threads, [=](int64_t begin, int64_t end) {
        const int64_t room = n_latents + LANES;
        int32_t* const scratch = static_cast<int32_t*>(malloc(3 * sizeof(int32_t) * static_cast<size_t>(room)));
        const Candidates found{scratch, scratch + room, reinterpret_cast<float*>(scratch + 2 * room), 0};
        for (int64_t i = begin; i < end; i++) topk_row<WITH_NORM>(h + i * n_latents, norm, n_latents, k, found, values + i * k, indices + i * k);
        free(scratch);
    });
}

// What `above` looks for: q > floor and h > 0, with one floor or one for each latent.
struct Above {
    const float *h, *norm, *floors;
    float floor;
    int64_t n_latents;

    template <class Found>
    void find(const Found& found) const {
        scan(
            n_latents,
            [this](auto tail, int64_t j) {
                constexpr bool TAIL = decltype(tail)::value;
                const Floats here = read<TAIL>(h, j, n_latents);
                const Floats q = norm ? here * read<TAIL>(norm, j, n_latents) : here;
                const Floats least = floors ? read<TAIL>(floors, j, n_latents) : floor - Floats{};
                return (q > least) & (here > Floats{});
            },
            found);
    }
};

}  // namespace

extern "C" {

// The k largest of relu(q) of each row: values [n, k] of h and latents [n, k], 0 < k <= F.
void lm_saes_topk(const float* h, const float* norm, int64_t n_rows, int64_t n_latents, int64_t k, float* values, int64_t* indices, int threads) {
    (norm ? topk<true> : topk<false>)(h, norm, n_rows, n_latents, k, values, indices, threads);
}

// How many entries of each row are above the floor: counts [n].
void lm_saes_count_above(
    const float* h, const float* norm, const float* floors, float floor, int64_t n_rows, int64_t n_latents, int64_t* counts, int threads) {
    for_pieces(n_rows, ROWS, threads, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            int64_t n = 0;
            Above{h + i * n_latents, norm, floors, floor, n_latents}.find([&](int64_t) { n++; });
            counts[i] = n;
        }
    });
}

// The entries themselves, those of row i from offsets[i] on.
void lm_saes_fill_above(
    const float* h, const float* norm, const float* floors, float floor, int64_t n_rows, int64_t n_latents, const int64_t* offsets, int64_t* indices,
    float* values, float* gates, int threads) {
    for_pieces(n_rows, ROWS, threads, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const float* const row = h + i * n_latents;
            int64_t at = offsets[i];
            Above{row, norm, floors, floor, n_latents}.find([&](int64_t j) {
                indices[at] = j;
                values[at] = row[j];
                gates[at++] = norm ? row[j] * norm[j] : row[j];
            });
        }
    });
}
}
