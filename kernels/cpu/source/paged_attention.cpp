// Attention of new tokens over a paged KV cache, read where it is.
//
//   out[t, h] = sum_p softmax_p(cap(scale q[t, h] . k[p, h / G])) v[p, h / G]      (../paged_attention.py has all of it)
//
// A unit of work is a few of a sequence's new tokens and one KV head or several: a KV head's rows are these tokens times
// the G query heads that share it, and what they see is read once for all of them. Keys are walked in chunks: scores of
// a chunk, then the softmax so far is corrected by the new maximum (Milakov and Gimelshein, arXiv 1805.02867), then the
// chunk's values are added. Sums are in float32, whatever the cache holds.
//
// Few rows, as in decoding, take keys and values straight from the cache, several heads together: the heads of a
// position lie side by side, and memory is fastest read in the order in which it lies. Many rows, as in a prompt, are a
// matrix product of one head: the chunk is first copied, widened, keys turned on their side, as panels of COLUMNS.
//
// What a row does not see is never read into its sums: another sequence's NaN stays there. Chunks begin at multiples of
// CHUNK, so that a row's sums do not depend on the unit that it is in.
#include <algorithm>
#include <cmath>
#include <vector>

#include "product.h"
#include "scratch.h"

using namespace pagemill;

namespace {

constexpr int CHUNK = 64;       // positions
// Rows of a unit, or one token's of a KV head, if those are more: as many as leave each thread some units to choose from,
// because what a unit copies is copied once for all its rows.
constexpr int LEAST_UNIT_ROWS = 48, MOST_UNIT_ROWS = 192;
constexpr int UNITS_A_THREAD = 4;
constexpr int DIRECT_ROWS = 4;  // up to so many rows of a KV head, nothing is copied
constexpr int TOGETHER = 4;     // positions whose values are added in one go

struct Arguments {
    const void *query, *key, *value;  // [T, H, D], [T, KH, D], [T, KH, Dv]; contiguous in the last dimension
    void* output;                     // [T, H, Dv], contiguous
    void *key_cache, *value_cache;    // [N, B, KH, D], [N, B, KH, Dv], contiguous
    const int64_t *starts, *query_lens;  // [S]
    const int64_t* block_tables;      // [S, blocks]
    const int64_t* slots;             // [T]
    const float* sinks;               // [H]; may be null
    int64_t tokens, sequences, table_width, heads, kv_heads, head_dim, value_dim, block_size;
    int64_t query_stride[2], key_stride[2], value_stride[2];  // of token and head, in elements
    int64_t window;                   // 0: none
    float scale, soft_cap;            // 0: none
    Type type;  // of all of them
    int32_t threads;
};

struct Unit {
    int64_t sequence, row, position;  // of its first token: row in the query, position in the sequence
    int32_t tokens, kv_head, kv_heads;
    bool is_direct;
};

INLINE int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }


// sums[rows][COLUMNS] (+)= left[rows][count] right[count][COLUMNS], in registers.
struct Multiply {
    const float* left;
    int64_t left_stride;
    const float* right;
    int count;
    float* sums;
    int64_t sums_stride;
    bool is_first;

    template <int ROWS>
    INLINE void run() {
        Sums<ROWS> total;
        if (is_first) total.clear();
        else total.get(sums, sums_stride);
        for (int k = 0; k < count; k++) {
            const float* from = right + k * COLUMNS;
            total.add(left + k, left_stride, load<Floats>(from), load<Floats>(from + W));
        }
        total.put(sums, sums_stride);
    }
};

// The same of many columns, which `right` has in panels: [panel][panel_rows][COLUMNS], of whose rows `count` are taken.
INLINE void multiply(const float* left, int64_t left_stride, const float* right, int64_t panel_rows, int count,
                     float* sums, int64_t sums_stride, int rows, int64_t columns, bool is_first) {
    const Parts parts(rows);
    for (int64_t column = 0; column < columns; column += COLUMNS)
        for (int part = 0; part < parts.parts; part++) {
            const int begin = parts.begin(part);
            Multiply each{left + begin * left_stride, left_stride, right + column * panel_rows, count,
                          sums + begin * sums_stride + column, sums_stride, is_first};
            with_rows(parts.size(part), each);
        }
}

template <class Element>
struct Attention {
    const Arguments& the;
    const int64_t group;
    const int64_t key_width, value_width;  // rounded up to whole panels
    const bool is_even;                    // heads are whole vectors
    const int max_rows;
    const size_t scratch_floats;

    explicit Attention(const Arguments& arguments)
        : the(arguments),
          group(the.heads / the.kv_heads),
          key_width(round_up(the.head_dim, W)),
          value_width(round_up(the.value_dim, COLUMNS)),
          is_even(the.head_dim % W == 0 && the.value_dim % COLUMNS == 0),
          max_rows(int(unit_rows() / group * group)),
          scratch_floats(size_t(max_rows) * (key_width + CHUNK + value_width + 2) + size_t(CHUNK) * (key_width + value_width)) {}

    int64_t unit_rows() const {
        int64_t rows = MOST_UNIT_ROWS;
        while (rows > LEAST_UNIT_ROWS && num_units(rows) < UNITS_A_THREAD * the.threads) rows /= 2;
        return std::max(rows, group);
    }
    int64_t num_units(int64_t rows) const {
        int64_t units = 0;
        for (int64_t s = 0; s < the.sequences; s++) units += (the.query_lens[s] * group + rows - 1) / rows * the.kv_heads;
        return units;
    }

    void write_token(int64_t token) const {
        const int64_t slot = the.slots[token];
        for (int64_t head = 0; head < the.kv_heads; head++) {
            std::memcpy(static_cast<Element*>(the.key_cache) + (slot * the.kv_heads + head) * the.head_dim,
                        static_cast<const Element*>(the.key) + token * the.key_stride[0] + head * the.key_stride[1],
                        the.head_dim * sizeof(Element));
            std::memcpy(static_cast<Element*>(the.value_cache) + (slot * the.kv_heads + head) * the.value_dim,
                        static_cast<const Element*>(the.value) + token * the.value_stride[0] + head * the.value_stride[1],
                        the.value_dim * sizeof(Element));
        }
    }

    bool is_direct(int64_t tokens) const { return is_even && tokens * group <= DIRECT_ROWS; }

    std::vector<Unit> units() const {
        const int64_t step = max_rows / group;
        int64_t num_direct = 0;
        for (int64_t s = 0; s < the.sequences; s++) num_direct += is_direct(the.query_lens[s]);
        // As many heads together as still leave each thread some units to choose from.
        int64_t together = std::max<int64_t>(1, std::min(the.kv_heads, step));
        while (together > 1 && num_direct * ((the.kv_heads + together - 1) / together) < 2 * the.threads) together = (together + 1) / 2;
        std::vector<Unit> result;
        int64_t row = 0;
        for (int64_t s = 0; s < the.sequences; s++) {
            const bool direct = is_direct(the.query_lens[s]);
            for (int64_t done = 0; done < the.query_lens[s]; done += step) {
                const int64_t tokens = std::min(the.query_lens[s] - done, step);
                const int64_t heads = direct ? std::min(together, max_rows / (tokens * group)) : 1;
                for (int64_t head = 0; head < the.kv_heads; head += heads)
                    result.push_back({s, row + done, the.starts[s] + done, int32_t(tokens), int32_t(head),
                                      int32_t(std::min(the.kv_heads - head, heads)), direct});
            }
            row += the.query_lens[s];
        }
        return result;
    }

    // The unit's pieces of scratch. Rows are those of its first KV head, then those of the next.
    struct State {
        float *query, *scores, *sums, *largest, *total, *keys, *values;
        const Element *key_rows[CHUNK], *value_rows[CHUNK];  // of the first KV head
    };

    void run_unit(const Unit& unit, float* scratch) const {
        const int head_rows = int(unit.tokens * group), rows = head_rows * unit.kv_heads;
        State state;
        state.query = scratch;
        state.scores = state.query + max_rows * key_width;
        state.sums = state.scores + max_rows * CHUNK;
        state.largest = state.sums + max_rows * value_width;
        state.total = state.largest + max_rows;
        state.keys = state.total + max_rows;
        state.values = state.keys + CHUNK * key_width;
        take_query(unit, state);
        std::memset(state.sums, 0, rows * value_width * sizeof(float));
        for (int i = 0; i < rows; i++) {
            state.largest[i] = -INFINITY;
            state.total[i] = 0;
        }
        const int64_t end = unit.position + unit.tokens;
        const int64_t first = the.window && unit.position >= the.window ? unit.position - the.window + 1 : 0;
        for (int64_t begin = first / CHUNK * CHUNK; begin < end; begin += CHUNK) {
            const int count = int(end - begin < CHUNK ? end - begin : CHUNK);
            locate(unit, begin, count, first, state);
            if (unit.is_direct) direct_scores(state, unit.kv_heads, head_rows, count);
            else copied_scores(state, rows, count);
            for (int i = 0; i < rows; i++) {
                const int64_t position = unit.position + i % head_rows / group;
                const int64_t from = the.window ? position - the.window + 1 - begin : 0;
                const int64_t to = position + 1 - begin;
                soften(state, i, int(from < 0 ? 0 : from > count ? count : from), int(to < 0 ? 0 : to > count ? count : to), count);
            }
            if (unit.is_direct) direct_values(state, unit.kv_heads, head_rows, count);
            else multiply(state.scores, CHUNK, state.values, CHUNK, count, state.sums, value_width, rows, value_width, false);
        }
        give(unit, state, head_rows);
    }

    void take_query(const Unit& unit, State& state) const {
        const Floats scale = splat(the.scale);
        float* to = state.query;
        for (int64_t h = unit.kv_head; h < unit.kv_head + unit.kv_heads; h++)
            for (int t = 0; t < unit.tokens; t++)
                for (int64_t g = 0; g < group; g++, to += key_width) {
                    const Element* from = static_cast<const Element*>(the.query) + (unit.row + t) * the.query_stride[0] +
                                          (h * group + g) * the.query_stride[1];
                    int64_t d = 0;
                    for (; d + W <= the.head_dim; d += W) store(to + d, load_floats(from + d) * scale);
                    for (; d < the.head_dim; d++) to[d] = widen(from[d]) * the.scale;
                }
    }

    // Positions before `first`, which no row sees, become `first`: they may hold NaN, and 0 * NaN is not 0.
    void locate(const Unit& unit, int64_t begin, int count, int64_t first, State& state) const {
        const int unseen = int(first > begin ? first - begin : 0);
        const int64_t* block = the.block_tables + unit.sequence * the.table_width + (begin + unseen) / the.block_size;
        int64_t offset = (begin + unseen) % the.block_size;
        for (int i = unseen; i < count; i++) {
            const int64_t slot = *block * the.block_size + offset;
            state.key_rows[i] = static_cast<const Element*>(the.key_cache) + (slot * the.kv_heads + unit.kv_head) * the.head_dim;
            state.value_rows[i] =
                static_cast<const Element*>(the.value_cache) + (slot * the.kv_heads + unit.kv_head) * the.value_dim;
            if (++offset == the.block_size) offset = 0, block++;
        }
        std::fill_n(state.key_rows, unseen, state.key_rows[unseen]);
        std::fill_n(state.value_rows, unseen, state.value_rows[unseen]);
    }

    // Straight from the cache: a few positions at a time, all heads of these, then the next positions.

    INLINE void direct_scores(State& state, int heads, int rows, int count) const {
        switch (rows) {
            case 1: return direct_scores<1>(state, heads, count);
            case 2: return direct_scores<2>(state, heads, count);
            case 3: return direct_scores<3>(state, heads, count);
            case 4: return direct_scores<4>(state, heads, count);
        }
    }
    template <int ROWS>
    void direct_scores(State& state, int heads, int count) const {
        int c = 0;
        for (; c + TOGETHER <= count; c += TOGETHER) direct_scores<ROWS, TOGETHER>(state, heads, c);
        for (; c < count; c++) direct_scores<ROWS, 1>(state, heads, c);
    }
    template <int ROWS, int KEYS>
    INLINE void direct_scores(State& state, int heads, int c) const {
        for (int h = 0; h < heads; h++) {
            const float* query = state.query + h * ROWS * key_width;
            Floats sums[ROWS][KEYS] = {};
            for (int64_t d = 0; d < the.head_dim; d += W)
                for (int j = 0; j < KEYS; j++) {
                    const Floats key = load_floats(state.key_rows[c + j] + h * the.head_dim + d);
                    for (int i = 0; i < ROWS; i++) sums[i][j] += key * load<Floats>(query + i * key_width + d);
                }
            for (int i = 0; i < ROWS; i++)
                for (int j = 0; j < KEYS; j++) state.scores[(h * ROWS + i) * CHUNK + c + j] = sum(sums[i][j]);
        }
    }
    INLINE void direct_values(State& state, int heads, int rows, int count) const {
        switch (rows) {
            case 1: return direct_values<1>(state, heads, count);
            case 2: return direct_values<2>(state, heads, count);
            case 3: return direct_values<3>(state, heads, count);
            case 4: return direct_values<4>(state, heads, count);
        }
    }
    template <int ROWS>
    void direct_values(State& state, int heads, int count) const {
        int c = 0;
        for (; c + TOGETHER <= count; c += TOGETHER) direct_values<ROWS, TOGETHER>(state, heads, c);
        for (; c < count; c++) direct_values<ROWS, 1>(state, heads, c);
    }
    template <int ROWS, int VALUES>
    INLINE void direct_values(State& state, int heads, int c) const {
        for (int h = 0; h < heads; h++) {
            const float* weights = state.scores + h * ROWS * CHUNK + c;
            for (int64_t d = 0; d < the.value_dim; d += COLUMNS) {
                float* sums = state.sums + h * ROWS * value_width + d;
                Sums<ROWS> total;
                total.get(sums, value_width);
                for (int j = 0; j < VALUES; j++) {
                    const Element* value = state.value_rows[c + j] + h * the.value_dim + d;
                    total.add(weights + j, CHUNK, load_floats(value), load_floats(value + W));
                }
                total.put(sums, value_width);
            }
        }
    }

    // By a copy. Columns beyond `count`, and value columns beyond the head, hold anything: nobody reads their sums.

    INLINE void copied_scores(State& state, int rows, int count) const {
        for (int c = 0; c < count; c++) {
            const Element* key = state.key_rows[c];
            float* to = state.keys + c / COLUMNS * COLUMNS * the.head_dim + c % COLUMNS;
            for (int64_t d = 0; d < the.head_dim; d++) to[d * COLUMNS] = widen(key[d]);
            const Element* value = state.value_rows[c];
            to = state.values + c * COLUMNS;
            int64_t d = 0;
            for (; d + W <= the.value_dim; d += W) store(to + d / COLUMNS * COLUMNS * CHUNK + d % COLUMNS, load_floats(value + d));
            for (; d < the.value_dim; d++) to[d / COLUMNS * COLUMNS * CHUNK + d % COLUMNS] = widen(value[d]);
        }
        multiply(state.query, key_width, state.keys, the.head_dim, int(the.head_dim), state.scores, CHUNK, rows,
                 round_up(count, COLUMNS), true);
    }

    // Row i sees `from` up to `to` of the chunk: scores become weights, sums so far shrink to the new maximum.
    INLINE void soften(State& state, int i, int from, int to, int count) const {
        float* scores = state.scores + i * CHUNK;
        const int width = int(round_up(count, W));
        if (the.soft_cap != 0) {
            const Floats cap = splat(the.soft_cap);
            for (int c = 0; c < width; c += W) store(scores + c, cap * tanh(load<Floats>(scores + c) / cap));
        }
        for (int c = 0; c < from; c++) scores[c] = -INFINITY;
        for (int c = to; c < width; c++) scores[c] = -INFINITY;
        Floats most = splat(state.largest[i]);
        for (int c = 0; c < width; c += W) {
            const Floats x = load<Floats>(scores + c);
            most = select(x > most, x, most);
        }
        const float new_largest = largest(most);
        // With nothing but NaN so far there is no maximum; NaN then comes out whatever is taken off.
        const Floats shift = splat(new_largest == -INFINITY ? 0 : new_largest);
        Floats total = {};
        for (int c = 0; c < width; c += W) {
            const Floats weight = exp(load<Floats>(scores + c) - shift);
            store(scores + c, weight);
            total += weight;
        }
        if (new_largest != state.largest[i]) {
            const float correction = state.largest[i] == -INFINITY ? 0 : std::exp(state.largest[i] - new_largest);
            float* sums = state.sums + i * value_width;
            for (int64_t d = 0; d < value_width; d += W) store(sums + d, load<Floats>(sums + d) * splat(correction));
            state.total[i] *= correction;
            state.largest[i] = new_largest;
        }
        state.total[i] += sum(total);
    }

    void give(const Unit& unit, const State& state, int head_rows) const {
        for (int i = 0; i < head_rows * unit.kv_heads; i++) {
            const int64_t head = (unit.kv_head + i / head_rows) * group + i % group, token = unit.row + i % head_rows / group;
            float factor = 1, total = state.total[i];
            if (the.sinks) {
                const float sink = the.sinks[head], largest = state.largest[i];
                if (sink > largest) {
                    factor = std::exp(largest - sink);
                    total = total * factor + 1;
                } else {
                    total += std::exp(sink - largest);
                }
            }
            factor /= total;
            Element* to = static_cast<Element*>(the.output) + (token * the.heads + head) * the.value_dim;
            const float* sums = state.sums + i * value_width;
            int64_t d = 0;
            for (; d + W <= the.value_dim; d += W) store_floats(to + d, load<Floats>(sums + d) * splat(factor));
            for (; d < the.value_dim; d++) narrow(sums[d] * factor, to + d);
        }
    }

    void run() const {
        const std::vector<Unit> all = units();
#pragma omp parallel num_threads(the.threads)
        {
#pragma omp for schedule(static)
            for (int64_t token = 0; token < the.tokens; token++) write_token(token);
            float* memory = reinterpret_cast<float*>(scratch.at_least(scratch_floats * sizeof(float)));
#pragma omp for schedule(dynamic)
            for (size_t i = 0; i < all.size(); i++) run_unit(all[i], memory);
        }
    }
};

}  // namespace

extern "C" void pagemill_paged_attention(const Arguments* arguments) {
    with_type(arguments->type, [&](auto* element) {
        Attention<std::remove_pointer_t<decltype(element)>>(*arguments).run();
    });
}
