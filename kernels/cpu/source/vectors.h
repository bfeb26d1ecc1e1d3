// Vectors of the machine's width, in GCC's and Clang's own notation: one source for AVX-512, AVX2, SSE2 and NEON.
//
// Only what the notation cannot say uses instructions by name, and then a general form stands beside it. The width may be
// given (-DPAGEMILL_WIDTH=16) to run the wide code on a narrow machine, as the tests do.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef PAGEMILL_WIDTH
#if defined(__AVX512F__)
#define PAGEMILL_WIDTH 16
#elif defined(__AVX__)
#define PAGEMILL_WIDTH 8
#else
#define PAGEMILL_WIDTH 4
#endif
#endif

#define INLINE inline __attribute__((always_inline))

namespace pagemill {

constexpr int W = PAGEMILL_WIDTH;  // float32 lanes

typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint32_t Words __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));
typedef int16_t Shorts __attribute__((vector_size(4 * W)));  // 2 W lanes
typedef int8_t Bytes __attribute__((vector_size(2 * W)));    // 2 W lanes

// Loads and stores that need no alignment.
template <class Vector, class Element>
INLINE Vector load(const Element* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

template <class Vector, class Element>
INLINE void store(Element* to, Vector vector) {
    std::memcpy(to, &vector, sizeof vector);
}

INLINE Floats splat(float x) { return x - Floats{}; }

INLINE Floats select(Ints mask, Floats yes, Floats no) { return mask ? yes : no; }

// A NaN in x stays.
INLINE Floats at_least(Floats x, Floats least) { return select(x < least, least, x); }
INLINE Floats at_most(Floats x, Floats most) { return select(x > most, most, x); }

typedef float Quarter __attribute__((vector_size(16)));

// The sum and the largest of all lanes; the largest looks past NaN.
INLINE float sum(Floats x) {
    Quarter parts[W / 4];
    std::memcpy(parts, &x, sizeof x);
    for (int width = W / 8; width; width /= 2)
        for (int i = 0; i < width; i++) parts[i] += parts[i + width];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}
INLINE float largest(Floats x) {
    float most = x[0];
    for (int i = 1; i < W; i++) most = x[i] > most ? x[i] : most;
    return most;
}

// e^x to 2 units in the last place (Cephes' polynomial); 0 below -87, NaN of NaN.
INLINE Floats exp(Floats x) {
    const Ints tiny = x < splat(-87.0f);
    x = at_most(at_least(x, splat(-87.0f)), splat(88.0f));
    const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
    const Floats whole = (x * splat(1.44269504088896341f) + magic) - magic;
    Floats r = x - whole * splat(0.693359375f);
    r = r - whole * splat(-2.12194440e-4f);
    Floats p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    // NaN has become some whole number here; the polynomial is NaN all the same.
    const Ints power = (__builtin_convertvector(at_most(at_least(whole, splat(-126.0f)), splat(127.0f)), Ints) + 127) << 23;
    return (Floats)((Ints)(p * (Floats)power) & ~tiny);
}

INLINE Floats tanh(Floats x) { return splat(1.0f) - splat(2.0f) / (exp(x + x) + splat(1.0f)); }

// Types that weights, activations and the cache are stored in; arithmetic is in float32.
enum class Type : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

INLINE float widen(float x) { return x; }
INLINE float widen(BFloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}
INLINE float widen(Float16 x) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#else
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    uint32_t bits;
    if (rest >= 0x7c00) {
        bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    } else if (rest >= 0x400) {
        bits = sign | ((rest << 13) + (112 << 23));
    } else {  // a subnormal: exact in float32
        const float magnitude = float(rest) * 0x1p-24f;
        std::memcpy(&bits, &magnitude, 4);
        bits |= sign;
    }
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
#endif
}

INLINE void narrow(float x, float* to) { *to = x; }
INLINE void narrow(float x, BFloat16* to) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    to->bits = x == x ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : uint16_t(0x7fc0);
}
INLINE void narrow(float x, Float16* to) {
#if defined(__F16C__)
    to->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) {
        to->bits = uint16_t(sign | 0x7e00);
    } else if (rest >= 0x477ff000) {  // rounds to infinity
        to->bits = uint16_t(sign | 0x7c00);
    } else if (rest >= 0x38800000) {
        to->bits = uint16_t(sign | ((rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13));
    } else {  // a subnormal: adding a half lets the processor round it
        float shifted;
        std::memcpy(&shifted, &rest, 4);
        shifted += 0.5f;
        std::memcpy(&bits, &shifted, 4);
        to->bits = uint16_t(sign | (bits - 0x3f000000));
    }
#endif
}

INLINE Floats load_floats(const float* from) { return load<Floats>(from); }
INLINE Floats load_floats(const BFloat16* from) {
    return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
}
INLINE Floats load_floats(const Float16* from) {
#if defined(__AVX512F__) && PAGEMILL_WIDTH == 16
    return (Floats)_mm512_cvtph_ps(load<__m256i>(from));
#elif defined(__F16C__) && PAGEMILL_WIDTH == 8
    return (Floats)_mm256_cvtph_ps(load<__m128i>(from));
#else
    float lanes[W];
    for (int i = 0; i < W; i++) lanes[i] = widen(from[i]);
    return load<Floats>(lanes);
#endif
}

INLINE void store_floats(float* to, Floats x) { store(to, x); }
INLINE void store_floats(BFloat16* to, Floats x) {
    const Words bits = (Words)x;
    const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Words is_number = (Words)(x == x);
    store(to, __builtin_convertvector((rounded & is_number) | (~is_number & 0x7fc0), Halves));
}
INLINE void store_floats(Float16* to, Floats x) {
#if defined(__AVX512F__) && PAGEMILL_WIDTH == 16
    store(to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && PAGEMILL_WIDTH == 8
    store(to, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < W; i++) narrow(x[i], to + i);
#endif
}

// Call `what` with a null pointer of the type that `type` names.
template <class What>
INLINE void with_type(Type type, What what) {
    switch (type) {
        case Type::float32: return what((float*)nullptr);
        case Type::bfloat16: return what((BFloat16*)nullptr);
        case Type::float16: return what((Float16*)nullptr);
    }
}

}  // namespace pagemill
