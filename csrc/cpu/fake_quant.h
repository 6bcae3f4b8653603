/* Fake quantization, quantization and dequantization of a range of blocks, a batch of elements at a time.
 *
 * A batch runs in stages over memory that is in the first-level cache by then: keys of the blocks (their largest
 * element), scales of all blocks at once, random bits, codes. The scales of the next batch are found before the codes
 * of this one, so that the latency of their divisions has something to hide behind. Rounding adds and subtracts
 * 1.5 x 2^23, which rounds half to even on every instruction set, after clamping, which commutes with it because the
 * ends of the range are integers; it also turns -0 into the one zero that a code has.
 *
 * Weights and outputs of one dtype are worked on as they are; of two, they are staged as fp32.
 */
#ifndef QAD_FAKE_QUANT_H
#define QAD_FAKE_QUANT_H

#include "../numerics.h"
#include "elements.h"
#include "kernels.h"
#include "random.h"
#include "simd.h"

namespace {

constexpr int chunk = 32; /* elements per step of the inner loops: every block is some of them */
constexpr int pair = 2 * width;
constexpr int most_blocks = QAD_BATCH / 32;
constexpr uint32_t quiet_nan = 0x7fc00000u;

/* Memory that will be wanted, asked for a chunk at a time while a batch is computed: stages that only compute would
 * else leave the memory idle. Asking for what lies beyond the end is harmless. */
struct Ahead {
    const char *in, *out;
    int in_bytes, out_bytes; /* of a chunk: 64 or 128, or 0 */

    void ask() {
        __builtin_prefetch(in, 0, 3);
        if (in_bytes > 64) __builtin_prefetch(in + 64, 0, 3);
        in += in_bytes;
        if (!out_bytes) return;
        __builtin_prefetch(out, 1, 2);
        if (out_bytes > 64) __builtin_prefetch(out + 64, 1, 2);
        out += out_bytes;
    }
};

/* The weights of the batch after the next, whose scales are being found by then, and what the next one writes. Lines to
 * be written are asked for only where they come from memory: out of a cache, that gets in the way (of a copy's rate,
 * fp32 forward: 0.97 without and 0.93 with it at 1536 x 576). */
QAD_INLINE Ahead ahead(const qad_fake_quantize_job *job, int64_t first, bool ask_for_out) {
    const int in = size_of(job->weights_dtype), out = size_of(job->out_dtype);
    return {(const char *)job->weights + in * (first + 2 * QAD_BATCH),
            (const char *)job->out + out * (first + QAD_BATCH), in * chunk, ask_for_out ? out * chunk : 0};
}

template <typename Order, int block>
QAD_INLINE void find_orders_of(const typename Order::Stored *values, int blocks, uint32_t *orders) {
    int b = 0;
    for (; b + 4 <= blocks; b += 4, values += 4 * block)
        reduce_max_4(orders + b, Order::order_of(values, block), Order::order_of(values + block, block),
                     Order::order_of(values + 2 * block, block), Order::order_of(values + 3 * block, block));
    for (; b < blocks; ++b, values += block) orders[b] = reduce_max(Order::order_of(values, block));
}

template <typename Order>
QAD_CALLED void find_orders(const typename Order::Stored *values, int blocks, int block, uint32_t *orders) {
    if (block == 32)
        find_orders_of<Order, 32>(values, blocks, orders);
    else if (block == 64)
        find_orders_of<Order, 64>(values, blocks, orders);
    else
        find_orders_of<Order, 128>(values, blocks, orders);
}

/* The key of each block, padded with zeros to whole vectors. */
template <int dtype>
QAD_INLINE void find_keys(const typename Elements<dtype>::Stored *values, int blocks, int block, uint32_t *keys) {
    find_orders<typename Elements<dtype>::Order>(values, blocks, block, keys);
    for (int b = blocks; b % width; ++b) keys[b] = 0;
    if (dtype != QAD_F32)
        for (int b = 0; b < blocks; b += width) store_words(keys + b, Elements<dtype>::key_from(load_words(keys + b)));
}

template <int dtype> QAD_INLINE bool all_finite(const typename Elements<dtype>::Stored *values, int count) {
    const U largest = set_words(reduce_max(Elements<dtype>::order_of(values, count)));
    return reduce_max(Elements<dtype>::key_from(largest)) < QAD_KEY_NOT_FINITE;
}

/* The scales of a batch, and which of its blocks are damaged. Arrays are padded to whole vectors. */
struct Scales {
    float scale[most_blocks + width], inverse[most_blocks + width];
    bool damaged[most_blocks];
    int damaged_count;
    bool in_range; /* absmax scales, none of them cut off: no element lies far beyond the last codes */
};

QAD_INLINE F round_scales(F value, const qad_grid &grid) {
    const int drop = 24 - grid.scale_bits;
    const U bits = bit_and(bits_of(value), set_words(0x7fffffffu));
    const U odd = bit_and(shift_right(bits, drop), set_words(1));
    const U carried = add_words(bits, add_words(odd, set_words((1u << (drop - 1)) - 1u)));
    F magnitude = float_of(shift_left(shift_right(carried, drop), drop));
    magnitude = min_of(set(grid.scale_ceiling), max_of(set(grid.scale_floor), magnitude));
    if (grid.signed_scale) {
        const F sign = keep_if(less(value, set(0.0f)), float_of(set_words(0x80000000u)));
        magnitude = float_of(bit_or(bits_of(magnitude), bits_of(sign)));
    }
    return choose(less_equal(value, value), magnitude, float_of(set_words(quiet_nan)));
}

/* From the scales that are given or, if they are null, from the blocks' keys, which may be null if all is finite. */
QAD_CALLED void find_scales(const uint32_t *keys, const float *given, int blocks, const qad_grid &grid, Scales &out) {
    float padded[most_blocks + width];
    if (given) {
        memcpy(padded, given, (size_t)blocks * 4);
        for (int b = blocks; b % width; ++b) padded[b] = 1.0f;
    }
    const F end = set((float)(grid.signed_scale ? grid.code_min : grid.code_max)), zero = set(0.0f);
    U any_bad = set_words(0), largest = set_words(0);
    for (int b = 0; b < blocks; b += width) {
        F scale;
        if (given) {
            scale = round_scales(load(padded + b), grid);
        } else {
            const U key = load_words(keys + b);
            const U sign = shift_left(bit_xor(key, set_words(1)), 31);
            U bits = shift_right(key, 1);
            if (grid.signed_scale) bits = bit_or(bits, sign);
            const F extreme = float_of(bits);
            scale = round_scales(div(extreme, end), grid);
            /* An infinity minus itself is a NaN. */
            scale = choose(less_equal(sub(extreme, extreme), zero), scale, float_of(set_words(quiet_nan)));
        }
        any_bad = bit_or(any_bad, bits_of(choose(less_equal(scale, scale), zero, set(1.0f))));
        largest = max_words(largest, bit_and(bits_of(scale), set_words(0x7fffffffu)));
        store(out.scale + b, scale);
        store(out.inverse + b, div(set(1.0f), scale));
    }
    const float ceiling = grid.scale_ceiling;
    uint32_t ceiling_bits;
    memcpy(&ceiling_bits, &ceiling, 4);
    out.in_range = !given && reduce_max(largest) < ceiling_bits;
    out.damaged_count = 0;
    const bool look = given && keys;
    if (!look && reduce_max(any_bad) == 0) return;
    for (int b = 0; b < blocks; ++b) {
        out.damaged[b] = !(out.scale[b] <= 3.0e38f) || (look && keys[b] >= QAD_KEY_NOT_FINITE);
        out.damaged_count += out.damaged[b];
    }
}

template <int dtype>
QAD_CALLED void find_scales_of(const typename Elements<dtype>::Stored *values, const float *given, int blocks,
                               const qad_grid &grid, Scales &out) {
    uint32_t keys[most_blocks + width];
    const bool look = !given || !all_finite<dtype>(values, blocks * grid.block);
    if (look) find_keys<dtype>(values, blocks, grid.block, keys);
    find_scales(look ? keys : nullptr, given, blocks, grid, out);
}

/* Some blocks on their way through the stages. */
struct Batch {
    int64_t block, element; /* the first ones */
    int blocks, count;      /* of blocks and of elements */
    const void *weights;    /* of the dtype that is worked on */
    Scales scales;
    alignas(64) float staged[QAD_BATCH];
};

constexpr float rounding_magic = 0x1.8p23f;

/* The noise of a batch: 16 random bits for each element and, where some blocks are rounded hard, what makes the
 * difference: their noise is a product with 0, and other blocks are rounded by adding and subtracting 0. */
struct Draws {
    uint16_t element[QAD_BATCH];
    float amplitude[most_blocks + width], offset[most_blocks + width], magic[most_blocks + width];
};

struct Treatment {
    F amplitude, offset, magic;
};

QAD_INLINE float offset_of(int mode) { return mode == QAD_NOISE_UNIFORM ? 0x1p-17f - 0.5f : 0x1p-17f; }

template <int mode, bool mixed> QAD_INLINE Treatment treatment_of(const Draws &draws, int block) {
    if (mixed) return {set(draws.amplitude[block]), set(draws.offset[block]), set(draws.magic[block])};
    return {set(0x1p-16f), set(offset_of(mode)), set(rounding_magic)};
}

QAD_INLINE F round_code(F clamped, F magic) { return sub(add(clamped, magic), magic); }

/* The (fractional, unless hard) code of a scaled weight. A sum with noise is never -0: the noise is never zero, and
 * what cancels gives +0. */
template <int mode, bool mixed>
QAD_INLINE F code_of(F scaled, U random, const Treatment &treatment, F low, F high) {
    F moved = scaled;
    if (mode == QAD_NOISE_UNIFORM || mode == QAD_NOISE_STOCHASTIC) /* the product is exact */
        moved = add(scaled, fused_add(convert(random), treatment.amplitude, treatment.offset));
    moved = min_of(high, max_of(low, moved));
    if (mode == QAD_NOISE_STOCHASTIC) {
        const F down = floor_of(moved);
        return mixed ? choose(less(set(0.0f), treatment.magic), round_code(moved, treatment.magic), down) : down;
    }
    if (mode == QAD_NOISE_NONE || mixed) return round_code(moved, treatment.magic);
    return mode == QAD_NOISE_PARTIAL ? add(moved, set(0.0f)) : moved;
}

QAD_INLINE int chunks_per_block_log2(const qad_grid &grid) { return grid.block == 32 ? 0 : grid.block == 64 ? 1 : 2; }

template <int dtype, int mode, bool mixed>
void forward_batch(const Batch &batch, void *to, bool past, const qad_grid &grid, const Draws &draws, Ahead next) {
    typedef Elements<dtype> E;
    const F low = set((float)grid.code_min), high = set((float)grid.code_max);
    const typename E::Stored *values = (const typename E::Stored *)batch.weights;
    typename E::Stored *out = (typename E::Stored *)to;
    const int more = chunks_per_block_log2(grid), chunks = batch.count / chunk;
    for (int c = 0; c < chunks; ++c) {
        const int b = c >> more;
        const F scale = set(batch.scales.scale[b]), inverse = set(batch.scales.inverse[b]);
        const Treatment treatment = treatment_of<mode, mixed>(draws, b);
        next.ask();
#pragma GCC unroll 4
        for (int i = c * chunk; i < (c + 1) * chunk; i += pair) {
            const Pair scaled = E::load_pair(values + i).times(inverse);
            const WordPair random = E::random_pair(draws.element + i);
            const Pair codes = {code_of<mode, mixed>(scaled.first, random.first, treatment, low, high),
                                code_of<mode, mixed>(scaled.second, random.second, treatment, low, high)};
            E::store_pair(out + i, codes.times(scale), past);
        }
    }
}

#ifdef QAD_HAS_LOOK_UP
/* Hard rounding of 16-bit weights to codes of 4 bits. A rounding sum ends in the code, and that looks up what is
 * stored: the products of a block's scale and the sixteen codes are rounded to 16 bits, not those of its elements. */
template <int dtype> struct LookUp {
    typedef Elements<dtype> E;

    float codes[width];
    uint16_t halves[2 * width]; /* which half of the products a rounding sum means by its lowest 5 bits, clamped */
    uint16_t order[2 * width];  /* of a pair's halves in memory */

    static bool serves(const qad_grid &grid) { return grid.code_min >= -8 && grid.code_max <= 7; }

    explicit LookUp(const qad_grid &grid) {
        for (int i = 0; i < width; ++i) codes[i] = (float)(grid.code_min + i);
        for (int i = 0; i < 2 * width; ++i) {
            const int code = i < width ? i : i - 2 * width;
            const int clamped = code < grid.code_min ? grid.code_min : code > grid.code_max ? grid.code_max : code;
            halves[i] = (uint16_t)E::half_of(clamped - grid.code_min);
            order[E::place_of(i)] = (uint16_t)i;
        }
    }

    void forward_batch(const Batch &batch, void *to, bool past, const qad_grid &grid, Ahead next) const {
        const F code = load(codes), magic = set(rounding_magic);
        const U half = load_words(halves), in_order = load_words(order);
        const uint16_t *values = (const uint16_t *)batch.weights;
        uint16_t *out = (uint16_t *)to;
        const int more = chunks_per_block_log2(grid), chunks = batch.count / chunk;
        for (int c = 0; c < chunks; ++c) {
            const F scale = set(batch.scales.scale[c >> more]), inverse = set(batch.scales.inverse[c >> more]);
            next.ask();
            const U table = look_up_halves(E::stored(mul(code, scale)), half);
            const Pair scaled = E::load_pair(values + c * chunk).times(inverse);
            const U first = bits_of(add(scaled.first, magic)), second = bits_of(add(scaled.second, magic));
            const U stored = look_up_halves(table, join_halves(first, shift_left(second, 16)));
            put_words(out + c * chunk, dtype == QAD_BF16 ? stored : look_up_halves(stored, in_order), past);
        }
    }
};
#endif

/* Whether a gradient passes: the weight is at most half a step beyond the last code. */
struct Inside {
    F first, last;
    explicit Inside(const qad_grid &grid)
        : first(set((float)grid.code_min - 0.5f)), last(set((float)grid.code_max + 0.5f)) {}
    M operator()(F scaled) const { return both(less_equal(first, scaled), less_equal(scaled, last)); }
};

template <int dtype> void mask_batch(const Batch &batch, void *to, const qad_grid &grid, Ahead next) {
    typedef Elements<dtype> E;
    const Inside inside(grid);
    const typename E::Stored *values = (const typename E::Stored *)batch.weights;
    typename E::Stored *grad = (typename E::Stored *)to;
    const int more = chunks_per_block_log2(grid), chunks = batch.count / chunk;
    for (int c = 0; c < chunks; ++c) {
        const F inverse = set(batch.scales.inverse[c >> more]);
        next.ask();
#pragma GCC unroll 4
        for (int i = c * chunk; i < (c + 1) * chunk; i += pair) {
            const Pair scaled = E::load_pair(values + i).times(inverse);
            E::keep_pair_if(grad + i, inside(scaled.first), inside(scaled.second));
        }
    }
}

template <int mode>
void learn_batch(const Batch &batch, float *grad, float *grad_scales, const qad_grid &grid, const Draws &draws,
                 Ahead next) {
    const F low = set((float)grid.code_min), high = set((float)grid.code_max);
    constexpr bool mixed = mode != QAD_NOISE_NONE;
    const Inside inside(grid);
    const float *values = (const float *)batch.weights;
    const uint16_t *random = draws.element;
    for (int b = 0; b < batch.blocks; ++b) {
        const F inverse = set(batch.scales.inverse[b]);
        const Treatment treatment = treatment_of<mode, mixed>(draws, b);
        F products[128 / width];
        int count = grid.block / width;
        for (int i = 0; i < count; ++i) {
            const F scaled = mul(load(values), inverse), slope = load(grad);
            const M passes = inside(scaled);
            const F code = code_of<mode, mixed>(scaled, widen(random), treatment, low, high);
            products[i] = mul(sub(code, keep_if(passes, scaled)), slope);
            store(grad, keep_if(passes, slope));
            values += width;
            grad += width;
            random += width;
        }
        for (int i = 0; i < grid.block; i += chunk) next.ask();
        for (; count > 1; count /= 2)
            for (int i = 0; i < count / 2; ++i) products[i] = add(products[i], products[i + count / 2]);
        grad_scales[b] = fold(products[0]);
    }
}

/* How the noise of a job works out. */
struct Mode {
    int mode;
    bool mixed; /* blocks differ, or are treated as if they did: each variant costs the first build time */
    Mode(const qad_noise &noise, bool always_mixed) : mode(noise.mode), mixed(false) {
        if (noise.hard_share >= 1.0f) mode = QAD_NOISE_NONE;
        if (mode != QAD_NOISE_NONE) mixed = always_mixed || mode == QAD_NOISE_PARTIAL || noise.hard_share > 0.0f;
    }
    bool draws_elements() const { return mode == QAD_NOISE_UNIFORM || mode == QAD_NOISE_STOCHASTIC; }
};

QAD_CALLED void fill_blocks(Draws &draws, int64_t first, int blocks, const Random &random, int mode, float hard_share) {
    uint16_t bits[most_blocks + random_step(1)];
    fill_random<1>(bits, first, blocks, random);
    const F zero = set(0.0f), amplitude = set(0x1p-16f), offset = set(offset_of(mode)), magic = set(rounding_magic);
    for (int b = 0; b < blocks; b += width) {
        const M hard = less(uniform_from(widen(bits + b), 0.0f), set(hard_share));
        store(draws.amplitude + b, choose(hard, zero, amplitude));
        store(draws.offset + b, choose(hard, zero, offset));
        store(draws.magic + b, keep_if(hard, magic));
    }
}

/* Overwrite the damaged blocks of a batch. */
template <int dtype> void fill_damaged(void *to, const Batch &batch, int block, bool with_nan) {
    const uint32_t word = with_nan ? quiet_nan : 0u;
    const uint16_t half = (uint16_t)(!with_nan ? 0u : dtype == QAD_BF16 ? 0x7fc0u : 0x7e00u);
    for (int b = 0; b < batch.blocks; ++b) {
        if (!batch.scales.damaged[b]) continue;
        for (int i = b * block; i < (b + 1) * block; ++i) {
            if (dtype == QAD_F32)
                memcpy((float *)to + i, &word, 4);
            else
                memcpy((uint16_t *)to + i, &half, 2);
        }
    }
}

/* A job, and what it takes to walk over its batches. */
template <int dtype> struct Walk {
    typedef typename Elements<dtype>::Stored Stored;

    const qad_fake_quantize_job &job;
    const Mode mode;
    const Random elements, hardness;
    const int per_batch;
    Batch batches[2]; /* this one and the next */
    Draws draws;

    explicit Walk(const qad_fake_quantize_job &of, bool always_mixed = false)
        : job(of), mode(of.noise, always_mixed),
          elements(of.noise.seed_low, of.noise.seed_high, of.noise.tensor, of.noise.step, QAD_STREAM_ELEMENT),
          hardness(of.noise.seed_low, of.noise.seed_high, of.noise.tensor, of.noise.step, QAD_STREAM_BLOCK),
          per_batch(QAD_BATCH / of.grid.block) {}

    /* Find the scales of the batch that begins with a block. */
    __attribute__((noinline)) void prepare(Batch &batch, int64_t block, int64_t end) const {
        batch.block = block;
        batch.element = block * job.grid.block;
        batch.blocks = (int)(end - block < per_batch ? end - block : per_batch);
        batch.count = batch.blocks * job.grid.block;
        batch.weights = dtype == QAD_F32
                            ? load_elements(job.weights, job.weights_dtype, batch.element, batch.count, batch.staged)
                            : (const void *)((const Stored *)job.weights + batch.element);
        find_scales_of<dtype>((const Stored *)batch.weights, job.scales ? job.scales + block : nullptr, batch.blocks,
                              job.grid, batch.scales);
    }

    void draw(const Batch &batch) {
        /* Few and late, the numbers of blocks hide behind the many. */
        if (mode.mixed) fill_blocks(draws, batch.block, batch.blocks, hardness, mode.mode, job.noise.hard_share);
        if (mode.draws_elements()) fill_random(draws.element, batch.element, batch.count, elements);
    }

    /* Call body for each batch of the blocks [begin, end). Returns how many of them were damaged. */
    template <typename Body> int64_t operator()(int64_t begin, int64_t end, Body body) {
        int64_t damaged = 0;
        int now = 0;
        if (begin < end) prepare(batches[0], begin, end);
        for (int64_t block = begin; block < end; block += per_batch, now ^= 1) {
            if (block + per_batch < end) prepare(batches[now ^ 1], block + per_batch, end);
            body(batches[now]);
            damaged += batches[now].scales.damaged_count;
        }
        return damaged;
    }
};

template <int dtype>
void (*forward_for(const Mode &mode))(const Batch &, void *, bool, const qad_grid &, const Draws &, Ahead) {
    switch (mode.mode) {
    case QAD_NOISE_UNIFORM:
        return mode.mixed ? forward_batch<dtype, QAD_NOISE_UNIFORM, true>
                          : forward_batch<dtype, QAD_NOISE_UNIFORM, false>;
    case QAD_NOISE_STOCHASTIC:
        return mode.mixed ? forward_batch<dtype, QAD_NOISE_STOCHASTIC, true>
                          : forward_batch<dtype, QAD_NOISE_STOCHASTIC, false>;
    case QAD_NOISE_PARTIAL:
        return forward_batch<dtype, QAD_NOISE_PARTIAL, true>;
    default:
        return forward_batch<dtype, QAD_NOISE_NONE, false>;
    }
}

template <int dtype> int64_t forward(const qad_fake_quantize_job &job, int64_t begin, int64_t end) {
    Walk<dtype> walk(job);
    const auto step = forward_for<dtype>(walk.mode);
    const int size = size_of(job.out_dtype), block = job.grid.block;
    const bool converts = job.out_dtype != dtype;
    /* Past the caches, no line is read only to be overwritten: a third less to move. */
    const bool past =
        can_stream && job.streams && ((uintptr_t)job.out + (uintptr_t)(begin * block * size)) % (4 * width) == 0;
    alignas(64) float computed[QAD_BATCH];
    alignas(64) uint16_t converted[QAD_BATCH];
#ifdef QAD_HAS_LOOK_UP
    const LookUp<dtype == QAD_F32 ? QAD_BF16 : dtype> look_up(job.grid);
    const bool may_look_up = dtype != QAD_F32 && walk.mode.mode == QAD_NOISE_NONE && look_up.serves(job.grid);
#else
    const bool may_look_up = false;
#endif
    const int64_t damaged = walk(begin, end, [&](const Batch &batch) {
        char *out = (char *)job.out + batch.element * size;
        const bool looks_up = may_look_up && batch.scales.in_range;
        const bool buffered = converts || (past && !looks_up && !Elements<dtype>::streams);
        void *to = buffered ? (void *)computed : out;
        const Ahead next = ahead(&job, batch.element, job.streams && !past);
        /* While random numbers keep the arithmetic busy, the memory can fetch what will be written. In 16 bits that is
         * too little to matter. */
        if (dtype == QAD_F32 && !past && walk.mode.draws_elements())
            for (int i = 0; i < batch.count * size; i += 64) __builtin_prefetch(out + i, 1, 2);
        walk.draw(batch);
#ifdef QAD_HAS_LOOK_UP
        if (looks_up) look_up.forward_batch(batch, to, past, job.grid, next);
#endif
        if (!looks_up) step(batch, to, past && !buffered, job.grid, walk.draws, next);
        if (batch.scales.damaged_count) {
            if (past) end_of_stream();
            fill_damaged<dtype>(to, batch, block, true);
        }
        if (converts) store_elements(past ? (void *)converted : out, job.out_dtype, 0, batch.count, computed);
        if (past && buffered) stream_out(out, converts ? (void *)converted : computed, batch.count * size);
        if (job.used_scales) memcpy(job.used_scales + batch.block, batch.scales.scale, (size_t)batch.blocks * 4);
    });
    if (past) end_of_stream();
    return damaged;
}

int64_t fake_quantize(const qad_fake_quantize_job *job, int64_t begin, int64_t end) {
    if (job->weights_dtype != job->out_dtype || job->out_dtype == QAD_F32) return forward<QAD_F32>(*job, begin, end);
    return job->out_dtype == QAD_BF16 ? forward<QAD_BF16>(*job, begin, end) : forward<QAD_F16>(*job, begin, end);
}

void (*learn_for(const Mode &mode))(const Batch &, float *, float *, const qad_grid &, const Draws &, Ahead) {
    switch (mode.mode) {
    case QAD_NOISE_UNIFORM:
        return learn_batch<QAD_NOISE_UNIFORM>;
    case QAD_NOISE_STOCHASTIC:
        return learn_batch<QAD_NOISE_STOCHASTIC>;
    case QAD_NOISE_PARTIAL:
        return learn_batch<QAD_NOISE_PARTIAL>;
    default:
        return learn_batch<QAD_NOISE_NONE>;
    }
}

/* Backward with gradients by the scales: sums want fp32, and its elements in order. */
int64_t learn(const qad_fake_quantize_job &job, int64_t begin, int64_t end) {
    Walk<QAD_F32> walk(job, true);
    const auto step = learn_for(walk.mode);
    alignas(64) float staged[QAD_BATCH];
    return walk(begin, end, [&](const Batch &batch) {
        float *grad = (float *)load_elements(job.out, job.out_dtype, batch.element, batch.count, staged);
        float *slopes = job.grad_scales + batch.block;
        walk.draw(batch);
        step(batch, grad, slopes, job.grid, walk.draws, ahead(&job, batch.element, job.streams));
        if (batch.scales.damaged_count) {
            fill_damaged<QAD_F32>(grad, batch, job.grid.block, false);
            for (int i = 0; i < batch.blocks; ++i)
                if (batch.scales.damaged[i]) slopes[i] = 0.0f;
        }
        if (job.out_dtype != QAD_F32) store_elements(job.out, job.out_dtype, batch.element, batch.count, grad);
    });
}

template <int dtype> int64_t mask(const qad_fake_quantize_job &job, int64_t begin, int64_t end) {
    Walk<dtype> walk(job);
    alignas(64) float staged[QAD_BATCH];
    return walk(begin, end, [&](const Batch &batch) {
        void *grad = dtype == QAD_F32
                         ? (void *)load_elements(job.out, job.out_dtype, batch.element, batch.count, staged)
                         : (void *)((typename Elements<dtype>::Stored *)job.out + batch.element);
        mask_batch<dtype>(batch, grad, job.grid, ahead(&job, batch.element, job.streams));
        if (batch.scales.damaged_count) fill_damaged<dtype>(grad, batch, job.grid.block, false);
        if (dtype != job.out_dtype) store_elements(job.out, job.out_dtype, batch.element, batch.count, (float *)grad);
    });
}

int64_t backward(const qad_fake_quantize_job *job, int64_t begin, int64_t end) {
    if (job->grad_scales) return learn(*job, begin, end);
    if (job->weights_dtype != job->out_dtype || job->out_dtype == QAD_F32) return mask<QAD_F32>(*job, begin, end);
    return job->out_dtype == QAD_BF16 ? mask<QAD_BF16>(*job, begin, end) : mask<QAD_F16>(*job, begin, end);
}

int64_t quantize(const qad_fake_quantize_job *job, int64_t begin, int64_t end) {
    const qad_grid grid = job->grid;
    const int per_batch = QAD_BATCH / grid.block;
    const F low = set((float)grid.code_min), high = set((float)grid.code_max);
    alignas(64) float in_buffer[QAD_BATCH];
    uint16_t halves[most_blocks + width];
    Scales scales;
    int64_t damaged = 0;
    for (int64_t b = begin; b < end; b += per_batch) {
        const int blocks = (int)(end - b < per_batch ? end - b : per_batch), count = blocks * grid.block;
        const int64_t first = b * grid.block;
        const float *values = load_elements(job->weights, job->weights_dtype, first, count, in_buffer);
        int8_t *codes = job->codes + first;
        find_scales_of<QAD_F32>(values, job->scales ? job->scales + b : nullptr, blocks, grid, scales);
        for (int i = 0; i < blocks; i += width) store_half(halves + i, load(scales.scale + i));
        for (int i = 0; i < blocks; ++i) {
            const F inverse = set(scales.inverse[i]);
            if (scales.damaged_count && scales.damaged[i]) {
                halves[i] = 0x7e00;
                memset(codes + i * grid.block, 0, (size_t)grid.block);
                continue;
            }
            for (int j = i * grid.block; j < (i + 1) * grid.block; j += width) {
                const F scaled = mul(load(values + j), inverse);
                store_codes(codes + j, round_code(min_of(high, max_of(low, scaled)), set(rounding_magic)));
            }
        }
        memcpy(job->half_scales + b, halves, (size_t)blocks * 2);
        damaged += scales.damaged_count;
    }
    return damaged;
}

int64_t dequantize(const qad_fake_quantize_job *job, int64_t begin, int64_t end) {
    const int block = job->grid.block, per_batch = QAD_BATCH / block;
    alignas(64) float out_buffer[QAD_BATCH];
    float scales[most_blocks + width];
    uint16_t halves[most_blocks + width] = {0};
    for (int64_t b = begin; b < end; b += per_batch) {
        const int blocks = (int)(end - b < per_batch ? end - b : per_batch), count = blocks * block;
        const int64_t first = b * block;
        float *out = job->out_dtype == QAD_F32 ? (float *)job->out + first : out_buffer;
        memcpy(halves, job->stored_scales + b, (size_t)blocks * 2);
        for (int i = 0; i < blocks; i += width) {
            const F scale = load_half(halves + i);
            store(scales + i, choose(less_equal(scale, scale), scale, float_of(set_words(quiet_nan))));
        }
        const int8_t *codes = job->codes + first;
        for (int i = 0; i < blocks; ++i) {
            const F scale = set(scales[i]);
            for (int j = i * block; j < (i + 1) * block; j += width) store(out + j, mul(load_codes(codes + j), scale));
        }
        if (job->out_dtype != QAD_F32) store_elements(job->out, job->out_dtype, first, count, out);
    }
    return 0;
}

void uniform16(float *out, int64_t count, uint32_t seed_low, uint32_t seed_high, uint32_t tensor, uint32_t step,
               uint32_t stream) {
    const Random random(seed_low, seed_high, tensor, step, stream);
    uint16_t bits[QAD_BATCH];
    for (int64_t first = 0; first < count; first += QAD_BATCH) {
        const int left = (int)(count - first < (int64_t)QAD_BATCH ? count - first : (int64_t)QAD_BATCH);
        fill_random(bits, first, left, random);
        for (int i = 0; i < left; ++i) out[first + i] = ((float)bits[i] + 0.5f) * 0x1p-16f;
    }
}

} // namespace
#endif
