// The small layer of vectors that all kernels share, on the vector extensions of GCC and Clang: one source for AVX-512, AVX2 and
// whatever else the compiler knows (SSE2 on any x86-64, NEON on arm64). Intrinsics stand only where the extensions have no word.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int REGISTERS = 16;  // accumulators that a loop may hold beside what it loads
#elif defined(__AVX2__)
constexpr int LANES = 8;
constexpr int REGISTERS = 8;
#else
constexpr int LANES = 4;
constexpr int REGISTERS = 8;
#endif
constexpr int64_t LINE = 16;  // floats in a cache line

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));  // twice as many lanes
typedef float UnalignedFloats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t UnalignedInts __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int16_t UnalignedShorts __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

inline Floats load(const float* from) { return *reinterpret_cast<const UnalignedFloats*>(from); }
inline Ints load(const int32_t* from) { return *reinterpret_cast<const UnalignedInts*>(from); }
inline Shorts load(const int16_t* from) { return *reinterpret_cast<const UnalignedShorts*>(from); }
inline Floats load_bfloat16(const uint16_t* from) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16));
#elif defined(__AVX2__)
    return reinterpret_cast<Floats>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 16));
#else
    Halves halves;
    memcpy(&halves, from, sizeof halves);
    return reinterpret_cast<Floats>(__builtin_convertvector(halves, Ints) << 16);
#endif
}
inline void store(float* to, Floats vector) { *reinterpret_cast<UnalignedFloats*>(to) = vector; }
inline void store(int32_t* to, Ints vector) { *reinterpret_cast<UnalignedInts*>(to) = vector; }
inline void store(int16_t* to, Shorts vector) { *reinterpret_cast<UnalignedShorts*>(to) = vector; }

// The last vector of a row whose length is not a multiple of LANES: `count` < LANES numbers, then `rest`.
inline Floats load_tail(const float* from, int64_t count, float rest = 0.0f) {
    Floats vector = rest - Floats{};
    for (int64_t i = 0; i < count; i++) vector[i] = from[i];
    return vector;
}
// The nearest bfloat16 (of two the even one), as floats. NaN stays NaN.
inline Floats to_bfloat16(Floats vector) {
    const Ints number = reinterpret_cast<Ints>(vector);
    const Ints rounded = (number + 0x7fff + ((number >> 16) & 1)) & ~0xffff;
    return reinterpret_cast<Floats>((vector == vector) ? rounded : number | 0x400000);
}
inline void store_bfloat16(uint16_t* to, Floats rounded) {
    const Halves halves = __builtin_convertvector((reinterpret_cast<Ints>(rounded) >> 16) & 0xffff, Halves);
    memcpy(to, &halves, sizeof halves);
}

// The larger of two numbers; `other` where `vector` is not a number.
inline Floats larger(Floats vector, Floats other) {
#if defined(__AVX512F__)
    return _mm512_max_ps(vector, other);
#elif defined(__AVX2__)
    return _mm256_max_ps(vector, other);
#else
    return vector > other ? vector : other;
#endif
}

// One bit per lane, from what a comparison returned.
inline uint64_t bits(Ints comparison) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask(reinterpret_cast<__m512i>(comparison));
#elif defined(__AVX2__)
    return static_cast<uint64_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(comparison)));
#elif defined(__SSE2__)
    return static_cast<uint64_t>(_mm_movemask_ps(reinterpret_cast<__m128>(comparison)));
#else
    uint64_t word = 0;
    for (int i = 0; i < LANES; i++) word |= static_cast<uint64_t>(comparison[i] & 1) << i;
    return word;
#endif
}

inline uint64_t bits(Shorts comparison) {
#if defined(__AVX512F__)
    return _mm512_movepi16_mask(reinterpret_cast<__m512i>(comparison));
#elif defined(__AVX2__)
    return _pext_u32(static_cast<uint32_t>(_mm256_movemask_epi8(reinterpret_cast<__m256i>(comparison))), 0x55555555);
#else
    uint64_t word = 0;
    for (int i = 0; i < 2 * LANES; i++) word |= static_cast<uint64_t>(comparison[i] & 1) << i;
    return word;
#endif
}

template <int HALF, size_t... L>
inline void exchange(Ints& top, Ints& bottom, std::index_sequence<L...>) {
    const Ints a = top, b = bottom;
    top = __builtin_shufflevector(a, b, (L & HALF ? LANES + L - HALF : L)...);
    bottom = __builtin_shufflevector(a, b, (L & HALF ? LANES + L : L + HALF)...);
}
template <int HALF = LANES / 2>
inline void transpose(Ints* block) {
    for (int i = 0; i < LANES; i++) {
        if (!(i & HALF)) exchange<HALF>(block[i], block[i + HALF], std::make_index_sequence<LANES>{});
    }
    if constexpr (HALF > 1) transpose<HALF / 2>(block);
}
// Of LANES vectors the lane l of vector i becomes the lane i of vector l.
inline void transpose(Floats* block) { transpose<>(reinterpret_cast<Ints*>(block)); }

inline Floats absolute(Floats vector) { return reinterpret_cast<Floats>(reinterpret_cast<Ints>(vector) & 0x7fffffff); }
inline float absolute(float number) { return __builtin_fabsf(number); }

inline float sum(Floats vector) {
    float numbers[LANES];
    store(numbers, vector);
    for (int half = LANES / 2; half; half /= 2) {
        for (int i = 0; i < half; i++) numbers[i] += numbers[i + half];
    }
    return numbers[0];
}

inline int64_t sum(Ints vector) {
    int64_t total = 0;
    for (int i = 0; i < LANES; i++) total += vector[i];
    return total;
}

// The scalar product of two rows, always in the same order of additions.
inline float dot(const float* left, const float* right, int64_t length) {
    Floats sums[2] = {};
    int64_t d = 0;
    for (; d + 2 * LANES <= length; d += 2 * LANES) {
        for (int v = 0; v < 2; v++) sums[v] += load(left + d + v * LANES) * load(right + d + v * LANES);
    }
    for (; d + LANES <= length; d += LANES) sums[0] += load(left + d) * load(right + d);
    if (d < length) sums[1] += load_tail(left + d, length - d) * load_tail(right + d, length - d);
    return sum(sums[0] + sums[1]);
}

// The scalar products of one row with four others, each in the order of `dot`; asks for the four that come after them.
inline void four_dots(const float* left, const float* const (&right)[4], const float* const (&coming)[4], int64_t length, float* dots) {
    Floats sums[4][2] = {};
    int64_t d = 0;
    for (; d + 2 * LANES <= length; d += 2 * LANES) {
        for (int i = 0; i < 4; i++) {
            for (int64_t line = 0; line < 2 * LANES; line += LINE) __builtin_prefetch(coming[i] + d + line);
        }
        for (int v = 0; v < 2; v++) {
            const Floats here = load(left + d + v * LANES);
            for (int i = 0; i < 4; i++) sums[i][v] += here * load(right[i] + d + v * LANES);
        }
    }
    for (; d + LANES <= length; d += LANES) {
        for (int i = 0; i < 4; i++) sums[i][0] += load(left + d) * load(right[i] + d);
    }
    if (d < length) {
        for (int i = 0; i < 4; i++) sums[i][1] += load_tail(left + d, length - d) * load_tail(right[i] + d, length - d);
    }
    for (int i = 0; i < 4; i++) dots[i] = sum(sums[i][0] + sums[i][1]);
}

// Writes a line that is not going to be read soon: past the caches, without reading it first, where the processor can.
inline void store_line(float* to, const float (&line)[LINE]) {
#if defined(__SSE2__)
    if (reinterpret_cast<uintptr_t>(to) % (LANES * sizeof(float)) == 0) {
        for (int64_t i = 0; i < LINE; i += LANES) {
#if defined(__AVX512F__)
            _mm512_stream_ps(to + i, load(line + i));
#elif defined(__AVX2__)
            _mm256_stream_ps(to + i, load(line + i));
#else
            _mm_stream_ps(to + i, load(line + i));
#endif
        }
        return;
    }
#endif
    memcpy(to, line, sizeof line);
}

// After store_line: before other threads may look.
inline void finish_lines() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

}  // namespace
