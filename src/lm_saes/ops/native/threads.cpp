#include "threads.h"

#include <pthread.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

using ParallelRegion = void (*)(Task, void*, unsigned threads, unsigned flags);
ParallelRegion parallel_region = nullptr;

struct Start {
    Task task;
    void* argument;
};

void* start(void* argument) {
    const Start& what = *static_cast<Start*>(argument);
    what.task(what.argument);
    return nullptr;
}

}  // namespace

void run_on_threads(Task task, void* argument, int threads) {
    if (parallel_region) {
        parallel_region(task, argument, static_cast<unsigned>(threads), 0);
        return;
    }
    constexpr int MOST = 256;
    pthread_t others[MOST];
    Start what{task, argument};
    int started = 0;
    while (started < threads - 1 && started < MOST && pthread_create(&others[started], nullptr, start, &what) == 0) started++;
    task(argument);
    for (int i = 0; i < started; i++) pthread_join(others[i], nullptr);
}

extern "C" {

// What these kernels were compiled from; the binding compares it with the sources it finds.
const char* lm_saes_sources() { return LM_SAES_SOURCES; }

void lm_saes_use_runtime(void* gomp_parallel) { parallel_region = reinterpret_cast<ParallelRegion>(gomp_parallel); }

// What this processor and its operating system can run: bit 0 AVX2 and FMA, bit 1 AVX-512 (F, BW, CD, DQ, VL, VNNI),
// bit 2 bfloat16 products worth having (AMX, or AVX512_BF16 on AMD: on Intel without AMX they are no faster than float32), bit 3 AMX.
int lm_saes_features() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    int features = 0;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) features |= 1;
    if ((features & 1) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
        features |= 2;
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool avx512_bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
    const bool amx_bf16 = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & (1u << 22));
    if ((features & 2) && (amx_bf16 || (avx512_bf16 && __builtin_cpu_is("amd")))) features |= 4;
    if ((features & 2) && amx_bf16) features |= 8;
    return features;
#else
    return 0;
#endif
}
}
