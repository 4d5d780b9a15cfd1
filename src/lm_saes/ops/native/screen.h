// What bounds the gate values of a row, given their products in low precision.
//
// Let m be any vector, y = x - m, y~ and w~ be y and w rounded, to bfloat16 or (rotated, integers.h) to 8-bit integers, and s the product of
// y~ and w~ as it was returned. Then
//     |y.w - s|  <=  |y - y~| |w~|  +  |y| |w - w~|  +  g |y~| |w~|  +  r |s|
// by Cauchy and Schwarz; the third term bounds the rounding of a float32 sum of D terms in any order (g = D 2^-24 and some), the last
// one that of the result: r = 2^-8 where that is bfloat16. The errors y - y~ and w - w~ are those that were made, not the largest there could
// be. With m the mean of the activations, which is most of them in many layers, y is much shorter than x.
//
// What decides in the end is a float32 result, dot(x, w) + b, and what the bounds are around is s + c, with c = m.w + b in float32. The
// rounding of both comes to less than g (|y| + 2 |m|) |w| + g |c|, so that 2 g (|y| + |m|) covers it together with the third term. A product
// of integers has no third term, but y and w were rotated, which rounds, and s was scaled: that comes to less.
//
// Only the upper bounds are kept, and of them the first 16 bits, rounded up: the keys, which are ordered like the bounds. With them stand the
// largest keys of groups of latents.
#pragma once

#include "select.h"

namespace {

constexpr float BFLOAT16_ROUNDING = 1.01f / 256, NO_ROUNDING = 0;
constexpr float SMALLEST = 1e-30f;  // products that are too small to be floats

// The encoder as screening needs it.
struct Screen {
    const float* norms;      // |w~| [F]
    const float* errors;     // |w - w~| [F]
    const float* centred;    // c [F]
    const float* gate_norm;  // [F], or null
    float centre;            // |m|
    int64_t width, n_latents;

    float gate(float h, int64_t j) const { return gate_norm ? h * gate_norm[j] : h; }
};

// What the rounding of float32 may come to, above; generously. Lengths are summed in float32 and bounds computed in it, too: 1 + this, squared,
// covers that.
inline double rounding_share(int64_t width) { return 2.02 * static_cast<double>(width + 40) / (1 << 24); }

// |v| from the sum of its squares, with what squares too small for a float would have added.
inline float norm_of(float squares, int64_t width) { return __builtin_sqrtf(squares) + static_cast<float>(width) * 0x1p-62f; }

// What a bound takes of a row: the factors of |w~|, |w - w~| and |c|.
struct Factors {
    float norm, error, centred;
};
inline Factors factors_of(const Screen& screen, float norm, float error) {
    const double g = rounding_share(screen.width), more = (1 + g) * (1 + g), rounding = g * (static_cast<double>(norm) + error + screen.centre);
    return {static_cast<float>(more * (error + rounding)), static_cast<float>(more * (norm + rounding)), static_cast<float>(g)};
}

// The keys of positive numbers, rounded up; of others, 0. NaN, of which nothing is known, has the largest key there is.
inline Ints keys_above(Floats numbers) {
    const Ints magnitude = reinterpret_cast<Ints>(numbers) & 0x7fffffff, up = (magnitude >> 16) + ((magnitude & 0xffff) != 0 ? Ints{} + 1 : Ints{});
    const Ints key = up > 0x7fff ? Ints{} + 0x7fff : up;
    return numbers <= Floats{} ? Ints{} : key;
}

constexpr int64_t PANEL = 32;       // latents whose bounds are written at a time
constexpr int64_t VECTORS = PANEL / LANES;
constexpr int64_t MOST_PANELS = 8;  // of a group
inline int64_t n_panels(int64_t n_latents) { return (n_latents + PANEL - 1) / PANEL; }
inline int64_t keys_per_row(int64_t n_latents) { return n_panels(n_latents) * PANEL; }

// A group has one latent of each of some consecutive panels. There are about GROUPS_PER_ENTRY groups for each entry wanted, or more.
inline int64_t panels_per_group(int64_t n_latents, int64_t k) {
    const int64_t panels = k > 0 ? n_latents / (GROUPS_PER_ENTRY * k) : MOST_PANELS;
    return panels < 1 ? 1 : panels < MOST_PANELS ? panels : MOST_PANELS;
}
inline int64_t groups(int64_t n_latents, int64_t k) {
    const int64_t per_group = panels_per_group(n_latents, k);
    return (n_panels(n_latents) + per_group - 1) / per_group * PANEL;
}

// What a bound takes of the latents of a panel; past the last nothing is possible.
class Panel {
public:
    Panel(const Screen& screen, int64_t panel) : gated(screen.gate_norm) {
        for (int64_t v = 0; v < VECTORS; v++) {
            const int64_t j = panel * PANEL + v * LANES, left = screen.n_latents - j;
            const auto read = [=](const float* from, float rest) {
                return left >= LANES ? load(from + j) : left > 0 ? load_tail(from + j, left, rest) : rest - Floats{};
            };
            norms[v] = read(screen.norms, 0), errors[v] = read(screen.errors, 0), centred[v] = read(screen.centred, -1);
            gate_norm[v] = gated ? read(screen.gate_norm, 1) : Floats{};
        }
    }

    // Writes the keys of the largest gate values that float32 may give, and takes them into the maxima of their groups. The vectors products(v)
    // are known but for `rounding` of themselves.
    template <class Products>
    void bound(const Products& products, const Factors& row, float rounding, bool first, int16_t* keys, int16_t* maxima) const {
        for (int64_t v = 0; v < VECTORS; v++) {
            const Floats s = products(v), h = s + centred[v];
            const Floats most = row.norm * norms[v] + row.error * errors[v] + rounding * absolute(s) + row.centred * absolute(centred[v]) + SMALLEST;
            const Halves halves = __builtin_convertvector(keys_above(gated ? (h + most) * gate_norm[v] : h + most), Halves);
            memcpy(keys + v * LANES, &halves, sizeof halves);
        }
        for (int64_t s = 0; s < PANEL; s += 2 * LANES) {
            const Shorts here = load(keys + s), before = first ? here : load(maxima + s);
            store(maxima + s, here > before ? here : before);
        }
    }

private:
    bool gated;
    Floats norms[VECTORS], errors[VECTORS], centred[VECTORS], gate_norm[VECTORS];
};

// found(j), in ascending order, for all j < length where keys[j] >= floor(j), given as vectors. There are whole panels of keys.
template <class Floor, class Found>
inline void scan_keys(const int16_t* keys, int64_t length, const Floor& floor, const Found& found) {
    for (int64_t j = 0; j < length; j += PANEL) {
        uint64_t word = 0;
        for (int64_t s = 0; s < PANEL; s += 2 * LANES) word |= bits(load(keys + j + s) >= floor(j + s)) << s;
        if (length - j < PANEL) word &= (uint64_t{1} << (length - j)) - 1;
        for (; word; word &= word - 1) found(j + __builtin_ctzll(word));
    }
}

}  // namespace
