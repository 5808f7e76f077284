// N:M selection on the CPU, C ABI, no torch headers. The contract is the one in reference.py.
//
// A dense weight of any memory format is (outer, m, inner) in memory order: a group is the m entries at a fixed
// (outer, inner), `inner` elements apart. Linear and channels_last weights have inner = 1, OIHW ones kh * kw.
//
// Magnitudes are compared as integers, the bits without the sign, so one code serves every float type of a width.
// A tile of groups is turned into m rows of keys; all pairs of rows are compared, with no branch and no sort, and each
// entry's rank is the number of entries that beat it.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__) && defined(__GLIBC__)
// One portable binary that uses the vectors of the machine it runs on.
#define EVERY_MACHINE __attribute__((target_clones("avx2", "default")))
#else
#define EVERY_MACHINE
#endif

namespace {

enum Result { KEEP, MASK, ADD_DROPPED };

struct Task {
    const void* w;
    void* out;
    int64_t outer, inner;
    int n;
    int nan_key;  // the key of every NaN: infinity's bits + 1
    float scale;
};

inline __attribute__((always_inline)) float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <class Bits> constexpr int tile_groups(int m) { return (m <= 8 ? 1024 : m == 16 ? 512 : 256) / int(sizeof(Bits)); }

template <int M, class Bits, class Key, Result RESULT>
inline __attribute__((always_inline)) void tile(const Task& task, int64_t a0, int na, int64_t b0, int nb) {
    constexpr int T = tile_groups<Bits>(M);
    constexpr Bits SIGN = Bits(Bits(1) << (8 * sizeof(Bits) - 1));
    alignas(64) Key key[M][T];
    alignas(64) Key rank[M][T];
    const int64_t inner = task.inner, start = a0 * M * inner + b0;
    const Bits* __restrict w = static_cast<const Bits*>(task.w) + start;
    const Key nan_key = Key(task.nan_key), n = Key(task.n);
    // Visits the entries in memory order: entry j of the tile's group t lies at w[p].
    const auto lines = [na](auto inner, auto nb, auto&& visit) __attribute__((always_inline)) {
        for (int a = 0; a < na; a++)
            for (int j = 0; j < M; j++)
                for (int b = 0; b < nb; b++) visit(j, a * nb + b, (int64_t(a) * M + j) * inner + b);
    };
    const auto each = [&](auto&& visit) __attribute__((always_inline)) {
        using One = std::integral_constant<int, 1>;
        using Nine = std::integral_constant<int, 9>;
        // Loops of a known length become vector code: contiguous groups, and 3 x 3 kernels in OIHW.
        if (inner == 1) lines(One{}, One{}, visit);
        else if (inner == 9) lines(Nine{}, Nine{}, visit);
        else lines(inner, nb, visit);
    };
    each([&](int j, int t, int64_t p) { key[j][t] = std::min(Key(w[p] & Bits(~SIGN)), nan_key); });
    for (int j = 0; j < M; j++) {
        std::fill(key[j] + na * nb, key[j] + T, Key(0));
        std::fill(rank[j], rank[j] + T, Key(j));  // as if every earlier entry won
    }
    for (int i = 0; i < M; i++)
        for (int j = i + 1; j < M; j++)
            for (int t = 0; t < T; t++) {
                const Key later_wins = key[j][t] > key[i][t];
                rank[i][t] += later_wins;
                rank[j][t] -= later_wins;
            }
    for (int j = 0; j < M; j++)
        for (int t = 0; t < T; t++) rank[j][t] = -Key(rank[j][t] < n);  // all ones where kept
    if (RESULT == KEEP) {
        Bits* __restrict out = static_cast<Bits*>(task.out) + start;
        each([&](int j, int t, int64_t p) { out[p] = w[p] & Bits(rank[j][t]); });
    } else if (RESULT == MASK) {
        uint8_t* __restrict out = static_cast<uint8_t*>(task.out) + start;
        each([&](int j, int t, int64_t p) { out[p] = rank[j][t] & 1; });
    } else {
        float* __restrict out = static_cast<float*>(task.out) + start;
        each([&](int j, int t, int64_t p) { out[p] += task.scale * as_float(w[p] & ~uint32_t(rank[j][t])); });
    }
}

#define INSTANCE(NAME, M, BITS, KEY, RESULT) \
    EVERY_MACHINE void NAME(const Task& task, int64_t a0, int na, int64_t b0, int nb) { \
        tile<M, BITS, KEY, RESULT>(task, a0, na, b0, nb); \
    }
#define INSTANCES(M) \
    INSTANCE(keep4_##M, M, uint32_t, int32_t, KEEP) \
    INSTANCE(mask4_##M, M, uint32_t, int32_t, MASK) \
    INSTANCE(add4_##M, M, uint32_t, int32_t, ADD_DROPPED) \
    INSTANCE(keep2_##M, M, uint16_t, int16_t, KEEP) \
    INSTANCE(mask2_##M, M, uint16_t, int16_t, MASK)
INSTANCES(2) INSTANCES(4) INSTANCES(8) INSTANCES(16) INSTANCES(32)

using Kernel = void (*)(const Task&, int64_t, int, int64_t, int);

Kernel find(int result, int bytes, int m) {
#define CASE(M) \
    case M: \
        if (bytes == 4) return result == KEEP ? keep4_##M : result == MASK ? mask4_##M : add4_##M; \
        return result == KEEP ? keep2_##M : mask2_##M;
    switch (m) { CASE(2) CASE(4) CASE(8) CASE(16) CASE(32) }
    return nullptr;
}

}  // namespace

extern "C" int nm_select(int result, int bytes, const void* w, void* out, int64_t outer, int m, int64_t inner, int n,
                          int nan_key, float scale, int threads) {
    const Kernel kernel = find(result, bytes, m);
    if (!kernel) return 1;
    const Task task{w, out, outer, inner, n, nan_key, scale};
    const int groups = bytes == 4 ? tile_groups<uint32_t>(m) : tile_groups<uint16_t>(m);
    const int64_t nb = std::min<int64_t>(inner, groups), na = groups / nb;
    const int64_t across = (inner + nb - 1) / nb, tiles = (outer + na - 1) / na * across;
#pragma omp parallel for schedule(static) num_threads(threads) if (tiles > threads)
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t a0 = t / across * na, b0 = t % across * nb;
        kernel(task, a0, int(std::min(na, outer - a0)), b0, int(std::min(nb, inner - b0)));
    }
    return 0;
}
