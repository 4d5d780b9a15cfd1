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
    explicit Scratch(const Screen& screen) : likely(screen), others(screen) {
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

    struct Unlikely {
        int32_t latent;
        float bound;
    };
    Products likely, others;
    List<Unlikely> unlikely;
    int64_t likely_end[BLOCK], unlikely_end[BLOCK], others_end[BLOCK];
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

// The k largest of some rows; how many products each took, or -1 if there were more candidates than `most`.
//
// First those products are made that are largest as far as one knows. The least of their gate values is a bound that few of the others may reach,
// and these are made then.
template <class RowOf>
void topk_rows(
    const Screen& screen, const RowOf& row_of, const float* x, int64_t n_rows, int64_t k, int64_t most, Scratch& scratch, float* values,
    int64_t* indices, int64_t* products) {
    Candidates& found = scratch.found;
    scratch.likely.clear(), scratch.others.clear(), scratch.unlikely.clear();
    for (int64_t i = 0; i < n_rows; i++) {
        const int64_t n = find_candidates(row_of(i), k, most, scratch);
        products[i] = n > most ? -1 : 0;
        if (n <= most) {
            for (int64_t c = n; c < padded(n); c++) found.keys[c] = 0;
            const int32_t bound = n > k ? kth_largest(found.keys, padded(n), k, 0) : 0;
            for (int64_t c = 0; c < n; c++) {
                if (found.keys[c] >= bound) {
                    scratch.likely.want(i, found.latents[c]);
                } else {
                    scratch.unlikely.add({found.latents[c], scratch.bounds[c]});
                }
            }
        }
        scratch.likely_end[i] = scratch.likely.size();
        scratch.unlikely_end[i] = scratch.unlikely.size();
    }
    scratch.likely.compute(x);
    for (int64_t i = 0, l = 0, u = 0; i < n_rows; i++) {
        float least = u < scratch.unlikely_end[i] ? __builtin_inff() : 0;
        for (; l < scratch.likely_end[i]; l++) {
            const float q = screen.gate(scratch.likely.h(l), scratch.likely.latent(l));
            least = q > 0 ? (q < least ? q : least) : 0;
        }
        for (; u < scratch.unlikely_end[i]; u++) {
            if (!(scratch.unlikely[u].bound < least)) scratch.others.want(i, scratch.unlikely[u].latent);
        }
        scratch.others_end[i] = scratch.others.size();
    }
    scratch.others.compute(x);
    for (int64_t i = 0, l = 0, o = 0; i < n_rows; i++) {
        const int64_t l_end = scratch.likely_end[i], o_end = scratch.others_end[i];
        if (products[i] < 0) continue;
        products[i] = l_end - l + o_end - o;
        found.n = 0;
        while (l < l_end || o < o_end) {
            const bool from_likely = o == o_end || (l < l_end && scratch.likely.latent(l) < scratch.others.latent(o));
            const int32_t latent = from_likely ? scratch.likely.latent(l) : scratch.others.latent(o);
            const float h = from_likely ? scratch.likely.h(l++) : scratch.others.h(o++);
            const int32_t key = key_of(screen.gate(h, latent));
            found.keys[found.n] = key;
            found.values[found.n] = h;
            found.latents[found.n] = latent;
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

// The k largest of each row as `lm_saes_topk` gives them, and how many products in float32 each row took; -1: the row is left undone.
void lm_saes_screened_topk(
    const float* x, const float* row_norms, const float* row_errors, const uint16_t* product, const float* transposed, const float* norms,
    const float* errors, const float* bias, const float* centred, const float* gate_norm, float centre, int64_t n_rows, int64_t width,
    int64_t n_latents, int64_t k, int64_t most, float* values, int64_t* indices, int64_t* products, int threads) {
    const Screen screen{transposed, norms, errors, bias, centred, gate_norm, centre, width, n_latents};
    for_pieces(n_rows, rows_at_a_time(n_rows, threads), threads, [=, &screen](int64_t begin, int64_t end) {
        Scratch scratch(screen);
        for (int64_t i = begin; i < end; i += BLOCK) {
            const int64_t n = end - i < BLOCK ? end - i : BLOCK;
            const auto row = [&](int64_t r) { return Row(screen, product + (i + r) * n_latents, row_norms[i + r], row_errors[i + r]); };
            topk_rows(screen, row, x + i * width, n, k, most, scratch, values + i * k, indices + i * k, products + i);
        }
    });
}

// How many entries of each row may be above the floor.
void lm_saes_screened_count(
    const float* row_norms, const float* row_errors, const uint16_t* product, const float* norms, const float* errors, const float* bias,
    const float* centred, const float* gate_norm, float centre, const float* floors, float floor, int64_t n_rows, int64_t width, int64_t n_latents,
    int64_t* counts, int threads) {
    const Screen screen{nullptr, norms, errors, bias, centred, gate_norm, centre, width, n_latents};
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
    const float* x, const float* row_norms, const float* row_errors, const uint16_t* product, const float* transposed, const float* norms,
    const float* errors, const float* bias, const float* centred, const float* gate_norm, float centre, const float* floors, float floor,
    int64_t n_rows, int64_t width, int64_t n_latents, const uint8_t* skip, const int64_t* offsets, int64_t* counts, int64_t* indices,
    float* values, float* gates, int threads) {
    const Screen screen{transposed, norms, errors, bias, centred, gate_norm, centre, width, n_latents};
    for_pieces(n_rows, rows_at_a_time(n_rows, threads), threads, [=, &screen](int64_t begin, int64_t end) {
        Products possible(screen);
        for (int64_t top = begin; top < end; top += BLOCK) {
            const int64_t stop = top + BLOCK < end ? top + BLOCK : end;
            possible.clear();
            int64_t ends[BLOCK];
            for (int64_t i = top; i < stop; i++) {
                const Row row(screen, product + i * n_latents, row_norms[i], row_errors[i]);
                if (!skip[i]) find_possible(row, floors, floor, [&](int64_t j) { possible.want(i - top, j); });
                ends[i - top] = possible.size();
            }
            possible.compute(x + top * width);
            for (int64_t i = top, c = 0; i < stop; i++) {
                if (skip[i]) continue;
                int64_t at = offsets[i];
                for (; c < ends[i - top]; c++) {
                    const int64_t j = possible.latent(c);
                    const float h = possible.h(c), q = screen.gate(h, j);
                    if (!(q > (floors ? floors[j] : floor) && h > 0)) continue;
                    indices[at] = j;
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
