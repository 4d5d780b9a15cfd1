// Screening: a product in bfloat16 says which entries could be selected (screen.h), and those are computed in float32, one by one.
//
// Where a bound is not finite the entry is a candidate; a row with too many candidates is left to the caller. So the entries selected
// are those that float32 selects, with the values that it gives, whatever the numbers are.

#include "products.h"
#include "threads.h"

namespace {

constexpr int64_t LATENTS = 64;  // that a thread rounds and transposes at a time: whole lines of W, and a block that stays in cache

constexpr int64_t BLOCK = 240;  // rows that a thread takes at a time, at most: they stay in its cache while what they want is computed

// So many that each thread has something to do.
inline int64_t rows_at_a_time(int64_t n_rows, int threads) {
    const int64_t share = (n_rows + threads - 1) / threads;
    return share < ROWS ? ROWS : share < BLOCK ? share : BLOCK;
}

// The candidates of a row, by ascending latent, and what is known of those of a block of rows.
struct Scratch {
    explicit Scratch(const Screen& screen) {
        const size_t room = static_cast<size_t>(screen.n_latents + LANES);
        memory = static_cast<int32_t*>(malloc(4 * sizeof(int32_t) * room));
        found = {memory, memory + room, reinterpret_cast<float*>(memory + 2 * room), 0};
        bounds = reinterpret_cast<float*>(memory + 3 * room);
    }
    ~Scratch() { free(memory); }
    Scratch(const Scratch&) = delete;

    int32_t* memory;
    Candidates found;
    float* bounds;  // the largest gate value that a candidate may have

    Pairs likely, unlikely, close, others;
    int64_t likely_end[BLOCK], unlikely_end[BLOCK], others_end[BLOCK], looked_at[BLOCK];
    float least[BLOCK];
};

// Candidates of one row by ascending latent, with their bounds, and in place of keys those of the approximate gate values.
// Returns how many there are, which may be more than `most` that it keeps.
int64_t find_candidates(const Row& row, int64_t k, int64_t most, Scratch& scratch) {
    const int64_t F = row.screen.n_latents;
    const auto lower = [&](auto tail, int64_t j) {
        constexpr bool TAIL = decltype(tail)::value;
        return row.gate<TAIL>(row.h<-1, TAIL>(j), j);
    };
    const int64_t groups = group_maxima(F, GROUPS_PER_ENTRY * k, lower, scratch.found.keys);
    const int32_t reached = kth_largest(scratch.found.keys, groups, k, k / 16);
    const Floats least = float_of(reached > 0 ? reached : 1) - Floats{};
    int64_t n = 0;
    const auto possible = [&](auto tail, int64_t j) {
        constexpr bool TAIL = decltype(tail)::value;
        return ~(row.gate<TAIL>(row.h<1, TAIL>(j), j) < least);
    };
    scan(F, possible, [&](int64_t j) {
        if (n < most) {
            scratch.found.latents[n] = static_cast<int32_t>(j);
            scratch.found.keys[n] = key_of(row.gate(row.h<0>(j), j));
            scratch.bounds[n] = row.gate(row.h<1>(j), j);
        }
        n++;
    });
    return n;
}

// The k largest of some rows; how many entries of each were computed one by one, or -1 if there were more candidates than `most`.
//
// First come the products that are largest as far as one knows. The least of their gate values is a bound that few of the others may reach, and
// these follow.
void topk_rows(
    const Screen& screen, const Rows& rows, const uint16_t* product, const float* x, int64_t n_rows, int64_t k, int64_t most, Scratch& scratch,
    float* values, int64_t* indices, int64_t* products) {
    auto& [memory, found, bounds, likely, unlikely, close, others, likely_end, unlikely_end, others_end, looked_at, least] = scratch;
    likely.clear(), unlikely.clear(), close.clear(), others.clear();
    for (int64_t i = 0; i < n_rows; i++) {
        const int64_t n = find_candidates(Row(screen, product + i * screen.n_latents, rows.norms[i], rows.errors[i]), k, most, scratch);
        products[i] = n > most ? -1 : 0;
        if (n <= most) {
            for (int64_t c = n; c < padded(n); c++) found.keys[c] = 0;
            const int32_t bound = n > k ? kth_largest(found.keys, padded(n), k, 0) : 0;
            for (int64_t c = 0; c < n; c++) {
                (found.keys[c] >= bound ? likely : unlikely).add({static_cast<int32_t>(i), found.latents[c], bounds[c]});
            }
        }
        likely_end[i] = likely.size();
        unlikely_end[i] = unlikely.size();
    }
    compute(screen, x, likely);
    for (int64_t i = 0, l = 0, u = 0; i < n_rows; i++) {
        least[i] = u < unlikely_end[i] ? __builtin_inff() : 0;
        for (; l < likely_end[i]; l++) {
            const float q = screen.gate(likely[l].h, likely[l].latent);
            least[i] = q > 0 ? (q < least[i] ? q : least[i]) : 0;
        }
        const int64_t before = close.size();
        for (; u < unlikely_end[i]; u++) {
            if (!(unlikely[u].h < least[i])) close.add(unlikely[u]);
        }
        looked_at[i] = close.size() - before;
    }
    if (rows.records) bound(screen, rows, close);
    for (int64_t i = 0, c = 0; i < n_rows; i++) {
        for (const int64_t end = c + looked_at[i]; c < end; c++) {
            if (!rows.records || !(screen.gate(close[c].h, close[c].latent) < least[i])) others.add(close[c]);
        }
        others_end[i] = others.size();
    }
    compute(screen, x, others);
    for (int64_t i = 0, l = 0, o = 0; i < n_rows; i++) {
        const int64_t l_end = likely_end[i], o_end = others_end[i];
        if (products[i] < 0) continue;
        products[i] = l_end - l + looked_at[i];
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
        take_largest(found, k, values + i * k, indices + i * k);
    }
}

// What `above` looks for: q > floor and h > 0, with one floor or one for each latent. Calls found(j) for all that may be.
template <class Found>
void find_possible(const Row& row, const float* floors, float floor, const Found& found) {
    const int64_t F = row.screen.n_latents;
    const auto possible = [&](auto tail, int64_t j) {
        constexpr bool TAIL = decltype(tail)::value;
        const Floats h = row.h<1, TAIL>(j);
        return ~((row.gate<TAIL>(h, j) <= (floors ? read<TAIL>(floors, j, F) : floor - Floats{})) | (h <= Floats{}));
    };
    scan(F, possible, found);
}

}  // namespace

extern "C" {

// Of W [D, F]: its transpose, W rounded to bfloat16, and for each latent |w~| and |w - w~|.
void lm_saes_screen_weights(
    const float* W, int64_t width, int64_t n_latents, float* transposed, uint16_t* rounded, float* norms, float* errors, int threads) {
    for_pieces(n_latents, LATENTS, threads, [=](int64_t begin, int64_t end) {
        float block[LINE][LATENTS];
        for (int64_t first = begin; first < end; first += LATENTS) {
            const int64_t n = first + LATENTS < end ? LATENTS : end - first;
            Floats squares[LATENTS / LANES] = {}, errors_squared[LATENTS / LANES] = {};
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

// The k largest of each row as `lm_saes_topk` gives them, and how many entries of each row were computed one by one; -1: the row is left undone.
void lm_saes_screened_topk(
    const float* x, const float* row_norms, const float* row_errors, const uint8_t* row_records, const uint16_t* product, const float* transposed,
    const uint8_t* records, const float* norms, const float* errors, const float* bias, const float* centred, const float* gate_norm, float centre,
    int64_t n_rows, int64_t width, int64_t n_latents, int64_t k, int64_t most, float* values, int64_t* indices, int64_t* products, int threads) {
    const Screen screen{transposed, norms, errors, bias, centred, gate_norm, records, centre, width, n_latents};
    const Rows rows{row_norms, row_errors, row_records};
    for_pieces(n_rows, rows_at_a_time(n_rows, threads), threads, [=, &screen](int64_t begin, int64_t end) {
        Scratch scratch(screen);
        for (int64_t i = begin; i < end; i += BLOCK) {
            const int64_t n = end - i < BLOCK ? end - i : BLOCK;
            topk_rows(
                screen, rows.from(i, width), product + i * n_latents, x + i * width, n, k, most, scratch, values + i * k, indices + i * k,
                products + i);
        }
    });
}

// How many entries of each row may be above the floor.
void lm_saes_screened_count(
    const float* row_norms, const float* row_errors, const uint16_t* product, const float* norms, const float* errors, const float* bias,
    const float* centred, const float* gate_norm, float centre, const float* floors, float floor, int64_t n_rows, int64_t width, int64_t n_latents,
    int64_t* counts, int threads) {
    const Screen screen{nullptr, norms, errors, bias, centred, gate_norm, nullptr, centre, width, n_latents};
    for_pieces(n_rows, ROWS, threads, [=, &screen](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            int64_t n = 0;
            find_possible(Row(screen, product + i * n_latents, row_norms[i], row_errors[i]), floors, floor, [&](int64_t) { n++; });
            counts[i] = n;
        }
    });
}

// Those that are, from offsets[i] on, and how many. Rows with skip[i] are left alone.
void lm_saes_screened_above(
    const float* x, const float* row_norms, const float* row_errors, const uint8_t* row_records, const uint16_t* product, const float* transposed,
    const uint8_t* records, const float* norms, const float* errors, const float* bias, const float* centred, const float* gate_norm, float centre,
    const float* floors, float floor, int64_t n_rows, int64_t width, int64_t n_latents, const uint8_t* skip, const int64_t* offsets, int64_t* counts,
    int64_t* indices, float* values, float* gates, int threads) {
    const Screen screen{transposed, norms, errors, bias, centred, gate_norm, records, centre, width, n_latents};
    const Rows rows{row_norms, row_errors, row_records};
    for_pieces(n_rows, rows_at_a_time(n_rows, threads), threads, [=, &screen](int64_t begin, int64_t end) {
        Pairs possible, chosen;
        for (int64_t top = begin; top < end; top += BLOCK) {
            const int64_t stop = top + BLOCK < end ? top + BLOCK : end;
            possible.clear(), chosen.clear();
            for (int64_t i = top; i < stop; i++) {
                if (skip[i]) continue;
                const Row row(screen, product + i * n_latents, row_norms[i], row_errors[i]);
                find_possible(row, floors, floor, [&](int64_t j) { possible.add({static_cast<int32_t>(i - top), static_cast<int32_t>(j), 0}); });
            }
            const auto floor_of = [&](const Pair& pair) { return floors ? floors[pair.latent] : floor; };
            if (row_records) {
                bound(screen, rows.from(top, width), possible);
                for (int64_t c = 0; c < possible.size(); c++) {
                    const Pair& pair = possible[c];
                    if (!(pair.h <= 0 || screen.gate(pair.h, pair.latent) <= floor_of(pair))) chosen.add(pair);
                }
            }
            const Pairs& wanted = row_records ? chosen : possible;
            compute(screen, x + top * width, wanted);
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
