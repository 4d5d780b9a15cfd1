// What bounds the gate values of a row, given their products in low precision.
//
// Let m be any vector, y = x - m, y~ and w~ be y and w rounded, to bfloat16 or (rotated, integers.h) to 8-bit integers, and s the product of
// y~ and w~ as it was returned, in bfloat16. Then
//     |y.w - s|  <=  |y - y~| |w~|  +  |y| |w - w~|  +  g |y~| |w~|  +  2^-8 |s|
// by Cauchy and Schwarz; the third term bounds the rounding of a float32 sum of D terms in any order (g = D 2^-24 and some), the last
// one that of the result. The errors y - y~ and w - w~ are those that were made, not the largest there could be. With m the mean of the
// activations, which is most of them in many layers, y is much shorter than x.
//
// What decides in the end is a float32 result, dot(x, w) + b, and what the bounds are around is s + c, with c = m.w + b in float32. The
// rounding of both comes to less than g (|y| + 2 |m|) |w| + g |c|, so that 2 g (|y| + |m|) covers it together with the third term. A product
// of integers has no third term, but y and w were rotated, which rounds: that comes to less.
#pragma once

#include "select.h"

namespace {

constexpr float OUTPUT_ROUNDING = 1.01f / 256;
constexpr float SMALLEST = 1e-30f;  // products that are too small to be floats

// The encoder as screening needs it.
struct Screen {
    const float* transposed;  // W^T [F, D]
    const float* norms;       // |w~| [F]
    const float* errors;      // |w - w~| [F]
    const float* bias;        // b [F]
    const float* centred;     // c [F]
    const float* gate_norm;   // [F], or null
    const uint8_t* records;   // integers.h, [F]; null if the products are not of integers
    float centre;             // |m|
    int64_t width, n_latents;

    float gate(float h, int64_t j) const { return gate_norm ? h * gate_norm[j] : h; }
};

// What the rounding of float32 may come to, above; generously. Lengths are summed in float32 and bounds computed in it, too: 1 + this, squared,
// covers that.
inline double rounding_share(int64_t width) { return 2.02 * static_cast<double>(width + 40) / (1 << 24); }

// |v| from the sum of its squares, with what squares too small for a float would have added.
inline float norm_of(float squares, int64_t width) { return __builtin_sqrtf(squares) + static_cast<float>(width) * 0x1p-62f; }

class Row {
public:
    Row(const Screen& screen, const uint16_t* products, float norm, float error) : screen(screen), products(products) {
        const double g = rounding_share(screen.width), more = (1 + g) * (1 + g);
        const double rounding = g * (static_cast<double>(norm) + error + screen.centre);
        norm_factor = static_cast<float>(more * (error + rounding));
        error_factor = static_cast<float>(more * (norm + rounding));
        centred_factor = static_cast<float>(g);
    }

    // The largest (SIGN 1) or smallest (SIGN -1) pre-activation that float32 may give, or the one that bfloat16 gave (SIGN 0). NaN if unknown.
    template <int SIGN, bool TAIL>
    Floats h(int64_t j) const {
        const int64_t F = screen.n_latents;
        return combine<SIGN>(
            product<TAIL>(j), read<TAIL>(screen.centred, j, F), SIGN ? read<TAIL>(screen.norms, j, F) : Floats{},
            SIGN ? read<TAIL>(screen.errors, j, F) : Floats{});
    }
    template <int SIGN>
    float h(int64_t j) const {
        const float s = float_of(static_cast<int32_t>(static_cast<uint32_t>(products[j]) << 16));
        return combine<SIGN>(s, screen.centred[j], screen.norms[j], screen.errors[j]);
    }

    // The gate value of a pre-activation; larger for a larger one.
    template <bool TAIL>
    Floats gate(Floats h, int64_t j) const {
        return screen.gate_norm ? h * read<TAIL>(screen.gate_norm, j, screen.n_latents) : h;
    }
    float gate(float h, int64_t j) const { return screen.gate(h, j); }

    const Screen& screen;

private:
    template <int SIGN, class Number>
    Number combine(Number s, Number c, Number norm, Number error) const {
        const Number h = s + c;
        if (SIGN == 0) return h;
        const Number most = norm_factor * norm + error_factor * error + OUTPUT_ROUNDING * absolute(s) + centred_factor * absolute(c) + SMALLEST;
        return SIGN > 0 ? h + most : h - most;
    }

    template <bool TAIL>
    Floats product(int64_t j) const {
        if (!TAIL) return load_bfloat16(products + j);
        uint16_t last[LANES] = {};
        memcpy(last, products + j, sizeof(uint16_t) * static_cast<size_t>(screen.n_latents - j));
        return load_bfloat16(last);
    }

    const uint16_t* products;  // s [F]
    float norm_factor, error_factor, centred_factor;
};

}  // namespace
