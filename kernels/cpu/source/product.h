// The innermost product: a few rows times two vectors of columns, all sums in registers.
#pragma once

#include "vectors.h"

namespace pagemill {

constexpr int COLUMNS = 2 * W;  // of one panel of the right factor
// As many sums as registers hold: 12 of 16 with AVX2, 24 of 32 with AVX-512 (SSE2 and NEON are fast enough with 12).
constexpr int MAX_ROWS = W == 16 ? 12 : 6;

// Sums of `rows` x COLUMNS, one register each; the terms of each are added in the order of k, whatever `rows` is.
template <int ROWS>
struct Sums {
    Floats at[ROWS][2];

    INLINE void clear() {
        for (int i = 0; i < ROWS; i++) at[i][0] = at[i][1] = Floats{};
    }
    INLINE void get(const float* from, int64_t stride) {
        for (int i = 0; i < ROWS; i++) {
            at[i][0] = load<Floats>(from + i * stride);
            at[i][1] = load<Floats>(from + i * stride + W);
        }
    }
    INLINE void put(float* to, int64_t stride) const {
        for (int i = 0; i < ROWS; i++) {
            store(to + i * stride, at[i][0]);
            store(to + i * stride + W, at[i][1]);
        }
    }
    // left[i * row_step + k * step] is row i's factor.
    INLINE void add(const float* left, int64_t row_step, Floats right_0, Floats right_1) {
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            const Floats x = splat(left[i * row_step]);
            at[i][0] += x * right_0;
            at[i][1] += x * right_1;
        }
    }
};

// Call `what.template run<ROWS>()` for a number of rows known only now, 1 to MAX_ROWS.
template <class What>
INLINE void with_rows(int rows, What& what) {
    switch (rows) {
#define CASE(N) case N: return what.template run<N>();
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if PAGEMILL_WIDTH == 16
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#undef CASE
    }
}

// `rows` in parts of at most MAX_ROWS that differ by one at most: few rows use a fraction of the registers.
struct Parts {
    int rows, parts;
    explicit Parts(int rows) : rows(rows), parts((rows + MAX_ROWS - 1) / MAX_ROWS) {}
    int begin(int part) const { return int(int64_t(rows) * part / parts); }
    int size(int part) const { return begin(part + 1) - begin(part); }
};

}  // namespace pagemill
