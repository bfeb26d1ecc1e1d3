// out = activation(x W^T + bias), with weights packed once; or, where the first half of the columns gates the second,
// out = activation(first) * second.
//
//   x     [M, K]   float32, bfloat16 or float16; rows contiguous
//   W     panels of COLUMNS output features: packed[panel][k][COLUMNS], in the type of x or int8 (below)
//   out   [M, N]   in the type of x; [M, N / 2] with a gate
//
// Rows are taken in blocks. The threads first copy a block of x, widened, into parts of a few rows, [part][k][row]: what
// the innermost product reads is then contiguous. Each thread takes groups of panels and walks them in slices of K that
// stay in the first-level cache with one part of x.
//
// Every sum is made in the order of k, one fused multiply-add after the other: a row's result does not depend on what
// other rows there are.
//
// bfloat16 and float16 weights hold columns j and j + W side by side, so that one load and two cheap operations make two
// vectors of float32. int8 weights hold two neighbours in k side by side and have a scale for each GROUP of k: x is
// rounded to int16 row by row, the machine multiplies and adds pairs of 16 bits, and a group's whole numbers are summed
// exactly (64 * 127 * 32767 < 2^31). Groups are added in float32.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "product.h"
#include "scratch.h"

using namespace pagemill;

namespace {

constexpr int BLOCK_ROWS = 32 * MAX_ROWS;
constexpr int SLICE = 256;  // of K: a slice of a panel is 16 KiB with AVX2
constexpr int MAX_GROUP = 4;  // panels
constexpr int CHUNK = 256;    // numbers of a row that are rounded at a time; even
constexpr int GROUP = 64;  // of K: numbers of an int8 weight's row that share a scale
constexpr float MAX_ROUNDED = 32767;  // of a row in int16
constexpr float MAX_FLOAT = 3.402823466e38f;

enum class Activation : int32_t { none = 0, relu = 1, gelu = 2, gelu_tanh = 3, silu = 4 };

struct Arguments {
    const void* input;
    const void* weight;
    const float* weight_scale;  // [panels][K / GROUP, rounded up][COLUMNS]; null: weights are not int8
    const float* bias;          // [N], padded to whole panels; may be null
    void* output;
    int64_t rows, in_features, out_features, input_stride;
    Type type;
    Activation activation;
    int32_t is_gated;  // N / 2 is whole panels then
    int32_t threads;
};

INLINE void right_factors(const float* from, Floats& first, Floats& second) {
    first = load<Floats>(from);
    second = load<Floats>(from + W);
}
INLINE void right_factors(const BFloat16* from, Floats& first, Floats& second) {
    const Words pairs = load<Words>(from);
    first = (Floats)(pairs << 16);
    second = (Floats)(pairs & 0xffff0000u);
}
INLINE void right_factors(const Float16* from, Floats& first, Floats& second) {
    first = load_floats(from);
    second = load_floats(from + W);
}

// What is needed next is fetched into the second-level cache, a little every few steps: many requests at once would hold
// up the loads of the product itself.
struct Ahead {
    static constexpr int STEPS = 8;  // of the product, between two fetches
    static constexpr int LINE = 64;  // bytes

    const char *next, *end;
    int lines;  // each time

    INLINE void fetch() {
        for (int i = 0; i < lines && next < end; i++, next += LINE) __builtin_prefetch(next, 0, 2);
    }
};

template <class Weight>
struct Product {
    typedef float Left;
    static constexpr int PAIR = 1;

    const float* left;    // [k][rows]
    const Weight* right;  // [k][COLUMNS]
    const float* scales;  // none: those of int8
    int count;
    float* sums;  // [rows][COLUMNS]
    bool is_first;
    Ahead ahead;

    template <int ROWS>
    INLINE void run() {
        Sums<ROWS> total;
        if (is_first) total.clear();
        else total.get(sums, COLUMNS);
        int k = 0;
        const auto step = [&] {
            Floats first, second;
            right_factors(right + k * COLUMNS, first, second);
            total.add(left + k * ROWS, 1, first, second);
            k++;
        };
        while (k + Ahead::STEPS <= count) {
            ahead.fetch();
#pragma GCC unroll 8
            for (int i = 0; i < Ahead::STEPS; i++) step();
        }
        while (k < count) step();
        total.put(sums, COLUMNS);
    }
};

// GCC makes eight instructions of the general form.
INLINE Shorts load_shorts(const int8_t* from) {
#if defined(__AVX512BW__) && PAGEMILL_WIDTH == 16
    return (Shorts)_mm512_cvtepi8_epi16(load<__m256i>(from));
#elif defined(__AVX2__) && PAGEMILL_WIDTH == 8
    return (Shorts)_mm256_cvtepi8_epi16(load<__m128i>(from));
#else
    return __builtin_convertvector(load<Bytes>(from), Shorts);
#endif
}

INLINE Ints multiply_pairs(Shorts a, Shorts b) {
#if defined(__AVX512BW__) && PAGEMILL_WIDTH == 16
    return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && PAGEMILL_WIDTH == 8
    return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && PAGEMILL_WIDTH == 4
    return (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    const Ints x = (Ints)a, y = (Ints)b;
    return ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
}

// Adds to `sums` what two vectors of 16 bits give, pair by pair.
INLINE Ints add_pairs(Ints sums, Shorts a, Shorts b) {
#if defined(__AVX512VNNI__) && PAGEMILL_WIDTH == 16
    return (Ints)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#else
    sums += multiply_pairs(a, b);
    // GCC would compute the products of many steps first, since whole numbers may be added in any order, and spill them.
#if defined(__AVX512BW__) && PAGEMILL_WIDTH == 16
    asm("" : "+v"(sums));
#elif defined(__AVX2__) && PAGEMILL_WIDTH == 8
    asm("" : "+x"(sums));
#endif
    return sums;
#endif
}

template <>
struct Product<int8_t> {
    typedef int32_t Left;  // two of 16 bits
    static constexpr int PAIR = 2;
    static constexpr int STEPS = GROUP / PAIR;  // of a group

    const int32_t* left;  // [k / 2][rows]
    const int8_t* right;  // [k / 2][COLUMNS][2]
    const float* scales;  // [k / GROUP][COLUMNS]
    int count;            // of pairs
    float* sums;          // [rows][COLUMNS]
    bool is_first;
    Ahead ahead;

    template <int ROWS>
    INLINE void run() {
        for (int k = 0; k < count; k += STEPS, scales += COLUMNS) {
            Ints total[ROWS][2] = {};
            if (k + STEPS <= count) group<ROWS>(k, STEPS, total);
            else group<ROWS>(k, count - k, total);
            const Floats scale[2] = {load<Floats>(scales), load<Floats>(scales + W)};
            for (int i = 0; i < ROWS; i++) {
                for (int j = 0; j < 2; j++) {
                    float* sum = sums + i * COLUMNS + j * W;
                    const Floats product = __builtin_convertvector(total[i][j], Floats) * scale[j];
                    store(sum, is_first && k == 0 ? product : load<Floats>(sum) + product);
                }
            }
        }
    }

    template <int ROWS>
    INLINE void group(int first, int length, Ints (&total)[ROWS][2]) {
        const auto step = [&](int k) {
            const Shorts weights[2] = {load_shorts(right + k * 2 * COLUMNS), load_shorts(right + k * 2 * COLUMNS + 2 * W)};
#pragma GCC unroll 12
            for (int i = 0; i < ROWS; i++) {
                const Shorts x = (Shorts)(left[k * ROWS + i] - Ints{});
                total[i][0] = add_pairs(total[i][0], x, weights[0]);
                total[i][1] = add_pairs(total[i][1], x, weights[1]);
            }
        };
        int k = first;
        for (; k + Ahead::STEPS <= first + length; k += Ahead::STEPS) {
            ahead.fetch();
#pragma GCC unroll 8
            for (int i = 0; i < Ahead::STEPS; i++) step(k + i);
        }
        for (; k < first + length; k++) step(k);
    }
};

// erf by Abramowitz and Stegun 7.1.26, off by at most 1.5e-7.
INLINE Floats erf(Floats x) {
    const Ints sign = (Ints)x & (Ints)splat(-0.0f);
    const Floats a = (Floats)((Ints)x & ~(Ints)splat(-0.0f));
    const Floats t = splat(1.0f) / (splat(1.0f) + a * splat(0.3275911f));
    Floats p = splat(1.061405429f);
    p = p * t + splat(-1.453152027f);
    p = p * t + splat(1.421413741f);
    p = p * t + splat(-0.284496736f);
    p = p * t + splat(0.254829592f);
    return (Floats)((Ints)(splat(1.0f) - p * t * exp(-a * a)) | sign);
}

INLINE Floats activate(Activation activation, Floats x) {
    switch (activation) {
        case Activation::none: return x;
        case Activation::relu: return at_least(x, Floats{});
        case Activation::gelu: return x * splat(0.5f) * (splat(1.0f) + erf(x * splat(0.70710678118654752f)));
        case Activation::gelu_tanh: {
            // x/2 (1 + tanh y) = x / (1 + e^-2y)
            const Floats y = splat(0.79788456080286536f) * (x + splat(0.044715f) * x * x * x);
            return x / (splat(1.0f) + exp(splat(-2.0f) * y));
        }
        case Activation::silu: return x / (splat(1.0f) + exp(-x));
    }
    return x;
}

template <class Element, class Weight>
struct Linear {
    typedef Product<Weight> Inner;
    typedef typename Inner::Left Left;
    static constexpr int PAIR = Inner::PAIR;

    const Arguments& the;
    const int64_t steps;   // of k, or of pairs of k
    const int64_t groups;  // of k
    Left* left = nullptr;
    float* scales = nullptr;  // of the block's rows; with int8 weights only

    explicit Linear(const Arguments& arguments)
        : the(arguments),
          steps((arguments.in_features + PAIR - 1) / PAIR),
          groups((arguments.in_features + GROUP - 1) / GROUP) {}

    const Element* row(int64_t index) const { return static_cast<const Element*>(the.input) + index * the.input_stride; }

    // One part of x, widened, as [k][rows].
    void copy(int64_t first, int rows, float* to) const {
        for (int i = 0; i < rows; i++) {
            const Element* from = row(first + i);
            for (int64_t k = 0; k < steps; k++) to[k * rows + i] = widen(from[k]);
        }
    }
    // The same, rounded to whole numbers of 16 bits, in pairs.
    void copy(int64_t first, int rows, int32_t* to) const {
        for (int i = 0; i < rows; i++) {
            const Element* from = row(first + i);
            const float most = largest_magnitude(from);
            // A row with a NaN or an infinity comes out as NaN.
            scales[first % BLOCK_ROWS + i] = most <= MAX_FLOAT ? most / MAX_ROUNDED : NAN;
            const float factor = most > 0 && most <= MAX_FLOAT ? MAX_ROUNDED / most : 0;
            alignas(64) int32_t whole[CHUNK];
            for (int64_t begin = 0; begin < the.in_features; begin += CHUNK) {
                const int count = int(std::min<int64_t>(CHUNK, the.in_features - begin));
                int k = 0;
                for (; k + W <= count; k += W) store(whole + k, round(load_floats(from + begin + k), factor));
                for (; k < count; k++) whole[k] = round(splat(widen(from[begin + k])), factor)[0];
                if (k % 2) whole[k++] = 0;
                int32_t* pair = to + begin / 2 * rows + i;
                for (int j = 0; j < k; j += 2, pair += rows) *pair = int32_t(uint32_t(whole[j + 1]) << 16 | (uint32_t(whole[j]) & 0xffff));
            }
        }
    }
    // Infinity where a number is not one.
    float largest_magnitude(const Element* from) const {
        Floats most = {};
        const auto look = [&](Floats x) {
            x = at_least(x, -x);
            most = select(x > most, x, select(x <= splat(MAX_FLOAT), most, splat(INFINITY)));
        };
        int64_t k = 0;
        for (; k + W <= the.in_features; k += W) look(load_floats(from + k));
        for (; k < the.in_features; k++) look(splat(widen(from[k])));
        return largest(most);
    }
    static INLINE Ints round(Floats x, float factor) {
        const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers, ties to even
        return factor ? __builtin_convertvector((x * splat(factor) + magic) - magic, Ints) : Ints{};
    }

    // `sums` of one panel, or of a gate's panel and, `BLOCK_ROWS` further, of what it gates.
    INLINE void finish(int64_t first, int rows, int64_t column, const float* sums) const {
        const int64_t half = the.out_features / 2, width = the.is_gated ? half : the.out_features;
        for (int i = 0; i < rows; i++) {
            Element* to = static_cast<Element*>(the.output) + (first + i) * width + column;
            for (int j = 0; j < 2; j++) {
                const int64_t at = column + j * W;
                if (at >= width) break;
                const float* from = sums + i * COLUMNS + j * W;
                Floats x = activate(the.activation, value(from, at, i));
                if (the.is_gated) x *= value(from + BLOCK_ROWS * COLUMNS, half + at, i);
                if (width - at >= W) {
                    store_floats(to + j * W, x);
                } else {
                    for (int64_t l = 0; l < width - at; l++) narrow(x[l], to + j * W + l);
                }
            }
        }
    }
    INLINE Floats value(const float* sums, int64_t column, int row) const {
        Floats x = load<Floats>(sums);
        if (std::is_same<Weight, int8_t>::value) x *= splat(scales[row]);
        return the.bias ? x + load<Floats>(the.bias + column) : x;
    }
    // Columns of `count` panels from `panel` on, for all rows of the block. With a gate every other of them is one of those
    // that it gates, `gated` panels further.
    void panels(int64_t first, const Parts& parts, int64_t panel, int count, int64_t gated) const {
        alignas(64) float sums[MAX_GROUP * BLOCK_ROWS * COLUMNS];
        const int64_t panel_size = steps * PAIR * COLUMNS;
        const auto index = [&](int p) { return gated ? panel + p / 2 + p % 2 * gated : panel + p; };
        const auto start = [&](int p) { return static_cast<const Weight*>(the.weight) + index(p) * panel_size; };
        for (int64_t k = 0; k < steps; k += SLICE) {
            const int length = int(steps - k < SLICE ? steps - k : SLICE);
            for (int p = 0; p < count; p++) {
                const Weight* slice_weight = start(p) + k * PAIR * COLUMNS;
                const char* next = reinterpret_cast<const char*>(
                    p + 1 < count ? start(p + 1) + k * PAIR * COLUMNS : start(0) + (k + length) * PAIR * COLUMNS);
                const int64_t next_lines = int64_t(length) * PAIR * COLUMNS * sizeof(Weight) / Ahead::LINE;
                const float* slice_scales =
                    the.weight_scale ? the.weight_scale + (index(p) * groups + k * PAIR / GROUP) * COLUMNS : nullptr;
                const int fetches = std::max(1, length / Ahead::STEPS);
                for (int part = 0; part < parts.parts; part++) {
                    const int begin = parts.begin(part), rows = parts.size(part);
                    const int64_t from = next_lines * part / parts.parts, to = next_lines * (part + 1) / parts.parts;
                    const Ahead ahead{next + from * Ahead::LINE, next + to * Ahead::LINE, int((to - from + fetches - 1) / fetches)};
                    Inner inner{left + begin * steps + k * rows, slice_weight, slice_scales,
                                length, sums + (p * BLOCK_ROWS + begin) * COLUMNS, k == 0, ahead};
                    with_rows(rows, inner);
                }
            }
        }
        const int each = gated ? 2 : 1;
        for (int p = 0; p < count; p += each)
            finish(first, parts.rows, (panel + p / each) * COLUMNS, sums + p * BLOCK_ROWS * COLUMNS);
    }

    void run() {
        const int64_t all_panels = (the.out_features + COLUMNS - 1) / COLUMNS;
        const int64_t gated = the.is_gated ? all_panels / 2 : 0;
        const int each = gated ? 2 : 1;  // panels that belong together
        const int block = int(the.rows < BLOCK_ROWS ? the.rows : BLOCK_ROWS);
        const size_t left_bytes = (size_t(block) * steps * sizeof(Left) + 63) / 64 * 64;
        char* memory = scratch.at_least(left_bytes + BLOCK_ROWS * sizeof(float));
        left = reinterpret_cast<Left*>(memory);
        scales = reinterpret_cast<float*>(memory + left_bytes);
        // Small groups where there are many threads, so that all have work.
        int group = MAX_GROUP;
        while (group > each && all_panels / group < 4 * the.threads) group /= 2;
        const int64_t groups = (all_panels + group - 1) / group;
#pragma omp parallel num_threads(the.threads)
        for (int64_t first = 0; first < the.rows; first += BLOCK_ROWS) {
            const int rows = int(the.rows - first < BLOCK_ROWS ? the.rows - first : BLOCK_ROWS);
            const Parts parts(rows);
#pragma omp for schedule(static)
            for (int part = 0; part < parts.parts; part++)
                copy(first + parts.begin(part), parts.size(part), left + parts.begin(part) * steps);
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < groups; i++) {
                const int64_t done = i * group;
                panels(first, parts, done / each, int(all_panels - done < group ? all_panels - done : group), gated);
            }
        }
    }
};

}  // namespace

extern "C" {

int32_t pagemill_width() { return W; }

void pagemill_linear(const Arguments* arguments) {
    with_type(arguments->type, [&](auto* element) {
        typedef std::remove_pointer_t<decltype(element)> Element;
        if (arguments->weight_scale) Linear<Element, int8_t>(*arguments).run();
        else Linear<Element, Element>(*arguments).run();
    });
}

}  // extern "C"
