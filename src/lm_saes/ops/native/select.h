// What selection from exact gate values (select.cpp) and from bounds of them (screen.cpp) share.
//
// Positive floats are ordered like their bits read as integers: their keys. Numbers that are not positive, and NaN, have the key 0
// and are never selected.
#pragma once

#include "vector.h"

namespace {

constexpr int64_t ROWS = 16;             // that a thread takes at a time
constexpr int64_t GROUPS_PER_ENTRY = 8;  // group maxima for each entry wanted: more are slower, fewer give a looser bound

inline int32_t key_of(float q) {
    int32_t key = 0;
    if (q > 0) memcpy(&key, &q, sizeof key);
    return key;
}

inline float float_of(int32_t key) {
    float q;
    memcpy(&q, &key, sizeof q);
    return q;
}

// A bound that at least k of the n keys reach (n a multiple of LANES, k <= n), and no more than k + slack where keys differ: between the k-th and the
// next if slack is 0. By bisection: a few dozen counts, and no branch that depends on single keys.
inline int32_t kth_largest(const int32_t* keys, int64_t n, int64_t k, int64_t slack) {
    int32_t low = 0, high = INT32_MAX;  // at least k keys reach `low`, fewer reach `high`
    while (high - low > 1) {
        const int32_t middle = low + (high - low) / 2;
        Ints counts = {};
        for (int64_t i = 0; i < n; i += LANES) counts -= load(keys + i) >= middle;
        const int64_t count = sum(counts);
        if (count < k) {
            high = middle;
        } else {
            low = middle;
            if (count <= k + slack) break;
        }
    }
    return low;
}

inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// Entries of a row that may be selected, by ascending latent. There is room for a vector more than there are latents.
struct Candidates {
    int32_t* keys;     // of the gate values
    int32_t* latents;
    float* values;     // h
    int64_t n;
};

// The k candidates of largest key, of equal ones the first; then, if there are fewer than k, zeros at the first latents that are left.
inline void take_largest(const Candidates& found, int64_t k, float* values, int64_t* indices) {
    int32_t bound = 0;
    int64_t equal = 0;  // how many of those at the bound are taken
    if (found.n > k) {
        for (int64_t i = found.n; i < padded(found.n); i++) found.keys[i] = 0;
        bound = kth_largest(found.keys, padded(found.n), k, 0);
        equal = k;
        for (int64_t i = 0; i < found.n; i++) equal -= found.keys[i] > bound;
    }
    int64_t taken = 0;
    for (int64_t i = 0; i < found.n; i++) {
        if (found.keys[i] > bound || (found.keys[i] == bound && equal-- > 0)) {
            indices[taken] = found.latents[i];
            values[taken++] = found.values[i];
        }
    }
    for (int64_t latent = 0, next = 0, n = taken; taken < k; latent++) {
        if (next < n && indices[next] == latent) {
            next++;
            continue;
        }
        indices[taken] = latent;
        values[taken++] = 0;
    }
}

}  // namespace
