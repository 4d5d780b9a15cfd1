// The product of screening in 8-bit integers: four multiplications where float32 has one, and sums without rounding.
//
// Tokens and latents are rotated and rounded row by row (integers.h), each with a scale of its own. The product of their integers, times both
// scales, is never written: the bounds it gives (screen.h) are.

#include "integers.h"
#include "threads.h"

namespace {

constexpr int64_t TOO_LARGE = 1 << 23;  // floats that no cache keeps until they are read
constexpr int64_t WORDS = PANEL;        // of one step of a panel: four components of each latent

// sums[lane] += the four products of the bytes of weights[lane], unsigned, with those of x, signed.
inline void add_dots(Ints& sums, Ints weights, int32_t x) {
#if defined(__AVX512VNNI__)
    sums = reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), reinterpret_cast<__m512i>(weights), _mm512_set1_epi32(x)));
#else
    for (int i = 0; i < BYTES; i++) sums += ((weights >> (8 * i)) & 0xff) * static_cast<int32_t>(static_cast<int8_t>(x >> (8 * i)));
#endif
}

// A dozen tokens by 32 latents. `x` has for each step the words of the tokens, `weights` those of the latents; then found(r, products), r < n_rows.
template <class Found>
inline void tile(
    const int32_t* x, const int32_t* weights, int64_t steps, const int32_t* totals, const float* row_scales, const float* scales, int64_t n_rows,
    const Found& found) {
    Ints sums[TILE_ROWS][VECTORS];
    for (int r = 0; r < TILE_ROWS; r++) {
        for (int v = 0; v < VECTORS; v++) sums[r][v] = Ints{} - static_cast<int32_t>(ZERO) * totals[r];
    }
    for (int64_t step = 0; step < steps; step++) {
        Ints fours[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            fours[v] = load(weights + step * WORDS + v * LANES);
        }
        for (int r = 0; r < TILE_ROWS; r++) {
            for (int v = 0; v < VECTORS; v++) add_dots(sums[r][v], fours[v], x[step * TILE_ROWS + r]);
        }
    }
    for (int64_t r = 0; r < n_rows; r++) {
        found(r, [&](int64_t v) { return __builtin_convertvector(sums[r][v], Floats) * (row_scales[r] * load(scales + v * LANES)); });
    }
}

// Rows [n, width] from and to LANES vectors side by side, vectors[d] their components d. Rows that are not there are zero.
inline void read_rows(const float* rows, int64_t n, int64_t width, Floats* vectors) {
    for (int64_t d = 0; d < width; d += LANES) {
        Floats block[LANES];
        const int64_t length = width - d < LANES ? width - d : LANES;
        for (int64_t l = 0; l < LANES; l++) block[l] = l >= n ? Floats{} : length == LANES ? load(rows + l * width + d) : load_tail(rows + l * width + d, length);
        transpose(block);
        for (int64_t i = 0; i < length; i++) vectors[d + i] = block[i];
    }
}
inline void write_rows(const Floats* vectors, int64_t n, int64_t width, float* rows, bool past_caches) {
    for (int64_t d = 0; d < width; d += LINE) {
        float lines[LANES][LINE];
        for (int64_t part = 0; part < LINE; part += LANES) {
            Floats block[LANES];
            for (int64_t i = 0; i < LANES; i++) block[i] = d + part + i < width ? vectors[d + part + i] : Floats{};
            transpose(block);
            for (int64_t l = 0; l < LANES; l++) store(lines[l] + part, block[l]);
        }
        const int64_t length = width - d < LINE ? width - d : LINE;
        for (int64_t l = 0; l < n; l++) {
            if (past_caches && length == LINE) {
                store_line(rows + l * width + d, lines[l]);
            } else {
                memcpy(rows + l * width + d, lines[l], sizeof(float) * static_cast<size_t>(length));
            }
        }
    }
}

inline int64_t tiles(int64_t n, int64_t size) { return (n + size - 1) / size; }

}  // namespace

extern "C" {

// Of W [D, F]: its transpose, m W + b, and for each latent Q w rounded to integers (in panels of 32 latents: for each four components a word of
// every latent; and as a record), their scale, and the lengths of what was kept and of what rounding took away. Panels and scales have room for
// whole panels.
void lm_saes_integer_weights(
    const float* W, const float* bias, const float* centre, int64_t width, int64_t n_latents, float* transposed, float* centred, int32_t* panels,
    uint8_t* records, float* scales, float* norms, float* errors, int threads) {
    const bool past_caches = width * n_latents > TOO_LARGE;
    const Rotation rotate(width);
    for_pieces(n_panels(n_latents), 1, threads, [=, &rotate](int64_t begin, int64_t end) {
        Vectors vectors(width);
        for (int64_t panel = begin; panel < end; panel++) {
            for (int64_t v = 0; v < VECTORS; v++) {
                const int64_t first = panel * PANEL + v * LANES, left = n_latents - first, n = left < LANES ? (left > 0 ? left : 0) : LANES;
                Floats product = {};
                for (int64_t d = 0; d < width; d++) {
                    const float* const from = W + d * n_latents + first;
                    if (d + 8 < width && n) __builtin_prefetch(from + 8 * n_latents);
                    vectors[d] = n == LANES ? load(from) : load_tail(from, n);
                    product += centre[d] * vectors[d];
                }
                for (int64_t l = 0; l < n; l++) centred[first + l] = product[l] + bias[first + l];
                write_rows(vectors, n, width, transposed + first * width, past_caches);
                rotate(vectors);
                int32_t* const words_of = panels + panel * words(width) * WORDS + v * LANES;
                const Rounded rounded = to_records(vectors, n, width, ZERO, records + first * record_size(width), [=](int64_t w, Ints bytes) {
                    store(words_of + w * WORDS, bytes);
                });
                store(scales + first, rounded.scale);
                for (int64_t l = 0; l < n; l++) {
                    norms[first + l] = norm_of(rounded.squares[l], width);
                    errors[first + l] = norm_of(rounded.errors[l], width);
                }
            }
        }
        if (past_caches) finish_lines();
    });
}

// Of y = x - m, for x [n, D] and m [D]: Q y rounded to integers (in tiles of 12 tokens: for each four components a word of every token; and as
// records), for each row their scale, their total, |y|, and the length of what rounding took away. Everything has room for whole vectors of rows.
void lm_saes_integer_rows(
    const float* x, const float* centre, int64_t n_rows, int64_t width, int32_t* rounded_rows, uint8_t* records, float* scales, int32_t* totals,
    float* norms, float* errors, int threads) {
    constexpr int64_t AT_ONCE = 3 * LANES;
    const Rotation rotate(width);
    for_pieces(tiles(n_rows, AT_ONCE), 1, threads, [=, &rotate](int64_t begin, int64_t end) {
        Vectors vectors(width);
        for (int64_t top = begin * AT_ONCE; top < end * AT_ONCE; top += LANES) {
            const int64_t n = n_rows - top < LANES ? (n_rows > top ? n_rows - top : 0) : LANES;
            read_rows(x + top * width, n, width, vectors);
            Floats squares = {};
            for (int64_t d = 0; d < width; d++) {
                vectors[d] -= centre[d];
                squares += vectors[d] * vectors[d];
            }
            rotate(vectors);
            const Rounded rounded = to_records(vectors, n, width, 0, records + top * record_size(width), [=](int64_t w, Ints bytes) {
                for (int64_t l = 0; l < LANES; l++) {
                    const int64_t row = top + l;
                    rounded_rows[row / TILE_ROWS * words(width) * TILE_ROWS + w * TILE_ROWS + row % TILE_ROWS] = bytes[l];
                }
            });
            store(scales + top, rounded.scale);
            store(totals + top, rounded.total);
            for (int64_t l = 0; l < n; l++) {
                norms[top + l] = norm_of(squares[l], width);
                errors[top + l] = norm_of(rounded.errors[l], width);
            }
        }
    });
}

// The product of what the two functions above made, as keys [n, whole panels] and maxima [n, groups] for `k` entries.
void lm_saes_integer_product(
    const int32_t* rounded_rows, const float* row_scales, const int32_t* totals, const float* row_norms, const float* row_errors,
    const int32_t* panels, const float* scales, const float* norms, const float* errors, const float* centred, const float* gate_norm, float centre,
    int64_t n_rows, int64_t width, int64_t n_latents, int64_t k, int16_t* keys, int16_t* maxima, int threads) {
    const Screen screen{norms, errors, centred, gate_norm, centre, width, n_latents};
    const int64_t steps = words(width), per_group = panels_per_group(n_latents, k), stride = keys_per_row(n_latents), n_groups = groups(n_latents, k);
    for_pieces(n_panels(n_latents), per_group, threads, [=, &screen](int64_t begin, int64_t end) {
        Factors* const factors = static_cast<Factors*>(malloc(sizeof(Factors) * static_cast<size_t>(n_rows)));
        for (int64_t i = 0; i < n_rows; i++) factors[i] = factors_of(screen, row_norms[i], row_errors[i]);
        for (int64_t panel = begin; panel < end; panel++) {
            const Panel latents(screen, panel);
            const bool first = panel % per_group == 0;
            for (int64_t top = 0; top < n_rows; top += TILE_ROWS) {
                tile(
                    rounded_rows + top * steps, panels + panel * steps * WORDS, steps, totals + top, row_scales + top, scales + panel * PANEL,
                    n_rows - top < TILE_ROWS ? n_rows - top : TILE_ROWS, [&](int64_t r, const auto& products) {
                        const int64_t i = top + r;
                        latents.bound(
                            products, factors[i], NO_ROUNDING, first, keys + i * stride + panel * PANEL, maxima + i * n_groups + panel / per_group * PANEL);
                    });
            }
        }
        free(factors);
    });
}
}
