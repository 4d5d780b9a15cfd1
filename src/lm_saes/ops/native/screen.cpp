// Screening: bounds from a product in low precision say which entries could be selected (screen.h), and those are computed in float32, one by one.
//
// Where a bound is not finite the entry is a candidate; a row with too many candidates is left to the caller. So the entries selected
// are those that float32 selects, with the values that it gives, whatever the numbers are.

#include "pairs.h"
#include "threads.h"

namespace {

constexpr int64_t LATENTS = 64;  // that a thread rounds and transposes at a time: whole lines of W, and a block that stays in cache
constexpr int64_t BLOCK = 960;  // rows that a thread takes at a time, at most: weights come from memory once for all of them

// So many that each thread has something to do.
inline int64_t rows_at_a_time(int64_t n_rows, int threads) {
    const int64_t share = (n_rows + threads - 1) / threads;
    return share < ROWS ? ROWS : share < BLOCK ? share : BLOCK;
}

// The entries of a block of rows that are looked at, and the candidates of one.
struct Scratch {
    explicit Scratch(int64_t n_latents) {
        const size_t room = static_cast<size_t>(n_latents + LANES);
        memory = static_cast<int32_t*>(malloc(3 * sizeof(int32_t) * room));
        found = {memory, memory + room, reinterpret_cast<float*>(memory + 2 * room), 0};
    }
    ~Scratch() { free(memory); }
    Scratch(const Scratch&) = delete;

    int32_t* memory;
    Candidates found;
    Pairs likely, close, others;
    int64_t likely_end[BLOCK], others_end[BLOCK], looked_at[BLOCK];
    int16_t bound[BLOCK];
    float least[BLOCK];
};

inline Shorts shorts(int16_t number) { return number - Shorts{}; }

// The largest key that at least k of the n maxima reach (n a multiple of PANEL), or 1.
inline int16_t kth_largest(const int16_t* maxima, int64_t n, int64_t k) {
    int32_t low = 1, high = INT16_MAX + 1;
    while (high - low > 1) {
        const int32_t middle = low + (high - low) / 2;
        int64_t count = 0;
        for (int64_t i = 0; i < n; i += 2 * LANES) count += __builtin_popcountll(bits(load(maxima + i) >= shorts(static_cast<int16_t>(middle))));
        (count < k ? high : low) = middle;
    }
    return static_cast<int16_t>(low);
}

// The k-th largest of n keys; 0 if there are fewer. There is room for a vector more.
inline int32_t kth_largest(int32_t* keys, int64_t n, int64_t k) {
    if (n < k) return 0;
    for (int64_t i = n; i < padded(n); i++) keys[i] = 0;
    const int32_t bound = kth_largest(keys, padded(n), k, 0);
    int32_t least = INT32_MAX;
    for (int64_t i = 0; i < n; i++) least = keys[i] >= bound && keys[i] < least ? keys[i] : least;
    return least;
}

// The k largest of some rows; how many entries of each were computed one by one, or -1 if there were more candidates than `most`.
//
// First come those of the largest bounds, k and a few. The k-th largest of their values is a bound that few of the others may reach, and these
// follow.
void topk_rows(
    const Screen& screen, const Weights& weights, const Rows& rows, const int16_t* keys, const int16_t* maxima, const float* x, int64_t n_rows, int64_t k,
    int64_t most, Scratch& scratch, float* values, int64_t* indices, int64_t* products) {
    auto& [memory, found, likely, close, others, likely_end, others_end, looked_at, bounds, least] = scratch;
    const int64_t F = screen.n_latents, stride = keys_per_row(F), n_groups = groups(F, k);
    likely.clear(), close.clear(), others.clear();
    for (int64_t i = 0; i < n_rows; i++) {
        const Shorts bound = shorts(bounds[i] = kth_largest(maxima + i * n_groups, n_groups, k));
        int64_t n = 0;
        const auto take = [&](int64_t j) {
            if (n++ < most) likely.add({static_cast<int32_t>(i), static_cast<int32_t>(j), 0});
        };
        scan_keys(keys + i * stride, F, [=](int64_t) { return bound; }, take);
        products[i] = n;
        likely_end[i] = likely.size();
    }
    compute(screen, weights, x, likely);
    for (int64_t i = 0, l = 0; i < n_rows; i++) {
        found.n = 0;
        for (; l < likely_end[i]; l++) found.keys[found.n++] = key_of(screen.gate(likely[l].h, likely[l].latent));
        const int32_t reached = kth_largest(found.keys, found.n, k);
        least[i] = float_of(reached);
        const int64_t before = close.size(), room = most - products[i];
        const int16_t bound = bounds[i], key = static_cast<int16_t>(reached >> 16), lowest = key > 0 ? key : 1;
        int64_t n = 0;
        const auto take = [&](int64_t j) {
            if (keys[i * stride + j] < bound && n++ < room) close.add({static_cast<int32_t>(i), static_cast<int32_t>(j), 0});
        };
        if (lowest < bound && room >= 0) scan_keys(keys + i * stride, F, [=](int64_t) { return shorts(lowest); }, take);
        looked_at[i] = close.size() - before;
        products[i] = n > room ? -1 : products[i] + n;
    }
    if (rows.records) bound(screen, weights, rows, close);
    for (int64_t i = 0, c = 0; i < n_rows; i++) {
        for (const int64_t end = c + looked_at[i]; c < end; c++) {
            if (!rows.records || !(screen.gate(close[c].h, close[c].latent) < least[i])) others.add(close[c]);
        }
        others_end[i] = others.size();
    }
    compute(screen, weights, x, others);
    for (int64_t i = 0, l = 0, o = 0; i < n_rows; i++) {
        const int64_t l_end = likely_end[i], o_end = others_end[i];
        found.n = 0;
        while (l < l_end || o < o_end) {
            const bool from_likely = o == o_end || (l < l_end && likely[l].latent < others[o].latent);
            const Pair& pair = from_likely ? likely[l++] : others[o++];
            const int32_t key = key_of(screen.gate(pair.h, pair.latent));
            found.keys[found.n] = key;
            found.values[found.n] = pair.h;
            found.latents[found.n] = pair.latent;
            found.n += key > 0;
        }
        if (products[i] >= 0) take_largest(found, k, values + i * k, indices + i * k);
    }
}

}  // namespace

extern "C" {

// Of W [D, F]: its transpose, m W + b, W rounded to bfloat16, and for each latent |w~| and |w - w~|.
void lm_saes_screen_weights(
    const float* W, const float* bias, const float* centre, int64_t width, int64_t n_latents, float* transposed, float* centred, uint16_t* rounded,
    float* norms, float* errors, int threads) {
    for_pieces(n_latents, LATENTS, threads, [=](int64_t begin, int64_t end) {
        float block[LINE][LATENTS];
        for (int64_t first = begin; first < end; first += LATENTS) {
            const int64_t n = first + LATENTS < end ? LATENTS : end - first;
            Floats products[LATENTS / LANES] = {}, squares[LATENTS / LANES] = {}, errors_squared[LATENTS / LANES] = {};
            for (int64_t top = 0; top < width; top += LINE) {
                const int64_t n_lines = top + LINE < width ? LINE : width - top;
                for (int64_t i = 0; i < n_lines; i++) {
                    const float* const from = W + (top + i) * n_latents + first;
                    if (top + i + LINE < width) {
                        for (int64_t l = 0; l < n; l += LINE) __builtin_prefetch(from + LINE * n_latents + l);
                    }
                    if (n == LATENTS) {
                        for (int64_t l = 0; l < n; l += LANES) store(block[i] + l, load(from + l));
                    } else {
                        for (int64_t l = 0; l < LATENTS; l++) block[i][l] = l < n ? from[l] : 0;
                    }
                    uint16_t halves[LATENTS];
                    for (int64_t l = 0; l < LATENTS; l += LANES) {
                        const Floats w = load(block[i] + l), w_rounded = to_bfloat16(w), error = w - w_rounded;
                        products[l / LANES] += centre[top + i] * w;
                        squares[l / LANES] += w_rounded * w_rounded;
                        errors_squared[l / LANES] += error * error;
                        store_bfloat16(halves + l, w_rounded);
                    }
                    memcpy(rounded + (top + i) * n_latents + first, halves, sizeof(uint16_t) * static_cast<size_t>(n));
                }
                for (int64_t l = 0; l < n; l++) {
                    float* const to = transposed + (first + l) * width + top;
                    for (int64_t i = 0; i < n_lines; i++) to[i] = block[i][l];
                }
            }
            for (int64_t l = 0; l < n; l++) {
                centred[first + l] = products[l / LANES][l % LANES] + bias[first + l];
                norms[first + l] = norm_of(squares[l / LANES][l % LANES], width);
                errors[first + l] = norm_of(errors_squared[l / LANES][l % LANES], width);
            }
        }
    });
}

// Of y = x - m, for x [n, D] and m [D]: y rounded to bfloat16, and for each row |y| and |y - y~|.
void lm_saes_screen_rows(
    const float* x, const float* centre, int64_t n_rows, int64_t width, uint16_t* rounded, float* norms, float* errors, int threads) {
    for_pieces(n_rows, ROWS, threads, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const float* const row = x + i * width;
            Floats squares = {}, errors_squared = {};
            for (int64_t d = 0; d < width; d += LANES) {
                const bool tail = d + LANES > width;
                const Floats y = tail ? load_tail(row + d, width - d) - load_tail(centre + d, width - d) : load(row + d) - load(centre + d);
                const Floats y_rounded = to_bfloat16(y), error = y - y_rounded;
                squares += y * y;
                errors_squared += error * error;
                uint16_t halves[LANES];
                store_bfloat16(halves, y_rounded);
                memcpy(rounded + i * width + d, halves, sizeof(uint16_t) * static_cast<size_t>(tail ? width - d : LANES));
            }
            norms[i] = norm_of(sum(squares), width);
            errors[i] = norm_of(sum(errors_squared), width);
        }
    });
}

// What a product [n, F] in bfloat16 says: keys [n, whole panels] and maxima [n, groups] for `k` entries.
void lm_saes_screen_bounds(
    const uint16_t* product, const float* row_norms, const float* row_errors, const float* norms, const float* errors, const float* centred,
    const float* gate_norm, float centre, int64_t n_rows, int64_t width, int64_t n_latents, int64_t k, int16_t* keys, int16_t* maxima, int threads) {
    const Screen screen{norms, errors, centred, gate_norm, centre, width, n_latents};
    const int64_t per_group = panels_per_group(n_latents, k), stride = keys_per_row(n_latents), n_groups = groups(n_latents, k);
    for_pieces(n_rows, ROWS, threads, [=, &screen](int64_t begin, int64_t end) {
        for (int64_t panel = 0; panel < n_panels(n_latents); panel++) {
            const Panel latents(screen, panel);
            const int64_t left = n_latents - panel * PANEL;
            for (int64_t i = begin; i < end; i++) {
                const uint16_t* const from = product + i * n_latents + panel * PANEL;
                uint16_t last[PANEL] = {};
                if (left < PANEL) memcpy(last, from, sizeof(uint16_t) * static_cast<size_t>(left));
                latents.bound(
                    [=, &last](int64_t v) { return load_bfloat16((left < PANEL ? last : from) + v * LANES); }, factors_of(screen, row_norms[i], row_errors[i]),
                    BFLOAT16_ROUNDING, panel % per_group == 0, keys + i * stride + panel * PANEL, maxima + i * n_groups + panel / per_group * PANEL);
            }
        }
    });
}

// How many maxima of a row `k` entries take.
int64_t lm_saes_groups(int64_t n_latents, int64_t k) { return groups(n_latents, k); }

// The k largest of each row as `lm_saes_topk` gives them, and how many entries of each row were computed one by one; -1: the row is left undone.
void lm_saes_screened_topk(
    const float* x, const float* row_norms, const float* row_errors, const uint8_t* row_records, const int16_t* keys, const int16_t* maxima,
    const float* transposed, const uint8_t* records, const float* bias, const float* norms, const float* errors, const float* centred,
    const float* gate_norm, float centre, int64_t n_rows, int64_t width, int64_t n_latents, int64_t k, int64_t most, float* values, int64_t* indices,
    int64_t* products, int threads) {
    const Screen screen{norms, errors, centred, gate_norm, centre, width, n_latents};
    const Weights weights{transposed, bias, records};
    const Rows rows{row_norms, row_errors, row_records};
    const int64_t stride = keys_per_row(n_latents), n_groups = groups(n_latents, k);
    for_pieces(n_rows, rows_at_a_time(n_rows, threads), threads, [=, &screen](int64_t begin, int64_t end) {
        Scratch scratch(n_latents);
        for (int64_t i = begin; i < end; i += BLOCK) {
            topk_rows(
                screen, weights, rows.from(i, width), keys + i * stride, maxima + i * n_groups, x + i * width, end - i < BLOCK ? end - i : BLOCK, k, most,
                scratch, values + i * k, indices + i * k, products + i);
        }
    });
}

// How many entries of each row reach the keys of the floors [whole panels].
void lm_saes_screened_count(const int16_t* keys, const int16_t* floors, int64_t n_rows, int64_t n_latents, int64_t* counts, int threads) {
    for_pieces(n_rows, ROWS, threads, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            int64_t n = 0;
            scan_keys(keys + i * keys_per_row(n_latents), n_latents, [=](int64_t j) { return load(floors + j); }, [&](int64_t) { n++; });
            counts[i] = n;
        }
    });
}

// Those of them with q > floor and h > 0, from offsets[i] on, and how many; `floor_keys` are those of the floors, or of the one floor. Rows with
// skip[i] are left alone.
void lm_saes_screened_above(
    const float* x, const float* row_norms, const float* row_errors, const uint8_t* row_records, const int16_t* keys, const float* transposed,
    const uint8_t* records, const float* bias, const float* norms, const float* errors, const float* centred, const float* gate_norm, float centre,
    const int16_t* floor_keys, const float* floors, float floor, int64_t n_rows, int64_t width, int64_t n_latents, const uint8_t* skip,
    const int64_t* offsets, int64_t* counts, int64_t* indices, float* values, float* gates, int threads) {
    const Screen screen{norms, errors, centred, gate_norm, centre, width, n_latents};
    const Weights weights{transposed, bias, records};
    const Rows rows{row_norms, row_errors, row_records};
    for_pieces(n_rows, rows_at_a_time(n_rows, threads), threads, [=, &screen](int64_t begin, int64_t end) {
        Pairs possible, chosen;
        for (int64_t top = begin; top < end; top += BLOCK) {
            const int64_t stop = top + BLOCK < end ? top + BLOCK : end;
            possible.clear(), chosen.clear();
            for (int64_t i = top; i < stop; i++) {
                if (skip[i]) continue;
                scan_keys(keys + i * keys_per_row(n_latents), n_latents, [=](int64_t j) { return load(floor_keys + j); }, [&](int64_t j) {
                    possible.add({static_cast<int32_t>(i - top), static_cast<int32_t>(j), 0});
                });
            }
            const auto floor_of = [&](const Pair& pair) { return floors ? floors[pair.latent] : floor; };
            if (row_records) {
                bound(screen, weights, rows.from(top, width), possible);
                for (int64_t c = 0; c < possible.size(); c++) {
                    const Pair& pair = possible[c];
                    if (!(pair.h <= 0 || screen.gate(pair.h, pair.latent) <= floor_of(pair))) chosen.add(pair);
                }
            }
            const Pairs& wanted = row_records ? chosen : possible;
            compute(screen, weights, x + top * width, wanted);
            for (int64_t i = top, c = 0; i < stop; i++) {
                if (skip[i]) continue;
                int64_t at = offsets[i];
                for (; c < wanted.size() && wanted[c].row == i - top; c++) {
                    const float h = wanted[c].h, q = screen.gate(h, wanted[c].latent);
                    if (!(q > floor_of(wanted[c]) && h > 0)) continue;
                    indices[at] = wanted[c].latent;
                    values[at] = h;
                    gates[at++] = q;
                }
                counts[i] = at - offsets[i];
            }
        }
    });
}

// Moves the counts[i] entries of each row from offsets[i] to where those of the row before end.
void lm_saes_close_gaps(const int64_t* offsets, const int64_t* counts, int64_t n_rows, int64_t* indices, float* values, float* gates, int) {
    int64_t at = 0;
    for (int64_t i = 0; i < n_rows; i++) {
        const size_t n = static_cast<size_t>(counts[i]);
        if (at != offsets[i]) {
            memmove(indices + at, indices + offsets[i], n * sizeof *indices);
            memmove(values + at, values + offsets[i], n * sizeof *values);
            memmove(gates + at, gates + offsets[i], n * sizeof *gates);
        }
        at += counts[i];
    }
}
}
