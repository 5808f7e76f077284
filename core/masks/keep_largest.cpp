// N:M selection on the CPU for many weights in one call, C ABI, no torch headers. The contract is in reference.py.
//
// A dense weight of any memory format is (outer, m, inner) in memory order: a group is the m entries at a fixed
// (outer, inner), `inner` elements apart. Linear and channels_last weights have inner = 1, OIHW ones kh * kw.
//
// Magnitudes are compared as integers, the bits without the sign, so one code serves every float type of a width.
// An entry's rank is the number of entries that beat it, all pairs compared with no branch and no sort: contiguous
// groups that fit a vector, within it; small groups side by side, a vector of them at once; others as a tile of groups
// turned into m rows of keys. Threads share the tiles of all weights evenly.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__GLIBC__)
// One portable binary that uses the vectors of the machine it runs on.
#define EVERY_MACHINE __attribute__((target_clones("avx2", "default")))
#else
#define EVERY_MACHINE
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

enum Result { KEEP, MASK, ADD_DROPPED, APPLY_MASK, SOFT };
enum Type { FLOAT32, BFLOAT16, FLOAT16 };

INLINE float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// The float types: their bits, the key of every NaN (infinity's bits + 1), and the way to fp32 and back (to the nearest,
// ties to even).

struct Float32 {
    using Bits = uint32_t;
    using Key = int32_t;
    static constexpr Key nan_key = 0x7F800001;
    static INLINE float load(Bits w) { return as_float(w); }
    static INLINE Bits round(float x) { return as_bits(x); }
};

struct BFloat16 {
    using Bits = uint16_t;
    using Key = int16_t;
    static constexpr Key nan_key = 0x7F81;
    static INLINE float load(Bits w) { return as_float(uint32_t(w) << 16); }
    static INLINE Bits round(float x) {
        const uint32_t bits = as_bits(x);
        const bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
        return Bits(nan ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    }
};

struct Float16 {
    using Bits = uint16_t;
    using Key = int16_t;
    static constexpr Key nan_key = 0x7C01;
    static INLINE float load(Bits w) {
        const uint32_t size = w & 0x7FFF, rebias = 112 << 23;
        const float subnormal = as_float(0x3F000000 + size) - 0.5f;  // 0.5 has the last place of subnormals, 2^-24
        const uint32_t normal = (size << 13) + rebias + (size >= 0x7C00 ? rebias : 0);
        return as_float((size < 0x400 ? as_bits(subnormal) : normal) | uint32_t(w & 0x8000) << 16);
    }
    static INLINE Bits round(float x) {
        // Signed integers: vectors compare them at once.
        const int32_t bits = int32_t(as_bits(x)), size = bits & 0x7FFFFFFF, infinity = 0x7C00;
        const int32_t subnormal = int32_t(as_bits(as_float(size) + 0.5f)) - 0x3F000000;
        const int32_t normal = std::min((size - (112 << 23) + 0xFFF + (size >> 13 & 1)) >> 13, infinity);
        const int32_t finite = size < 0x38800000 ? subnormal : normal;
        return Bits((size > 0x7F800000 ? 0x7E00 : finite) | (bits >> 16 & 0x8000));
    }
};

struct Weight {
    const char* w;
    char* out;
    int64_t outer, inner;
    int n;
    float scale;
};

template <class From> constexpr int tile_groups(int m) {
    return (m <= 8 ? 1024 : m == 16 ? 512 : 256) / int(sizeof(typename From::Bits));
}

constexpr int LANES = 8;  // groups side by side in a vector; the 9 of a 3 x 3 kernel take two
constexpr int STRETCH = 512;  // bytes of weights whose result is written at once; the fastest of several
constexpr int AHEAD = 2048;  // bytes further on, memory is fetched meanwhile: a core that computes reads ahead too little

template <bool TO_WRITE> INLINE void fetch(const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, TO_WRITE);
}

#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
constexpr int VECTOR = 32;

template <class Key> using Vector [[gnu::vector_size(VECTOR)]] = Key;

// Adds, in each lane, whether the entry at that lane's number exclusive or R beats it.
template <int R, class Key, int... LANE>
INLINE void beaten_by(Vector<Key>& rank, const Vector<Key>& key, std::integer_sequence<int, LANE...>) {
    const Vector<Key> other = __builtin_shufflevector(key, key, (LANE ^ R)...);
    const Vector<Key> earlier_wins_ties = {Key((LANE ^ R) < LANE)...};
    rank -= other > key - earlier_wins_ties;
}

// Turns the bits of whole groups into all ones where an entry is kept; R are 0 to m - 2.
template <class From, class Key, int... R>
INLINE void keep(Vector<Key>& bits, int n, std::integer_sequence<int, R...>) {
    constexpr Key SIZE = Key(~(Key(1) << (8 * sizeof(Key) - 1)));
    const Vector<Key> size = bits & SIZE, key = size > From::nan_key ? From::nan_key - Vector<Key>{} : size;
    Vector<Key> rank{};
    (beaten_by<R + 1, Key>(rank, key, std::make_integer_sequence<int, VECTOR / sizeof(Key)>{}), ...);
    bits = rank < Key(n);
}

// All ones into `kept` for what is kept of `count` entries of contiguous groups.
template <int M, class From> INLINE void keep_contiguous(const void* w, typename From::Key* kept, int count, int n) {
    using Key = typename From::Key;
    constexpr int WIDTH = VECTOR / sizeof(Key);
    for (int p = 0; p < count; p += WIDTH) {
        Vector<Key> groups{};
        const char* at = static_cast<const char*>(w) + p * sizeof(Key);
        if (p + WIDTH <= count) std::memcpy(&groups, at, VECTOR);
        else std::memcpy(&groups, at, (count - p) * sizeof(Key));
        keep<From, Key>(groups, n, std::make_integer_sequence<int, M - 1>{});
        std::memcpy(kept + p, &groups, VECTOR);
    }
}
#else
constexpr int VECTOR = 0;
template <int M, class From> void keep_contiguous(const void*, typename From::Key*, int, int) {}
#endif

// Groups that fit a vector where they are contiguous, and whose keys and ranks stay in registers where they lie side by
// side.
template <int M, class From> constexpr bool FITS = M * sizeof(typename From::Bits) <= VECTOR;
template <int M> constexpr bool FEW = M <= 4;

// All ones into `kept`, lines of `nb`, for what is kept of `nb` groups side by side, whose lines are `inner` apart.
template <int M, class From, int WIDTH>
INLINE void keep_side_by_side(const typename From::Bits* w, typename From::Key* kept, int64_t inner, int nb, int n) {
    using Key = typename From::Key;
    using Keys [[gnu::vector_size(WIDTH * sizeof(Key))]] = Key;
    // For memory: by memcpy a vector may be copied in halves, which whoever reads it whole has to wait for.
    using Anywhere [[gnu::vector_size(WIDTH * sizeof(Key)), gnu::aligned(1), gnu::may_alias]] = Key;
    constexpr Key SIZE = Key(~(Key(1) << (8 * sizeof(Key) - 1)));
    for (int b = 0; b < nb; b += WIDTH) {
        const int at = std::min(b, nb - WIDTH);  // the last vector takes some groups a second time
        Keys key[M], rank[M];
#pragma GCC unroll 4
        for (int j = 0; j < M; j++) {
            key[j] = *reinterpret_cast<const Anywhere*>(w + j * inner + at) & SIZE;
            key[j] = key[j] > From::nan_key ? From::nan_key - Keys{} : key[j];
            rank[j] = Key(j) - Keys{};  // as if every earlier entry won
        }
        for (int i = 0; i < M; i++)
            for (int j = i + 1; j < M; j++) {
                const Keys later_wins = key[j] > key[i];
                rank[i] -= later_wins;
                rank[j] += later_wins;
            }
        for (int j = 0; j < M; j++) {
            *reinterpret_cast<Anywhere*>(kept + j * nb + at) = rank[j] < Key(n);
        }
    }
}

// Calls `loops` with the stride between lines and their length: loops of a known length become vector code, so contiguous
// groups and 3 x 3 kernels in OIHW have theirs, where such may come.
template <bool CONTIGUOUS, bool NINE, class Loops>
INLINE void with_known_lengths(int64_t inner, int64_t stride, int nb, Loops&& loops) {
    using One = std::integral_constant<int, 1>;
    using Nine = std::integral_constant<int, 9>;
    if (CONTIGUOUS && inner == 1) loops(One{}, One{});
    else if (NINE && inner == 9) loops(Nine{}, Nine{});
    else loops(stride, nb);
}

// All ones into `kept`, in memory order, for what is kept of `na` times `nb` groups, whose lines are `inner` apart.
template <int M, class From>
INLINE void keep_tile(const typename From::Bits* __restrict w, typename From::Key* __restrict kept, int64_t inner, int na,
                      int nb, int n) {
    using Bits = typename From::Bits;
    using Key = typename From::Key;
    constexpr int T = tile_groups<From>(M);
    constexpr Bits SIGN = Bits(Bits(1) << (8 * sizeof(Bits) - 1));
    alignas(64) Key key[M][T];
    alignas(64) Key rank[M][T];
    // Visits the entries in memory order: entry j of the tile's group t lies at p where lines are `stride` apart.
    const auto lines = [na](auto stride, auto nb, auto&& visit) __attribute__((always_inline)) {
        for (int a = 0; a < na; a++)
            for (int j = 0; j < M; j++)
                for (int b = 0; b < nb; b++) visit(j, a * nb + b, (int64_t(a) * M + j) * stride + b);
    };
    const auto each = [&](int64_t stride, auto&& visit) __attribute__((always_inline)) {
        const auto loops = [&](auto stride, auto nb) __attribute__((always_inline)) { lines(stride, nb, visit); };
        with_known_lengths<!FITS<M, From>, !FEW<M>>(inner, stride, nb, loops);
    };
    each(inner, [&](int j, int t, int64_t p) { key[j][t] = std::min(Key(w[p] & Bits(~SIGN)), From::nan_key); });
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
    each(nb, [&](int j, int t, int64_t p) { kept[p] = -Key(rank[j][t] < Key(n)); });
}

// Writes the result of a stretch of memory; how many entries of a mask changed.
template <class From, class To, Result RESULT>
INLINE int write(const typename From::Bits* __restrict w, const typename From::Key* __restrict kept, char* result,
                 int count, float scale) {
    using Bits = typename From::Bits;
    int changed = 0;
    if constexpr (RESULT == MASK) {
        char* __restrict out = result;
        for (int p = 0; p < count; p++) {
            const char now = kept[p] & 1;
            changed += out[p] != now;
            out[p] = now;
        }
    } else {
        auto* __restrict out = reinterpret_cast<typename To::Bits*>(result);
        for (int p = 0; p < count; p++) {
            if constexpr (RESULT == ADD_DROPPED)
                out[p] = To::round(To::load(out[p]) + scale * From::load(w[p] & Bits(~kept[p])));
            else if constexpr (std::is_same_v<From, To>) out[p] = w[p] & Bits(kept[p]);
            else out[p] = To::round(From::load(w[p] & Bits(kept[p])));
        }
    }
    return changed;
}

// Writes `scale` times what is kept, brought towards zero by the entry of its group that `more` keeps and `kept` does not.
template <int M, class From, class To>
INLINE void write_soft(const typename From::Bits* __restrict w, const typename From::Key* __restrict kept,
                       const typename From::Key* __restrict more, typename To::Bits* __restrict out, int64_t inner, int na,
                       int nb, float scale) {
    using Bits = typename From::Bits;
    constexpr Bits SIZE = Bits(~(Bits(1) << (8 * sizeof(Bits) - 1)));
    with_known_lengths<true, true>(inner, inner, nb, [=](auto stride, auto nb) __attribute__((always_inline)) {
        for (int a = 0; a < na; a++)
            for (int b = 0; b < nb; b++) {
                const int64_t at = a * M * stride + b, in = a * M * nb + b;
                Bits threshold = 0;
                for (int j = 0; j < M; j++)
                    threshold |= w[at + j * stride] & SIZE & Bits(more[in + j * nb] & ~kept[in + j * nb]);
                for (int j = 0; j < M; j++) {
                    const Bits bits = w[at + j * stride];
                    const float rest = From::load(bits & SIZE) - From::load(threshold);
                    const uint32_t soft = as_bits((From::load(bits) < 0 ? -rest : rest) * scale);
                    out[at + j * stride] = To::round(as_float(kept[in + j * nb] ? soft : 0));
                }
            }
    });
}

// The tile of the groups (a0 .. a0 + na, b0 .. b0 + nb); how many entries of the mask changed.
template <int M, class From, class To, Result RESULT>
INLINE int tile(const Weight& weight, int64_t a0, int na, int64_t b0, int nb) {
    using Bits = typename From::Bits;
    constexpr int64_t UNIT = RESULT == MASK ? 1 : sizeof(typename To::Bits);
    const int64_t inner = weight.inner, start = a0 * M * inner + b0;
    const Bits* w = reinterpret_cast<const Bits*>(weight.w) + start;
    const bool contiguous = FITS<M, From> && inner == 1, side_by_side = FEW<M> && nb >= LANES / 2;  // need no tile
    // All ones into `kept` for what is kept of `na` times `nb` groups from `w` on.
    const auto keep = [=](const Bits* w, typename From::Key* kept, int na, int n) __attribute__((always_inline)) {
        const auto by_lines = [=](auto width) __attribute__((always_inline)) {
            for (int a = 0; a < na; a++)
                keep_side_by_side<FEW<M> ? M : 2, From, width>(w + a * M * inner, kept + a * M * nb, inner, nb, n);
        };
        if (contiguous) keep_contiguous<FITS<M, From> ? M : 2, From>(w, kept, na * M, n);
        else if (side_by_side && nb >= LANES) by_lines(std::integral_constant<int, LANES>{});
        else if (side_by_side) by_lines(std::integral_constant<int, LANES / 2>{});
        else keep_tile<M, From>(w, kept, inner, na, nb, n);
    };
    const auto out = [=](int64_t at) { return weight.out + UNIT * (start + at); };
    // One call of `keep` in each branch: it is inlined, and takes long to compile.
    int changed = 0;
    if constexpr (RESULT == SOFT) {
        alignas(64) typename From::Key kept[2][M * tile_groups<From>(M)];
        for (int more = 0; more < 2; more++) keep(w, kept[more], na, weight.n + more);
        write_soft<M, From, To>(w, kept[0], kept[1], reinterpret_cast<typename To::Bits*>(out(0)), inner, na, nb,
                                weight.scale);
    } else {
        alignas(64) typename From::Key kept[M * tile_groups<From>(M)];
        // Where no tile is needed, so little at a time that the loads of what comes next overlap the stores.
        const bool tiled = !contiguous && !side_by_side;
        const int step = tiled ? na : std::max(1, STRETCH / int(sizeof(Bits)) / (M * nb));
        constexpr int ahead = AHEAD / sizeof(Bits);
        for (int a = 0; a < na; a += step) {
            const int some = std::min(step, na - a);
            const int64_t at = a * M * inner;
            if (!tiled && nb == inner) {
                fetch<false>(w + at + ahead, some * M * nb * sizeof(Bits));
                fetch<true>(out(at + ahead), some * M * nb * UNIT);
            }
            keep(w + at, kept, some, weight.n);
            if (nb < inner) {  // each line is a stretch of memory, and there is one group along a
                for (int j = 0; j < M; j++)
                    changed += write<From, To, RESULT>(w + j * inner, kept + j * nb, out(j * inner), nb, weight.scale);
            } else {
                changed += write<From, To, RESULT>(w + at, kept, out(at), some * M * nb, weight.scale);
            }
        }
    }
    return changed;
}

// `weight.w` is a mask here; entries of `weight.out` where it is false become +0.
template <class Bits> INLINE int apply_mask(const Weight& weight, int64_t start, int count) {
    const char* __restrict mask = weight.w + start;
    Bits* __restrict out = reinterpret_cast<Bits*>(weight.out) + start;
    for (int i = 0; i < count; i++) out[i] = mask[i] ? out[i] : Bits(0);
    return 0;
}

using Kernel = int (*)(const Weight&, int64_t, int, int64_t, int);

#define KERNEL(NAME, BODY) \
    EVERY_MACHINE int NAME(const Weight& weight, int64_t a0, int na, int64_t b0, int nb) { return BODY; }
#define APPLY(BYTES) KERNEL(apply_##BYTES, (void(b0), void(nb), apply_mask<uint##BYTES##_t>(weight, a0, na)))
#define SELECT(NAME, M, FROM, TO, RESULT) KERNEL(NAME##_##M, (tile<M, FROM, TO, RESULT>(weight, a0, na, b0, nb)))
#define VALUES(NAME, M, RESULT) \
    SELECT(NAME##_00, M, Float32, Float32, RESULT) \
    SELECT(NAME##_01, M, Float32, BFloat16, RESULT) \
    SELECT(NAME##_02, M, Float32, Float16, RESULT) \
    SELECT(NAME##_11, M, BFloat16, BFloat16, RESULT) \
    SELECT(NAME##_22, M, Float16, Float16, RESULT) \
    constexpr Kernel NAME##_##M[3][3] = {{NAME##_00_##M, NAME##_01_##M, NAME##_02_##M}, \
                                         {nullptr, NAME##_11_##M, nullptr}, \
                                         {nullptr, nullptr, NAME##_22_##M}};
#define SELECTS(M) \
    VALUES(keep, M, KEEP) \
    VALUES(soft, M, SOFT) \
    SELECT(mask_0, M, Float32, Float32, MASK) \
    SELECT(mask_1, M, BFloat16, BFloat16, MASK) \
    SELECT(mask_2, M, Float16, Float16, MASK) \
    SELECT(add_0, M, Float32, Float32, ADD_DROPPED) \
    SELECT(add_1, M, BFloat16, BFloat16, ADD_DROPPED) \
    SELECT(add_2, M, Float16, Float16, ADD_DROPPED) \
    Kernel find_##M(int result, int from, int to) { \
        constexpr Kernel mask[3] = {mask_0_##M, mask_1_##M, mask_2_##M}, add[3] = {add_0_##M, add_1_##M, add_2_##M}; \
        if (result == KEEP) return keep_##M[from][to]; \
        if (result == SOFT) return soft_##M[from][to]; \
        return result == MASK ? mask[from] : add[from]; \
    }
SELECTS(2) SELECTS(4) SELECTS(8) SELECTS(16) SELECTS(32)
APPLY(16) APPLY(32) APPLY(64)

// The kernel, and how many groups its tile has.
std::pair<Kernel, int> find(int result, int from, int to, int m) {
    if (result == APPLY_MASK) return {to == 2 ? apply_16 : to == 4 ? apply_32 : apply_64, 4096};
#define CASE(M) \
    case M: return {find_##M(result, from, to), from == 0 ? tile_groups<Float32>(M) : tile_groups<BFloat16>(M)};
    switch (m) { CASE(2) CASE(4) CASE(8) CASE(16) CASE(32) }
    return {};
}

constexpr int64_t TILES_A_THREAD = 16;  // at least; below that, starting a thread costs more than it saves

// What Python packs. Of tables, addresses are integers.
struct Row {
    int64_t w, outer, inner, place;
};

struct Call {
    int64_t size;  // of this; another one's is that of another version
    int64_t result, from, to;  // the types of weights and results
    int64_t m, n;
    double scale;
    const int64_t* scales;  // where that of each weight lies; without them, `scale` is that of all
    int64_t count;
    const Row* rows;  // or null where there is one weight, whose row is `only`
    int64_t base, unit;
    const int64_t* out;  // the result of weight i lies at base + unit * out[i], left out where that is null; or at base
    int64_t* changes;  // how many entries of a mask changed is added at its weight's place
    int64_t threads;
    Row only;
};

}  // namespace

// To apply masks, they stand in the place of the weights, m is 1 and `to` is the size of an entry.
extern "C" int nm_run(const Call& call) {
    if (call.size != sizeof(Call)) return 1;
    const auto found = find(int(call.result), int(call.from), int(call.to), int(call.m));
    const Kernel kernel = found.first;  // no structured binding: clang takes none into a parallel region
    const int groups = found.second;
    if (!kernel) return 1;
    const Row* rows = call.rows ? call.rows : &call.only;
    const auto result = [&call](int64_t i) { return call.out ? call.base + call.unit * call.out[i] : call.base; };
    std::vector<int64_t> first(call.count + 1);  // the tiles before each weight's
    for (int64_t i = 0; i < call.count; i++) {
        const Row& row = rows[i];
        const int64_t nb = std::min<int64_t>(row.inner, groups), na = groups / nb;
        first[i + 1] = first[i] + (result(i) ? (row.outer + na - 1) / na * ((row.inner + nb - 1) / nb) : 0);
    }
    const int64_t tiles = first[call.count];
    const int threads = int(std::max<int64_t>(1, std::min(call.threads, tiles / TILES_A_THREAD)));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int thread = 0; thread < threads; thread++) {
        int64_t tile = tiles * thread / threads;
        const int64_t end = tiles * (thread + 1) / threads;
        for (int64_t i = std::upper_bound(first.begin(), first.end(), tile) - first.begin() - 1; tile < end; i++) {
            const Row& row = rows[i];
            const Weight weight{reinterpret_cast<const char*>(row.w),
                                reinterpret_cast<char*>(result(i)),
                                row.outer, row.inner, int(call.n),
                                call.scales ? *reinterpret_cast<const float*>(call.scales[i]) : float(call.scale)};
            const int64_t nb = std::min<int64_t>(row.inner, groups), na = groups / nb;
            const int64_t across = (row.inner + nb - 1) / nb;
            int64_t changed = 0;
            for (; tile < std::min(end, first[i + 1]); tile++) {
                const int64_t t = tile - first[i], a0 = t / across * na, b0 = t % across * nb;
                changed += kernel(weight, a0, int(std::min(na, row.outer - a0)), b0, int(std::min(nb, row.inner - b0)));
            }
            if (call.changes && changed) {
#pragma omp atomic
                call.changes[row.place] += changed;
            }
        }
    }
    return 0;
}
