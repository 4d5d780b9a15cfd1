// Sums over the entries of each token: rows of a matrix gathered, weighted and added (decoding, dX), and scalar products with them
// (gradients of the codes). Entries of token i are offsets[i] .. offsets[i + 1].
//
// The matrix does not fit into the caches next to a core, so all that counts is to ask early for the rows that come, and to use
// them for everything while they are there.

#include "gather.h"
#include "threads.h"

namespace {

constexpr int64_t TOKENS = 8;  // that a thread takes at a time

}  // namespace

extern "C" {

// sums [N, D]: for each token the sum of values[e] * matrix[indices[e]].
void lm_saes_gather_sum(
    const int64_t* indices, const int64_t* offsets, const float* values, const float* matrix, int64_t n_tokens, int64_t width, float* sums,
    int threads) {
    for_pieces(n_tokens, TOKENS, threads, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const Entries entries{indices + offsets[i], values + offsets[i], nullptr, offsets[i + 1] - offsets[i]};
            weighted_sum(entries, matrix, nullptr, width, sums + i * width);
        }
    });
}

// dots [nnz]: left[token of e] . right[indices[e]].
void lm_saes_entry_dots(
    const int64_t* indices, const int64_t* offsets, const float* left, const float* right, int64_t n_tokens, int64_t width, float* dots,
    int threads) {
    for_pieces(n_tokens, TOKENS, threads, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            dots_with_rows(left + i * width, right, indices + offsets[i], offsets[i + 1] - offsets[i], width, dots + offsets[i]);
        }
    });
}

// reconstruction [N, D] = codes W_D + b_D, residual [N, D] = reconstruction - target, the sum of its squares for each token, and
// slopes [nnz]: residual[token of e] . W_D[indices[e]], the derivative of half that sum by the value of e.
void lm_saes_reconstruct(
    const int64_t* indices, const int64_t* offsets, const float* values, const float* W_D, const float* b_D, const float* target, int64_t n_tokens,
    int64_t width, float* reconstruction, float* residual, float* squared_error, float* slopes, int threads) {
    for_pieces(n_tokens, TOKENS, threads, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const Entries entries{indices + offsets[i], values + offsets[i], nullptr, offsets[i + 1] - offsets[i]};
            float* const predicted = reconstruction + i * width;
            float* const error = residual + i * width;
            weighted_sum(entries, W_D, b_D, width, predicted);
            for (int64_t d = 0; d < width; d++) error[d] = predicted[d] - target[i * width + d];
            squared_error[i] = dot(error, error, width);
            dots_with_rows(error, W_D, entries.rows, entries.count, width, slopes + offsets[i]);
        }
    });
}
}
