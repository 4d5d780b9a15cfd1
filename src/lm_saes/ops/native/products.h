// Scalar products that some rows want, made latent by latent: a row of W^T, which comes from far, is read once for all that want it.
#pragma once

#include <cstdlib>

#include "screen.h"

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

class Products {
public:
    explicit Products(const Screen& screen) : screen(screen) {}

    void clear() { pairs.clear(); }
    void want(int64_t row, int64_t latent) { pairs.add({static_cast<int32_t>(row), static_cast<int32_t>(latent), 0}); }
    int64_t size() const { return pairs.size(); }
    int32_t latent(int64_t i) const { return pairs[i].latent; }
    // The pre-activation in float32 of the pair that was wanted as number i, once they are computed. It does not depend on the others.
    float h(int64_t i) const { return pairs[i].h; }

    void compute(const float* x) {
        const int64_t n = pairs.size();
        int32_t* const ends = static_cast<int32_t*>(calloc(static_cast<size_t>(screen.n_latents + 1 + n), sizeof(int32_t)));
        int32_t* const order = ends + screen.n_latents + 1;
        for (int64_t i = 0; i < n; i++) ends[pairs[i].latent + 1]++;
        for (int64_t j = 0; j < screen.n_latents; j++) ends[j + 1] += ends[j];
        for (int64_t i = 0; i < n; i++) order[ends[pairs[i].latent]++] = static_cast<int32_t>(i);
        for (int64_t first = 0; first < n;) {
            const int32_t latent = pairs[order[first]].latent;
            const int64_t end = ends[latent];
            if (end < n) prefetch(screen.transposed + pairs[order[end]].latent * screen.width);
            compute(x, latent, order + first, end - first);
            first = end;
        }
        free(ends);
    }

private:
    struct Pair {
        int32_t row, latent;
        float h;
    };

    void compute(const float* x, int32_t latent, const int32_t* which, int64_t count) {
        const int64_t D = screen.width;
        const float* const w = screen.transposed + latent * D;
        const auto row = [&](int64_t i) { return x + pairs[which[i < count ? i : count - 1]].row * D; };
        int64_t i = 0;
        for (; i + 4 <= count; i += 4) {
            const float* const rows[4] = {row(i), row(i + 1), row(i + 2), row(i + 3)};
            const float* const coming[4] = {row(i + 4), row(i + 5), row(i + 6), row(i + 7)};
            float dots[4];
            four_dots(w, rows, coming, D, dots);
            for (int l = 0; l < 4; l++) pairs[which[i + l]].h = dots[l] + screen.bias[latent];
        }
        for (; i < count; i++) pairs[which[i]].h = dot(w, row(i), D) + screen.bias[latent];
    }

    void prefetch(const float* row) const {
        for (int64_t d = 0; d < screen.width; d += LINE) __builtin_prefetch(row + d);
    }

    const Screen& screen;
    List<Pair> pairs;
};

}  // namespace
