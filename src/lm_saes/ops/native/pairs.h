// Scalar products for the few entries of the code that need them, made latent by latent: the row of a latent, which comes from far, is read
// once for all tokens that want it. Two kinds: in float32, which decide, and of both halves of rounded vectors (integers.h), which bound what
// float32 gives some hundred times closer than the matrix product does, in a fraction of the time.
#pragma once

#include "integers.h"

namespace {

// Numbers in a row, as many as come.
template <class Number>
class List {
public:
    List() = default;
    ~List() { free(numbers); }
    List(const List&) = delete;

    void add(Number number) {
        if (n == room) numbers = static_cast<Number*>(realloc(numbers, sizeof(Number) * static_cast<size_t>(room = room ? 2 * room : 1 << 12)));
        numbers[n++] = number;
    }
    void clear() { n = 0; }
    int64_t size() const { return n; }
    Number& operator[](int64_t i) const { return numbers[i]; }

private:
    Number* numbers = nullptr;
    int64_t n = 0, room = 0;
};

// Entries of the code, and a number for each: its pre-activation in float32, or the largest that this may be.
struct Pair {
    int32_t row, latent;
    float h;
};
using Pairs = List<Pair>;

// work(latent, indices of its pairs, how many, the next latent or -1), for all latents that occur. No pair's number may depend on the others.
template <class Work>
inline void by_latent(const Pairs& pairs, int64_t n_latents, const Work& work) {
    const int64_t n = pairs.size();
    int32_t* const ends = static_cast<int32_t*>(calloc(static_cast<size_t>(n_latents + 1 + n), sizeof(int32_t)));
    int32_t* const order = ends + n_latents + 1;
    for (int64_t i = 0; i < n; i++) ends[pairs[i].latent + 1]++;
    for (int64_t j = 0; j < n_latents; j++) ends[j + 1] += ends[j];
    for (int64_t i = 0; i < n; i++) order[ends[pairs[i].latent]++] = static_cast<int32_t>(i);
    for (int64_t first = 0; first < n;) {
        const int32_t latent = pairs[order[first]].latent;
        const int64_t end = ends[latent];
        work(latent, order + first, end - first, end < n ? pairs[order[end]].latent : -1);
        first = end;
    }
    free(ends);
}

inline void prefetch(const void* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at);
}

// The weights by latent: W^T [F, D], b [F], and the records [F] of integers.h, null if the products were not of integers.
struct Weights {
    const float* transposed;
    const float* bias;
    const uint8_t* records;
};

// In float32; `x` is the first row.
inline void compute(const Screen& screen, const Weights& weights, const float* x, const Pairs& pairs) {
    const int64_t D = screen.width;
    by_latent(pairs, screen.n_latents, [&](int32_t latent, const int32_t* which, int64_t count, int32_t next) {
        if (next >= 0) prefetch(weights.transposed + next * D, D * 4);
        const float* const w = weights.transposed + latent * D;
        const auto row = [&](int64_t i) { return x + pairs[which[i < count ? i : count - 1]].row * D; };
        int64_t i = 0;
        for (; i + 4 <= count; i += 4) {
            const float* const rows[4] = {row(i), row(i + 1), row(i + 2), row(i + 3)};
            const float* const coming[4] = {row(i + 4), row(i + 5), row(i + 6), row(i + 7)};
            float dots[4];
            four_dots(w, rows, coming, D, dots);
            for (int l = 0; l < 4; l++) pairs[which[i + l]].h = dots[l] + weights.bias[latent];
        }
        for (; i < count; i++) pairs[which[i]].h = dot(w, row(i), D) + weights.bias[latent];
    });
}

// The rows that are looked at: the lengths of y and of what its rounding took away, and their records, if the products are of integers.
struct Rows {
    const float* norms;
    const float* errors;
    const uint8_t* records;

    Rows from(int64_t row, int64_t width) const { return {norms + row, errors + row, records ? records + row * record_size(width) : nullptr}; }
};

// The largest that float32 may give. With y = y~ + r + e and w = w~ + v + f, both halves and what is in neither, y.w is y~.w~ + y~.v + r.w~ but
// for r.v + e.w + (y~ + r).f; the rest of the bound is as in screen.h.
inline void bound(const Screen& screen, const Weights& weights, const Rows& rows, const Pairs& pairs) {
    const int64_t D = screen.width, size = record_size(D), half = half_size(D);
    const float g = static_cast<float>(rounding_share(D)), more = (1 + g) * (1 + g);
    by_latent(pairs, screen.n_latents, [&](int32_t latent, const int32_t* which, int64_t count, int32_t next) {
        if (next >= 0) prefetch(weights.records + next * size, size);
        const uint8_t* const record = weights.records + latent * size;
        Header w;
        memcpy(&w, record, sizeof w);
        const float w_error = screen.errors[latent] + w.rest_error, w_norm = screen.norms[latent] + screen.errors[latent], c = screen.centred[latent];
        for (int64_t i = 0; i < count; i++) {
            Pair& pair = pairs[which[i]];
            const uint8_t* const other = rows.records + pair.row * size;
            Header y;
            memcpy(&y, other, sizeof y);
            const Dots dots = dots_of_halves(record + HEADER, other + HEADER, half);
            const int64_t both = dots.both - ZERO * y.total, left = dots.with_rest - ZERO * y.total, right = dots.rest_with - ZERO * y.rest_total;
            const float found = y.scale * (w.scale * static_cast<float>(both) + w.rest_scale * static_cast<float>(left)) +
                                y.rest_scale * w.scale * static_cast<float>(right);
            const float norm = rows.norms[pair.row], error = rows.errors[pair.row], rounding = g * (norm + error + screen.centre);
            const float most = more * ((y.rest_error + rounding) * w_norm + (norm + y.rest_error) * w.rest_error + (error + y.rest_error) * w_error);
            pair.h = found + c + (most + g * absolute(c) + SMALLEST);
        }
    });
}

}  // namespace
