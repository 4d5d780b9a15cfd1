// Vectors rotated and rounded to 8-bit integers, as the integer product (product.cpp) takes them.
//
// A few large components would take the whole range of 8 bits for themselves, and activations have such. An orthogonal transform Q of both
// sides changes no scalar product, and a Hadamard matrix spreads each component over many: whatever the vector was, Q v looks like noise, of
// which 8 bits keep two and a half digits (Chee et al. 2023, Ashkboos et al. 2024 do so with the weights of language models). Since the
// width need not be a power of two, the first P components are transformed and then the last P, P the largest power of two in it, with
// signs that differ from pass to pass and keep regular vectors from adding up.
//
// What rounding takes away is rounded to 8 bits again, at a scale of its own. Both halves of a vector stand together in a record, for the few
// scalar products that have to be known better than the matrix product gives them (pairs.h).
#pragma once

#include <cstdlib>

#include "screen.h"

namespace {

constexpr int64_t BYTES = 4;       // integers in a word
constexpr int64_t TILE_ROWS = 12;  // tokens of a tile of the product; its latents are a panel
constexpr int64_t ZERO = 128;      // weights are kept as unsigned bytes, from here

// What a record begins with; then come the integers, and those of the rest.
struct Header {
    float scale, rest_scale;    // an integer times it is the component
    int32_t total, rest_total;  // of the integers
    float rest_error;           // the length of what is in neither half
};
constexpr int64_t HEADER = 64, WHOLE = 64;  // bytes; records and halves begin where cache lines do

inline int64_t half_size(int64_t width) { return (width + WHOLE - 1) / WHOLE * WHOLE; }
inline int64_t record_size(int64_t width) { return HEADER + 2 * half_size(width); }

inline int64_t words(int64_t width) { return (width + BYTES - 1) / BYTES; }

// +1 or -1, any but regular.
inline float sign_of(int64_t d, uint32_t pass) {
    uint32_t hash = static_cast<uint32_t>(d) * 0x9e3779b1u + pass * 0x85ebca6bu;
    hash ^= hash >> 15;
    hash *= 0x2c1b3c6du;
    hash ^= hash >> 13;
    return (hash * 0x297a2d39u) >> 31 ? -1.0f : 1.0f;
}

// Q, applied to LANES vectors at once, lane by lane: vectors[d] holds their components d. Its rounding comes to less than
// (2 log2(width) + 4) 2^-24 of the length of a vector.
class Rotation {
public:
    explicit Rotation(int64_t width) : width(width) {
        while (2 * power <= width) power *= 2;
        factors = static_cast<float*>(malloc(2 * sizeof(float) * static_cast<size_t>(power)));
        const float scale = 1 / __builtin_sqrtf(static_cast<float>(power));
        for (int64_t d = 0; d < power; d++) {
            factors[d] = scale * sign_of(d, 0);
            factors[power + d] = scale * sign_of(width - power + d, 1);
        }
    }
    ~Rotation() { free(factors); }
    Rotation(const Rotation&) = delete;

    void operator()(Floats* vectors) const {
        hadamard(vectors, factors);
        if (power < width) hadamard(vectors + (width - power), factors + power);
    }

private:
    static constexpr int64_t RADIX = 8;  // components that go through three butterflies while they are in registers: all do not fit the first cache

    void hadamard(Floats* vectors, const float* signs) const {
        for (int64_t half = 1; half < power; half *= RADIX) {
            for (int64_t top = 0; top < power; top += RADIX * half) {
                for (int64_t d = top; d < top + half; d++) butterflies(vectors + d, half, power / half, half == 1 ? signs + d : nullptr);
            }
        }
        if (power == 1) vectors[0] *= signs[0];
    }

    // Of up to RADIX components, `half` apart.
    static void butterflies(Floats* vectors, int64_t half, int64_t left, const float* signs) {
        if (left >= RADIX) {
            Floats v[RADIX];
            for (int64_t i = 0; i < RADIX; i++) v[i] = signs ? vectors[i * half] * signs[i] : vectors[i * half];
            for (int64_t step = 1; step < RADIX; step *= 2) {
                for (int64_t i = 0; i < RADIX; i++) {
                    if (!(i & step)) butterfly(v[i], v[i + step]);
                }
            }
            for (int64_t i = 0; i < RADIX; i++) vectors[i * half] = v[i];
            return;
        }
        for (int64_t i = 0; signs && i < left; i++) vectors[i * half] *= signs[i];
        for (int64_t step = 1; step < left; step *= 2) {
            for (int64_t i = 0; i < left; i++) {
                if (!(i & step)) butterfly(vectors[i * half], vectors[(i + step) * half]);
            }
        }
    }
    static void butterfly(Floats& one, Floats& other) {
        const Floats left = one, right = other;
        one = left + right;
        other = left - right;
    }

    int64_t width, power = 1;
    float* factors;
};

struct Rounded {
    Floats scale;           // of each vector: an integer times it is the component
    Floats squares, errors; // sums over the components as rounded, and of what rounding took away
    Ints total;             // of the integers
};

// Rounds LANES rotated vectors; word(w, integers 4 w to 4 w + 3 of each vector, as bytes, with `zero` added). Leaves what rounding takes away.
template <class Word>
inline Rounded to_integers(Floats* vectors, int64_t width, int32_t zero, const Word& word) {
    constexpr float MOST = 127, TO_INTEGER = 0x1.8p23f;  // a sum with that keeps the nearest integer
    Floats largest = {};
    for (int64_t d = 0; d < width; d++) largest = larger(absolute(vectors[d]), largest);
    Rounded rounded{};
    Floats inverse;
    for (int l = 0; l < LANES; l++) {
        const float scale = largest[l] / MOST, one_over = 1 / scale;
        const bool usable = scale > 0 && scale < __builtin_inff() && one_over > 0 && one_over < __builtin_inff();
        rounded.scale[l] = usable ? scale : 0;  // then the whole vector is error
        inverse[l] = usable ? one_over : 0;
    }
    for (int64_t w = 0; w < words(width); w++) {
        Ints bytes = {};
        for (int64_t i = 0; i < BYTES; i++) {
            const int64_t d = w * BYTES + i;
            Ints integers = {};
            if (d < width) {
                const Floats wanted = larger(-larger(-(vectors[d] * inverse), -MOST - Floats{}), -MOST - Floats{});  // NaN: -127
                const Floats nearest = (wanted + TO_INTEGER) - TO_INTEGER, components = nearest * rounded.scale, error = vectors[d] - components;
                rounded.squares += components * components;
                rounded.errors += error * error;
                vectors[d] = error;
                integers = __builtin_convertvector(nearest, Ints);
                rounded.total += integers;
            }
            bytes |= ((integers + zero) & 0xff) << (8 * static_cast<int32_t>(i));
        }
        word(w, bytes);
    }
    return rounded;
}

// A half of the records of `n` of LANES vectors, written word by word: lines of each, transposed from LANES words of all.
class Half {
public:
    Half(uint8_t* first, int64_t n, int64_t size) : first(first), n(n), size(size) {}

    void add(Ints word) {
        words[filled++] = word;
        if (filled < LANES) return;
        transpose<>(words);
        for (int64_t l = 0; l < n; l++) memcpy(first + l * size, &words[l], sizeof words[l]);
        first += sizeof words[0];
        filled = 0;
    }

private:
    uint8_t* first;
    int64_t n, size;
    int filled = 0;
    Ints words[LANES];
};

// Rounds the first `n` of LANES rotated vectors to both halves of their records; word(w, bytes) as above, for the first half.
template <class Word>
inline Rounded to_records(Floats* vectors, int64_t n, int64_t width, int32_t zero, uint8_t* records, const Word& word) {
    const int64_t size = record_size(width), half = half_size(width);
    const auto fill = [=](Half& half_of, const auto& words_of) {
        const Rounded rounded = to_integers(vectors, width, zero, words_of);
        for (int64_t w = words(width); w < half / BYTES; w++) half_of.add(Ints{});
        return rounded;
    };
    Half whole(records + HEADER, n, size), left(records + HEADER + half, n, size);
    const Rounded rounded = fill(whole, [&](int64_t w, Ints bytes) {
        word(w, bytes);
        whole.add(bytes);
    });
    const Rounded rest = fill(left, [&](int64_t, Ints bytes) { left.add(bytes); });
    for (int64_t l = 0; l < n; l++) {
        const Header header{rounded.scale[l], rest.scale[l], rounded.total[l], rest.total[l], norm_of(rest.errors[l], width)};
        memcpy(records + l * size, &header, sizeof header);
    }
    return rounded;
}

// Of the halves of two vectors, `w` unsigned: w~ y~, v y~ and w~ r, whole.
struct Dots {
    int64_t both, with_rest, rest_with;
};
inline Dots dots_of_halves(const uint8_t* w, const uint8_t* y, int64_t half) {
    const uint8_t *const v = w + half, *const r = y + half;
#if defined(__AVX512VNNI__)
    const auto load = [](const uint8_t* from) { return _mm512_loadu_si512(from); };
    __m512i both = _mm512_setzero_si512(), with_rest = both, rest_with = both;
    for (int64_t i = 0; i < half; i += WHOLE) {
        const __m512i w_i = load(w + i), y_i = load(y + i);
        both = _mm512_dpbusd_epi32(both, w_i, y_i);
        with_rest = _mm512_dpbusd_epi32(with_rest, load(v + i), y_i);
        rest_with = _mm512_dpbusd_epi32(rest_with, w_i, load(r + i));
    }
    return {_mm512_reduce_add_epi32(both), _mm512_reduce_add_epi32(with_rest), _mm512_reduce_add_epi32(rest_with)};
#else
    Dots dots{};
    for (int64_t i = 0; i < half; i++) {
        const int32_t y_i = static_cast<int8_t>(y[i]), r_i = static_cast<int8_t>(r[i]);
        dots.both += w[i] * y_i;
        dots.with_rest += v[i] * y_i;
        dots.rest_with += w[i] * r_i;
    }
    return dots;
#endif
}

// Room for LANES vectors, aligned as they must be.
struct Vectors {
    explicit Vectors(int64_t width) { (void)!posix_memalign(&memory, 64, sizeof(Floats) * static_cast<size_t>(width)); }
    ~Vectors() { free(memory); }
    Vectors(const Vectors&) = delete;
    operator Floats*() const { return static_cast<Floats*>(memory); }

    void* memory = nullptr;
};

}  // namespace
