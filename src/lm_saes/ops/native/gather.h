// The inner loops of everything sparse: a weighted sum of rows of a matrix, and scalar products with them.
#pragma once

#include "vector.h"

namespace {

constexpr int64_t AHEAD = 4;  // rows that are asked for before they are used

// Entries of one sum: row numbers and weights; the weight of entry e is weights[order[e]] if there is an order.
struct Entries {
    const int64_t* rows;
    const float* weights;
    const int64_t* order;
    int64_t count;

    float weight(int64_t e) const { return order ? weights[order[e]] : weights[e]; }
};

// `VECTORS` vectors of the sum, from column d on, in registers.
template <int VECTORS>
inline void sum_columns(const Entries& entries, const float* matrix, const float* start, int64_t width, int64_t d, float* sums) {
    Floats total[VECTORS];
    for (int v = 0; v < VECTORS; v++) total[v] = start ? load(start + d + v * LANES) : Floats{};
    for (int64_t e = 0; e < entries.count; e++) {
        const float* const row = matrix + entries.rows[e] * width + d;
        if (e + AHEAD < entries.count) {
            const float* const coming = matrix + entries.rows[e + AHEAD] * width + d;
            for (int64_t i = 0; i < VECTORS * LANES; i += LINE) __builtin_prefetch(coming + i);
        }
        const float weight = entries.weight(e);
        for (int v = 0; v < VECTORS; v++) total[v] += weight * load(row + v * LANES);
    }
    for (int v = 0; v < VECTORS; v++) store(sums + d + v * LANES, total[v]);
}

// sums [width] = start (or zero) + the sum of weight(e) * matrix[rows[e]].
inline void weighted_sum(const Entries& entries, const float* matrix, const float* start, int64_t width, float* sums) {
    int64_t d = 0;
    for (; d + REGISTERS * LANES <= width; d += REGISTERS * LANES) sum_columns<REGISTERS>(entries, matrix, start, width, d, sums);
    for (; d + 4 * LANES <= width; d += 4 * LANES) sum_columns<4>(entries, matrix, start, width, d, sums);
    for (; d + LANES <= width; d += LANES) sum_columns<1>(entries, matrix, start, width, d, sums);
    for (; d < width; d++) {
        float total = start ? start[d] : 0;
        for (int64_t e = 0; e < entries.count; e++) total += entries.weight(e) * matrix[entries.rows[e] * width + d];
        sums[d] = total;
    }
}

// dots[e] = left . right[rows[e]]. A product does not depend on which others are made with it.
inline void dots_with_rows(const float* left, const float* right, const int64_t* rows, int64_t n, int64_t width, float* dots) {
    int64_t e = 0;
    for (; e + 4 <= n; e += 4) {
        const float *four[4], *coming[4];
        for (int i = 0; i < 4; i++) {
            four[i] = right + rows[e + i] * width;
            coming[i] = right + rows[e + 4 + i < n ? e + 4 + i : e] * width;
        }
        four_dots(left, four, coming, width, dots + e);
    }
    for (; e < n; e++) dots[e] = dot(left, right + rows[e] * width, width);
}

}  // namespace
