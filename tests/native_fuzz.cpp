/* Random small shapes through the functions of csrc/qad.h, held to plain scalar code bit for bit.
 *
 * The scalar code restates qad/tensor.py, qad/fake_quant.py and qad/philox.py one number at a time, rounds in double
 * arithmetic and shares nothing with the kernels but csrc/qad.h. With --dump it writes what each case was given and what
 * it came to, and tests/test_native_fuzz.py holds that to torch: reference = scalar code = kernels.
 *
 * A case depends on its number alone, so a report names all that is needed to see it again.
 */
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../csrc/qad.h"

namespace {

const char *const isa_names[] = {"portable", "avx2", "avx512", "neon", "avx512bf16"};
enum { ISAS = 5 };

// ---------------------------------------------------------------------------------------------- numbers

uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

double power_of_two(int exponent) {
    const uint64_t bits = (uint64_t)(exponent + 1023) << 52;
    double value;
    memcpy(&value, &bits, 8);
    return value;
}

int exponent_of(float value, int smallest) {
    const int exponent = (int)(bits_of(value) >> 23 & 255) - 127;
    return exponent < smallest ? smallest : exponent;
}

/* A finite number rounded half to even to so many significand bits, none worth less than those of 2^smallest. */
double round_significand(float value, int significand, int smallest) {
    const int unit = exponent_of(value, smallest) - significand + 1;
    return std::rint(value * power_of_two(-unit)) * power_of_two(unit);
}

/* The number of 8 significand bits nearest to a normal one, of those that are no larger in magnitude. */
double cut_to_8_bits(float value) {
    const int unit = exponent_of(value, -126) - 7;
    return std::trunc(value * power_of_two(-unit)) * power_of_two(unit);
}

uint16_t bfloat_from(float value) {
    if (std::isnan(value)) return 0x7fc0;
    if (std::isinf(value)) return value < 0 ? 0xff80 : 0x7f80;
    return (uint16_t)(bits_of((float)round_significand(value, 8, -126)) >> 16);
}

uint16_t half_from(float value) {
    if (std::isnan(value)) return 0x7e00;
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isinf(value)) return sign | 0x7c00;
    const double magnitude = std::fabs(round_significand(value, 11, -14));
    if (magnitude >= 65536.0) return sign | 0x7c00;
    if (magnitude < power_of_two(-14)) return sign | (uint16_t)(magnitude * power_of_two(24));
    return sign | (uint16_t)((bits_of((float)magnitude) >> 13) - (112u << 10));
}

float float_from_half(uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 0x3ff;
    double magnitude = (fraction + 1024) * power_of_two(exponent - 25);
    if (exponent == 0) magnitude = fraction * power_of_two(-24);
    if (exponent == 31) return float_of((fraction ? 0x7fc00000u : 0x7f800000u) | (uint32_t)(half & 0x8000) << 16);
    return (float)(half & 0x8000 ? -magnitude : magnitude);
}

size_t size_of(int dtype) { return dtype == QAD_F32 ? 4 : 2; }

float read(const void *from, int dtype, size_t index) {
    if (dtype == QAD_F32) return float_of(((const uint32_t *)from)[index]);
    const uint16_t bits = ((const uint16_t *)from)[index];
    return dtype == QAD_BF16 ? float_of((uint32_t)bits << 16) : float_from_half(bits);
}

void write(void *to, int dtype, size_t index, float value) {
    if (dtype == QAD_F32)
        ((uint32_t *)to)[index] = bits_of(value);
    else
        ((uint16_t *)to)[index] = dtype == QAD_BF16 ? bfloat_from(value) : half_from(value);
}

// ---------------------------------------------------------------------------------------------- the scalar code

struct Draw {
    uint32_t seed_low, seed_high, tensor, step, stream;
    uint64_t call = ~(uint64_t)0;
    uint32_t words[4] = {};

    Draw(const qad_noise &noise, uint32_t which)
        : seed_low(noise.seed_low), seed_high(noise.seed_high), tensor(noise.tensor), step(noise.step), stream(which) {}

    float uniform(uint64_t element) {
        if (element / 8 != call) {
            call = element / 8;
            uint32_t counter[4] = {(uint32_t)call, tensor, step, stream}, key[2] = {seed_low, seed_high};
            for (int round = 0; round < 7; ++round) {
                const uint64_t first = (uint64_t)0xD2511F53 * counter[0], second = (uint64_t)0xCD9E8D57 * counter[2];
                const uint32_t next[4] = {(uint32_t)(second >> 32) ^ counter[1] ^ key[0], (uint32_t)second,
                                          (uint32_t)(first >> 32) ^ counter[3] ^ key[1], (uint32_t)first};
                memcpy(counter, next, sizeof next);
                key[0] += 0x9E3779B9;
                key[1] += 0xBB67AE85;
            }
            memcpy(words, counter, sizeof words);
        }
        const uint32_t word = words[element % 8 / 2];
        const uint32_t random = element % 2 ? word >> 16 : word & 0xffff;
        return (float)((random + 0.5) / 65536.0);
    }
};

float round_scale(float scale, const qad_grid &grid) {
    if (std::isnan(scale)) return float_of(0x7fc00000);
    double magnitude = std::fabs(scale);
    if (!std::isinf(scale)) magnitude = std::fabs(round_significand(scale, grid.scale_bits, -126));
    if (magnitude < grid.scale_floor) magnitude = grid.scale_floor;
    if (magnitude > grid.scale_ceiling) magnitude = grid.scale_ceiling;
    return (float)(grid.signed_scale && scale < 0 ? -magnitude : magnitude);
}

float absmax_scale(const float *block, const qad_grid &grid) {
    float low = block[0], high = block[0];
    for (int i = 0; i < grid.block; ++i) {
        if (!std::isfinite(block[i])) return float_of(0x7fc00000);
        if (block[i] < low) low = block[i];
        if (block[i] > high) high = block[i];
    }
    if (grid.signed_scale) return round_scale((high >= -low ? high : low) / (float)grid.code_min, grid);
    return round_scale((high > -low ? high : -low) / (float)grid.code_max, grid);
}

struct Case {
    int64_t number;
    qad_grid grid;
    qad_noise noise;
    int in_dtype, out_dtype, grad_dtype, threads;
    int64_t rows, groups;
    bool given, learn, draws;
    int used; /* 0: not wanted, 1: a buffer of its own, 2: the scales themselves */
    std::vector<uint8_t> weights, grad;
    std::vector<float> scales;
    std::vector<int8_t> stored_codes;
    std::vector<uint16_t> stored_scales;
    uint32_t stream;

    int64_t blocks() const { return rows * groups; }
    int64_t elements() const { return rows * groups * grid.block; }
};

struct Results {
    std::vector<uint8_t> out, grad, decoded;
    std::vector<float> used, grad_scales, uniform;
    std::vector<int8_t> codes;
    std::vector<uint16_t> half_scales;
    int64_t damaged, outside;
};

void scalar(const Case &c, Results &r) {
    const qad_grid &grid = c.grid;
    const int64_t blocks = c.blocks(), elements = c.elements();
    r.out.resize(elements * size_of(c.out_dtype));
    r.decoded.resize(elements * size_of(c.out_dtype));
    r.grad.resize(elements * size_of(c.grad_dtype));
    r.used.resize(blocks);
    r.grad_scales.resize(blocks);
    r.codes.resize(elements);
    r.half_scales.resize(blocks);
    r.uniform.resize(c.draws ? elements : 0);
    r.damaged = r.outside = 0;
    Draw element_draw(c.noise, 0), block_draw(c.noise, 1), any_draw(c.noise, c.stream);
    const bool is_hard = c.noise.mode == QAD_NOISE_NONE || c.noise.hard_share >= 1;
    const float low = (float)grid.code_min, high = (float)grid.code_max;
    float values[128], by_scale[128];
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = b * grid.block;
        bool damaged = false;
        for (int i = 0; i < grid.block; ++i) {
            values[i] = read(c.weights.data(), c.in_dtype, first + i);
            damaged |= !std::isfinite(values[i]);
        }
        const float scale = c.given ? round_scale(c.scales[b], grid) : absmax_scale(values, grid);
        damaged |= std::isnan(scale);
        r.used[b] = scale;
        r.half_scales[b] = half_from(damaged ? NAN : scale);
        r.damaged += damaged;
        const float inverse = 1.0f / scale;
        const bool hard = is_hard || block_draw.uniform(b) < c.noise.hard_share;
        for (int i = 0; i < grid.block; ++i) {
            const float scaled = values[i] * inverse, rounded = std::rint(scaled);
            float code = rounded;
            if (!hard) {
                if (c.noise.mode == QAD_NOISE_UNIFORM) code = scaled + (element_draw.uniform(first + i) - 0.5f);
                if (c.noise.mode == QAD_NOISE_STOCHASTIC) code = std::floor(scaled + element_draw.uniform(first + i));
                if (c.noise.mode == QAD_NOISE_PARTIAL) code = scaled;
            }
            code = (code < low ? low : code > high ? high : code) + 0.0f;
            const bool outside = damaged || !(scaled >= low - 0.5f && scaled <= high + 0.5f);
            r.outside += outside && !damaged;
            float value = code * scale;
            if (!hard && c.noise.mode == QAD_NOISE_UNIFORM) {
                const double moved_by = (element_draw.uniform(first + i) - 0.5) * cut_to_8_bits(scale);
                if ((float)moved_by != moved_by && !damaged) {
                    fprintf(stderr, "case %lld: a move by noise is not exact\n", (long long)c.number);
                    abort();
                }
                const float moved = values[i] + (float)moved_by, one = low * scale, other = high * scale;
                value = std::fmax(std::fmin(one, other), std::fmin(std::fmax(one, other), moved));
            }
            write(r.out.data(), c.out_dtype, first + i, damaged ? NAN : value);
            r.codes[first + i] = damaged ? 0 : (int8_t)(rounded < low ? low : rounded > high ? high : rounded);
            by_scale[i] = (code - (outside ? 0.0f : scaled)) * read(c.grad.data(), c.grad_dtype, first + i);
            const size_t size = size_of(c.grad_dtype);
            if (outside)
                memset(&r.grad[(first + i) * size], 0, size);
            else
                memcpy(&r.grad[(first + i) * size], &c.grad[(first + i) * size], size);
            if (c.draws) r.uniform[first + i] = any_draw.uniform(first + i);
            write(r.decoded.data(), c.out_dtype, first + i,
                  (float)c.stored_codes[first + i] * float_from_half(c.stored_scales[b]));
        }
        for (int half = grid.block / 2; half; half /= 2)
            for (int i = 0; i < half; ++i) by_scale[i] += by_scale[i + half];
        r.grad_scales[b] = damaged ? 0.0f : by_scale[0];
    }
}

// ---------------------------------------------------------------------------------------------- random cases

struct Random {
    uint64_t state;
    uint64_t next() {
        uint64_t z = state += 0x9E3779B97F4A7C15u;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        return z ^ z >> 31;
    }
    int below(int count) { return (int)((next() >> 32) * (uint64_t)count >> 32); }
    int between(int low, int high) { return low + below(high - low + 1); }
    bool one_in(int count) { return below(count) == 0; }
    float sign() { return next() >> 63 ? -1.0f : 1.0f; }
    float uniform() { return (float)(next() >> 40) * 0x1p-24f; }
    float bell() { /* about normal, in (-3, 3) */
        const uint64_t z = next();
        return (float)((int)(z & 0xffff) + (int)(z >> 16 & 0xffff) + (int)(z >> 32 & 0xffff) + (int)(z >> 48) - 131070) *
               0x1.8p-16f;
    }
    float not_a_number() { return float_of((uint32_t)next() | 0x7f800001u); }
    float not_finite() { return one_in(2) ? not_a_number() : sign() * INFINITY; }
    float subnormal() { return float_of((uint32_t)next() & 0x807fffffu); }
    float huge() { return float_of(((uint32_t)next() & 0x80ffffffu) | 0x7e000000u); }
    float any() { return float_of((uint32_t)next()); }
};

qad_grid random_grid(Random &random) {
    static const int ranges[][4] = {/* bits, code_min, code_max, signed_scale */
                                    {4, -8, 7, 1}, {8, -127, 127, 0}, {4, -7, 7, 0},
                                    {8, -128, 127, 1}, {4, -8, 7, 0}, {8, -127, 127, 1}};
    static const int scale_bits[] = {8, 8, 8, 11, 5, 2};
    qad_grid grid;
    const int *range = ranges[random.below(6)];
    grid.bits = range[0], grid.code_min = range[1], grid.code_max = range[2], grid.signed_scale = range[3];
    grid.block = 32 << random.below(3);
    grid.scale_bits = random.one_in(4) ? random.between(2, 11) : scale_bits[random.below(6)];
    grid.scale_floor = random.one_in(8) ? 0x1p-6f : 0x1p-14f;
    grid.scale_ceiling = random.one_in(8) ? 1.0f : 65536.0f - (float)(1 << (16 - grid.scale_bits));
    return grid;
}

float random_scale(Random &random, const qad_grid &grid, float usual) {
    switch (random.below(24)) {
    case 0: return random.not_a_number();
    case 1: return random.sign() * INFINITY;
    case 2: return random.sign() * 0.0f;
    case 3: return random.subnormal();
    case 4: return random.huge();
    case 5: return random.any();
    case 6: /* halfway between two scales, or next to it */
        return float_of((((uint32_t)random.next() & 0x80ffffffu) >> (24 - grid.scale_bits) << (24 - grid.scale_bits)) +
                        0x3b000000u + (1u << (23 - grid.scale_bits)) + (uint32_t)random.between(-1, 1));
    case 7: return random.sign() * float_of(bits_of(grid.scale_floor) + (uint32_t)random.between(-2, 2));
    case 8: return random.sign() * float_of(bits_of(grid.scale_ceiling) + (uint32_t)random.between(-2, 2));
    case 9: return -usual;
    case 10: return usual * random.bell();
    default: return usual;
    }
}

void random_block(Random &random, Case &c, int64_t block) {
    const qad_grid &grid = c.grid;
    const int size = grid.block, end = grid.signed_scale ? grid.code_min : grid.code_max;
    const int64_t first = block * size;
    /* A power of two: ties of w / s are exact. */
    const float step = (float)power_of_two(random.between(-13, -1)), wide = step * (float)(-end < end ? end : -end) / 3;
    if (c.given) c.scales[block] = random_scale(random, grid, random.one_in(2) ? step : step * (1 + random.uniform()));
    float values[128];
    const int kind = random.below(16);
    for (int i = 0; i < size; ++i) {
        switch (kind) {
        case 0: values[i] = random.sign() * 0.0f; break;
        case 1: values[i] = random.subnormal(); break;
        case 2: values[i] = random.huge(); break;
        case 3: values[i] = random.any(); break;
        case 4: values[i] = random.bell() * grid.scale_floor * (float)grid.code_max; break;
        case 5: values[i] = random.bell() * random.huge(); break;
        case 6:
        case 7:
        case 8: { /* codes, ties between them, the edges of the range, and what lies next to these */
            const float exact = 0.5f * (float)random.between(2 * grid.code_min - 2, 2 * grid.code_max + 2) * step;
            values[i] = random.one_in(4) ? std::nextafterf(exact, random.sign() * 100) : exact;
            break;
        }
        default: values[i] = random.bell() * wide;
        }
    }
    if (kind == 7) values[random.below(size)] = (float)end * step; /* absmax finds this very step */
    if (kind == 9) { /* two extremes of opposite signs */
        const int where = random.below(size);
        values[where] = random.sign() * 4 * wide;
        values[(where + random.between(1, size - 1)) % size] = -values[where];
    }
    if (kind == 10) values[random.below(size)] = random.not_finite();
    if (kind == 11)
        for (int i = 0; i < size; ++i)
            if (random.one_in(3)) values[i] = random.sign() * 0.0f;
    for (int i = 0; i < size; ++i) write(c.weights.data(), c.in_dtype, first + i, values[i]);
    if (c.in_dtype != QAD_F32 && (kind == 3 || kind == 10)) /* payloads that a conversion would not leave */
        for (int i = 0; i < size; ++i)
            if (kind == 3 || random.one_in(size))
                ((uint16_t *)c.weights.data())[first + i] = (uint16_t)random.next();
}

void random_case(int64_t number, bool large, Case &c) {
    Random random = {(uint64_t)number * 0xD1342543DE82EF95u + large};
    c.number = number;
    c.grid = random_grid(random);
    c.in_dtype = random.below(3), c.out_dtype = random.below(3), c.grad_dtype = random.below(3);
    c.threads = random.between(1, 3);
    c.rows = random.between(1, 2), c.groups = random.between(1, random.one_in(4) ? 9 : 2);
    if (random.one_in(100)) c.groups = 2048 / c.grid.block * random.between(1, 2) + random.between(-2, 2);
    if (random.one_in(100)) c.rows = 0;
    if (large) c.rows = 3, c.groups = (1 << 18) / c.grid.block + random.between(0, 40), c.threads = 3;
    c.noise = {random.below(4), 0.0f, 0, 0, 0, 0};
    static const float shares[] = {0.0f, 0.0f, 0.4f, 0.4f, 0.4f, 1.0f, 1.5f, -1.0f};
    const int share = random.below(12);
    c.noise.hard_share = share < 8 ? shares[share]
                         : share < 10 ? (float)((random.below(65536) + 0.5) / 65536.0) /* a value that may be drawn */
                                      : random.uniform();
    uint32_t *words[] = {&c.noise.seed_low, &c.noise.seed_high, &c.noise.tensor, &c.noise.step, &c.stream};
    for (uint32_t *word : words) *word = random.one_in(3) ? (uint32_t)random.between(-2, 2) : (uint32_t)random.next();
    c.given = random.one_in(2), c.learn = random.one_in(2), c.draws = random.one_in(4);
    c.used = random.below(c.given ? 3 : 2);
    const int64_t blocks = c.blocks(), elements = c.elements();
    c.weights.resize(elements * size_of(c.in_dtype));
    c.grad.resize(elements * size_of(c.grad_dtype));
    c.scales.resize(c.given ? blocks : 0);
    c.stored_codes.resize(elements);
    c.stored_scales.resize(blocks);
    for (int64_t b = 0; b < blocks; ++b) {
        random_block(random, c, b);
        c.stored_scales[b] = random.one_in(10) ? 0x7e00 : (uint16_t)random.next();
        if ((c.stored_scales[b] & 0x7c00) == 0x7c00) c.stored_scales[b] = 0x7e00; /* none is infinite */
    }
    const bool awkward = random.one_in(8);
    for (int64_t i = 0; i < elements; ++i) {
        float slope = random.bell();
        if (awkward && random.one_in(8)) {
            const float odd[] = {0.0f, -0.0f, random.subnormal(), random.huge(), random.huge(), random.not_finite()};
            slope = odd[random.below(6)];
        }
        write(c.grad.data(), c.grad_dtype, i, slope);
        c.stored_codes[i] = (int8_t)random.between(c.grid.code_min, c.grid.code_max);
    }
}

// ---------------------------------------------------------------------------------------------- buffers

bool exact_buffers = false;
int failures = 0;

void report(const Case &c, const char *isa, const char *what, int64_t index, double expected, double got) {
    printf("case %lld on %s: %s[%lld]: expected %.9g, got %.9g\n", (long long)c.number, isa, what, (long long)index,
           expected, got);
    printf("  %lld x %lld blocks of %d, %d bits [%d, %d], %s scales of %d bits, %s; dtypes in %d, out %d, gradient %d; "
           "noise %d, hard share %.9g; %d threads\n",
           (long long)c.rows, (long long)c.groups, c.grid.block, c.grid.bits, c.grid.code_min, c.grid.code_max,
           c.grid.signed_scale ? "signed" : "positive", c.grid.scale_bits, c.given ? "given" : "absmax", c.in_dtype,
           c.out_dtype, c.grad_dtype, c.noise.mode, c.noise.hard_share, c.threads);
    ++failures;
}

/* Memory of an exact size from the heap, at an address that is a multiple of the element's size and often of no more; at times
 * less than 256 bytes after another, but for multiples of 4096: outputs that lie so after weights may be treated backwards.
 * An address sanitizer sees each step beyond its end; without one, guards on both sides show what was overwritten. */
struct Buffer {
    enum { GUARD = 64, PAGE = 4096, FILL = 0xa5 };
    size_t front, bytes, back;
    uint8_t *memory;

    Buffer(size_t size, size_t element, Random &random, const Buffer *other = nullptr) : bytes(size) {
        front = random.one_in(2) ? 0 : element * (size_t)random.between(1, 15);
        back = 0;
        if (!exact_buffers) front += GUARD, back = GUARD;
        const bool after = other && random.one_in(3);
        const size_t room = after ? GUARD + PAGE : front;
        memory = (uint8_t *)malloc(room + bytes + back ? room + bytes + back : 1);
        if (after) {
            const size_t distance = random.one_in(2) ? 64 : element * (size_t)random.between(1, 255 / (int)element);
            front = GUARD + (size_t)((uintptr_t)other->data() + distance - (uintptr_t)memory - GUARD) % PAGE;
        }
        memset(memory, FILL, front + bytes + back);
    }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    ~Buffer() { free(memory); }
    uint8_t *data() const { return memory + front; }
    const Buffer &fill(const void *source) const {
        if (bytes) memcpy(data(), source, bytes);
        return *this;
    }
    bool intact() const {
        static const std::vector<uint8_t> fill(GUARD + PAGE, FILL);
        return memcmp(memory, fill.data(), front) == 0 && memcmp(data() + bytes, fill.data(), back) == 0;
    }
};

enum Kind { WHOLE_8, HALF_BITS, NUMBERS };

double value_at(const void *data, int dtype, Kind kind, int64_t i) {
    if (kind == WHOLE_8) return ((const int8_t *)data)[i];
    if (kind == HALF_BITS) return ((const uint16_t *)data)[i];
    return read(data, dtype, i);
}

/* With `any_nan`, a NaN agrees with a NaN: IEEE 754 leaves open which of two comes out of a sum. */
void compare(const Case &c, const char *isa, const char *what, const void *expected, const Buffer &got, size_t element,
             Kind kind, bool any_nan = false) {
    if (!got.intact()) report(c, isa, what, -1, NAN, NAN);
    if (got.bytes == 0 || memcmp(expected, got.data(), got.bytes) == 0) return;
    const int dtype = kind == NUMBERS && element == 2 ? (what[0] == 'g' ? c.grad_dtype : c.out_dtype) : QAD_F32;
    for (size_t i = 0; i < got.bytes / element; ++i) {
        if (memcmp((const uint8_t *)expected + i * element, got.data() + i * element, element) == 0) continue;
        const double wanted = value_at(expected, dtype, kind, i), found = value_at(got.data(), dtype, kind, i);
        if (any_nan && std::isnan(wanted) && std::isnan(found)) continue;
        return report(c, isa, what, i, wanted, found);
    }
}

// ---------------------------------------------------------------------------------------------- kernels

void check_kernels(const Case &c, const Results &r, const char *isa, Random &random) {
    const int64_t blocks = c.blocks(), elements = c.elements();
    const size_t in = size_of(c.in_dtype), out_size = size_of(c.out_dtype), grad_size = size_of(c.grad_dtype);
    Buffer weights(c.weights.size(), in, random), scales(c.scales.size() * 4, 4, random);
    weights.fill(c.weights.data());
    scales.fill(c.scales.data());
    const float *given = c.given ? (const float *)scales.data() : nullptr;
    {
        Buffer out(r.out.size(), out_size, random, &weights), own(blocks * 4, 4, random), both(c.scales.size() * 4, 4, random);
        both.fill(c.scales.data());
        const Buffer &used = c.used == 2 ? both : own;
        const int64_t damaged = qad_fake_quantize(
            weights.data(), c.in_dtype, c.used == 2 ? (const float *)both.data() : given,
            c.used ? (float *)used.data() : nullptr, out.data(), c.out_dtype, blocks, &c.grid, &c.noise, c.threads);
        if (damaged != r.damaged) report(c, isa, "damaged in forward", 0, (double)r.damaged, (double)damaged);
        compare(c, isa, "out", r.out.data(), out, out_size, NUMBERS);
        if (c.used) compare(c, isa, "used scales", r.used.data(), used, 4, NUMBERS);
    }
    {
        Buffer grad(c.grad.size(), grad_size, random), grad_scales(blocks * 4, 4, random);
        grad.fill(c.grad.data());
        const int64_t damaged = qad_fake_quantize_backward(grad.data(), c.grad_dtype, weights.data(), c.in_dtype, given,
                                                           c.learn ? (float *)grad_scales.data() : nullptr, blocks,
                                                           &c.grid, &c.noise, c.threads);
        if (damaged != r.damaged) report(c, isa, "damaged in backward", 0, (double)r.damaged, (double)damaged);
        compare(c, isa, "gradient", r.grad.data(), grad, grad_size, NUMBERS, true);
        if (c.learn) compare(c, isa, "gradient of scales", r.grad_scales.data(), grad_scales, 4, NUMBERS, true);
    }
    {
        Buffer codes(elements, 1, random), stored(blocks * 2, 2, random);
        const int64_t damaged = qad_quantize(weights.data(), c.in_dtype, given, (int8_t *)codes.data(),
                                             (uint16_t *)stored.data(), blocks, &c.grid, c.threads);
        if (damaged != r.damaged) report(c, isa, "damaged in quantize", 0, (double)r.damaged, (double)damaged);
        compare(c, isa, "codes", r.codes.data(), codes, 1, WHOLE_8);
        compare(c, isa, "stored scales", r.half_scales.data(), stored, 2, HALF_BITS);
    }
    {
        Buffer codes(elements, 1, random), stored(blocks * 2, 2, random), out(r.decoded.size(), out_size, random);
        codes.fill(c.stored_codes.data());
        stored.fill(c.stored_scales.data());
        qad_dequantize((const int8_t *)codes.data(), (const uint16_t *)stored.data(), out.data(), c.out_dtype, blocks,
                       &c.grid, c.threads);
        compare(c, isa, "out of dequantize", r.decoded.data(), out, out_size, NUMBERS);
    }
    if (c.draws) {
        const int64_t count = elements ? elements - random.below(32) : 0;
        Buffer uniform(count * 4, 4, random);
        qad_uniform16((float *)uniform.data(), count, c.noise.seed_low, c.noise.seed_high, c.noise.tensor, c.noise.step,
                      c.stream);
        compare(c, isa, "uniform16", r.uniform.data(), uniform, 4, NUMBERS);
    }
    if (memcmp(weights.data(), c.weights.data(), c.weights.size()) && c.weights.size())
        report(c, isa, "weights overwritten", 0, 0, 0);
}

/* Each code is looked up where csrc/qad.h says that it lies. */
void check_pack(const Case &c, Random &random) {
    const int bits = c.grid.bits, block = c.grid.block, layout = random.below(3);
    const int64_t blocks = c.blocks(), elements = c.elements(), columns = c.groups * block;
    // Rows of a wider tensor, at times: what lies between them is not ours.
    const int64_t stride = columns + (random.one_in(2) ? random.below(70) : 0);
    Buffer codes(c.rows * stride, 1, random), scales(blocks * 2, 2, random);
    std::vector<int8_t> wide(c.rows * stride, 85);
    for (int64_t i = 0; i < elements; ++i) wide[i / columns * stride + i % columns] = c.stored_codes[i];
    codes.fill(wide.data());
    scales.fill(c.stored_scales.data());
    const size_t per_block = block * bits / 8 + (layout == QAD_LAYOUT_GGUF ? 2 : 0);
    Buffer out(blocks * per_block, layout == QAD_LAYOUT_GPTQ ? 4 : 1, random);
    const int status = qad_pack((const int8_t *)codes.data(), stride, (const uint16_t *)scales.data(), out.data(),
                                c.rows, columns, &c.grid, layout);
    const int expected_status = layout == QAD_LAYOUT_GGUF && block != 32 ? -1 : 0;
    if (status != expected_status) report(c, "pack", "status", layout, expected_status, status);
    if (!out.intact()) report(c, "pack", "guards", layout, 0, 0);
    if (expected_status) return;
    for (int64_t i = 0; i < elements; ++i) {
        const int64_t row = i / columns, column = i % columns, b = i / block, j = i % block;
        int64_t byte;
        bool high = false;
        if (layout == QAD_LAYOUT_GGUF) {
            byte = b * per_block + 2 + (bits == 8 ? j : j % 16);
            high = bits == 4 && j >= 16;
        } else if (layout == QAD_LAYOUT_ONNX) {
            byte = i * bits / 8;
            high = bits == 4 && i % 2;
        } else {
            byte = (column * bits / 32 * c.rows + row) * 4 + column * bits / 8 % 4;
            high = bits == 4 && column % 2;
        }
        const int stored = out.data()[byte], field = bits == 8 ? stored : high ? stored >> 4 : stored & 15;
        const int code = bits == 8 && layout == QAD_LAYOUT_GGUF ? (int8_t)field : field - (1 << (bits - 1));
        if (code != c.stored_codes[i]) return report(c, "pack", "code", i, c.stored_codes[i], code);
    }
    if (layout == QAD_LAYOUT_GGUF)
        for (int64_t b = 0; b < blocks; ++b)
            if (memcmp(out.data() + b * per_block, &c.stored_scales[b], 2))
                return report(c, "pack", "scale", b, c.stored_scales[b], 0);
}

// ---------------------------------------------------------------------------------------------- dump

template <typename T> void put(FILE *file, const std::vector<T> &values) {
    fwrite(values.data(), sizeof(T), values.size(), file);
}

void dump(FILE *file, const Case &c, const Results &r) {
    const int32_t whole[] = {(int32_t)c.rows, (int32_t)c.groups, c.in_dtype, c.out_dtype, c.grad_dtype, c.given, c.draws};
    fwrite(whole, sizeof whole, 1, file);
    fwrite(&c.grid, sizeof c.grid, 1, file);
    fwrite(&c.noise, sizeof c.noise, 1, file);
    fwrite(&c.stream, 4, 1, file);
    fwrite(&r.damaged, 8, 1, file);
    put(file, c.weights), put(file, c.scales), put(file, c.grad), put(file, c.stored_codes), put(file, c.stored_scales);
    put(file, r.out), put(file, r.used), put(file, r.grad), put(file, r.grad_scales), put(file, r.codes);
    put(file, r.half_scales), put(file, r.decoded), put(file, r.uniform);
}

} // namespace

int main(int count, char **arguments) {
    int64_t cases = 1000, first = 0, large = 0;
    FILE *file = nullptr;
    for (int i = 1; i < count; ++i) {
        const char *word = arguments[i], *value = i + 1 < count ? arguments[i + 1] : "";
        if (!strcmp(word, "--exact"))
            exact_buffers = true;
        else if (!strcmp(word, "--cases") && ++i)
            cases = atoll(value);
        else if (!strcmp(word, "--first") && ++i)
            first = atoll(value);
        else if (!strcmp(word, "--large") && ++i)
            large = atoll(value);
        else if (!strcmp(word, "--dump") && ++i)
            file = fopen(value, "wb");
        else
            return fprintf(stderr, "unknown argument %s\n", word), 2;
    }
    Case c;
    Results r;
    int64_t elements = 0, damaged = 0, outside = 0;
    for (int64_t i = 0; i < cases + large && failures < 5; ++i) {
        random_case(first + i, i >= cases, c);
        scalar(c, r);
        elements += c.elements(), damaged += r.damaged, outside += r.outside;
        if (file) {
            dump(file, c, r);
            continue;
        }
        for (int isa = 0; isa < ISAS; ++isa) {
            if (qad_set_isa(isa)) continue;
            Random random = {(uint64_t)(first + i)};
            check_kernels(c, r, isa_names[isa], random);
        }
        Random random = {(uint64_t)(first + i)};
        if (random.one_in(2)) check_pack(c, random);
    }
    if (file && fclose(file)) return perror("--dump"), 2;
    printf("%lld cases, %lld elements, %lld damaged blocks, %lld elements outside, %d mismatches on", (long long)cases,
           (long long)elements, (long long)damaged, (long long)outside, failures);
    for (int isa = 0; isa < ISAS; ++isa)
        if (qad_has_isa(isa)) printf(" %s", isa_names[isa]);
    printf("\n");
    return failures ? 1 : 0;
}
