// Sums over the entries of each latent: the gradients of weight matrices. First the entries are sorted by latent (a counting sort),
// then each latent's row is summed by one thread.

#include <cstdlib>
#include <cstring>

#include "gather.h"
#include "threads.h"

namespace {

constexpr int64_t GROUP = LINE;  // latents whose columns together fill a cache line of the transposed output

// sums[d, i] = rows[i, d] of n_rows <= GROUP rows: a cache line for each d.
void store_transposed(const float* rows, int64_t stride, int64_t n_rows, int64_t width, float* sums, int64_t n_latents) {
    for (int64_t d = 0; d < width; d++) {
        if (n_rows == GROUP) {
            float line[LINE];
            for (int64_t i = 0; i < LINE; i++) line[i] = rows[i * stride + d];
            store_line(sums + d * n_latents, line);
        } else {
            for (int64_t i = 0; i < n_rows; i++) sums[d * n_latents + i] = rows[i * stride + d];
        }
    }
    finish_lines();
}

}  // namespace

extern "C" {

// Whether all numbers lie in 0 .. end - 1.
int lm_saes_all_below(const int64_t* numbers, int64_t n, int64_t end) {
    uint64_t outside = 0;
    for (int64_t i = 0; i < n; i++) outside |= static_cast<uint64_t>(numbers[i]) >= static_cast<uint64_t>(end);
    return !outside;
}

// Whether offsets ascend from 0 to n_entries.
int lm_saes_ascend(const int64_t* offsets, int64_t n, int64_t n_entries) {
    if (n < 1 || offsets[0] != 0 || offsets[n - 1] != n_entries) return 0;
    uint64_t wrong = 0;
    for (int64_t i = 1; i < n; i++) wrong |= offsets[i] < offsets[i - 1];
    return !wrong;
}

// The entries sorted by latent, in order within a latent: offsets [F + 1], order [nnz], and rows [nnz], the token of each in that order.
// `parts` threads count and then place a consecutive part of the tokens each; scratch is [parts, F].
void lm_saes_by_latent(
    const int64_t* indices, const int64_t* token_offsets, int64_t n_tokens, int64_t n_latents, int64_t parts, int64_t* scratch, int64_t* order,
    int64_t* rows, int64_t* offsets, int threads) {
    const auto first_token = [=](int64_t part) { return n_tokens * part / parts; };
    for_pieces(parts, 1, threads, [=](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; part++) {
            int64_t* const counts = scratch + part * n_latents;
            memset(counts, 0, sizeof(int64_t) * static_cast<size_t>(n_latents));
            for (int64_t e = token_offsets[first_token(part)]; e < token_offsets[first_token(part + 1)]; e++) counts[indices[e]]++;
        }
    });
    int64_t placed = 0;
    for (int64_t latent = 0; latent < n_latents; latent++) {
        offsets[latent] = placed;
        for (int64_t part = 0; part < parts; part++) {
            const int64_t count = scratch[part * n_latents + latent];
            scratch[part * n_latents + latent] = placed;
            placed += count;
        }
    }
    offsets[n_latents] = placed;
    for_pieces(parts, 1, threads, [=](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; part++) {
            int64_t* const next = scratch + part * n_latents;
            for (int64_t i = first_token(part); i < first_token(part + 1); i++) {
                for (int64_t e = token_offsets[i]; e < token_offsets[i + 1]; e++) {
                    const int64_t at = next[indices[e]]++;
                    order[at] = e;
                    rows[at] = i;
                }
            }
        }
    });
}

// sums = codes^T matrix, [F, D], or its transpose [D, F]: for each latent the sum of values[order[e]] * matrix[rows[e]] over its entries.
void lm_saes_latent_sums(
    const int64_t* order, const int64_t* rows, const int64_t* offsets, const float* values, const float* matrix, int64_t n_latents, int64_t width,
    int transposed, float* sums, int threads) {
    for_pieces(n_latents, GROUP, threads, [=](int64_t begin, int64_t end) {
        const int64_t stride = width + LINE;  // rows a power of two apart would share few places in the cache
        float* const group = transposed ? static_cast<float*>(malloc(sizeof(float) * static_cast<size_t>(GROUP * stride))) : nullptr;
        for (int64_t first = begin; first < end; first += GROUP) {
            const int64_t n = first + GROUP < end ? GROUP : end - first;
            for (int64_t i = 0; i < n; i++) {
                const int64_t from = offsets[first + i];
                const Entries entries{rows + from, values, order + from, offsets[first + i + 1] - from};
                weighted_sum(entries, matrix, nullptr, width, transposed ? group + i * stride : sums + (first + i) * width);
            }
            if (transposed) store_transposed(group, stride, n, width, sums + first, n_latents);
        }
        free(group);
    });
}
}
