/* The distillation head on CUDA: divergence, next-token loss and their gradient, one row of logits per CTA.
 *
 * A first pass over both rows finds their normalizers (maximum and sum of exponentials at once), a second the
 * divergence; for the forward divergence it also writes the gradient, which for the others needs the divergence first
 * and takes a third pass. The student's row is overwritten, so no third tensor of logits exists.
 *
 * Precision: exponentials in float32, sums of four of them in float32, sums of those in float64. The terms of a
 * divergence cancel when student and teacher are close, so each is written as a number that is never negative, with
 * d = log p - log q: p (e^-d - 1 + d) adds q - p to the usual p (log p - log q), which sums to zero over the vocabulary.
 * An error of the normalizers then enters squared. What is given up: some arithmetic per element, hidden behind memory.
 *
 * The gradient of T^2 x divergence by the student's logits is T (q - p) for the forward divergence, T q (f' - sum q f')
 * for one whose derivative by q is f'.
 *
 * Minus infinity is a probability of 0; where the divergence itself is infinite so is the value, and the gradient may
 * hold NaN. A NaN spreads over its row.
 */
#include "elements.cuh"

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / WARP;
constexpr float LOWEST = -3.402823466e38f;
enum Kind { FORWARD, REVERSE, JSD };

/* qad/native_cuda.py fills the same struct. Shapes: student, teacher [tokens, vocabulary]; strides in elements. */
struct RowArguments {
    void *student;            /* overwritten with the gradient unless keep_logits */
    const void *teacher;
    const int64_t *labels;    /* null, or the next token of each row, negative for none */
    double *divergence, *nll; /* one per row */
    int64_t student_stride, teacher_stride, tokens, vocabulary;
    float beta, temperature, next_token_weight;
    uint32_t keep_logits;
};
static_assert(sizeof(RowArguments) == 5 * 8 + 4 * 8 + 4 * 4, "qad/native_cuda.py lays the same struct out");

template <class Type> QAD_DEVICE float to_float(typename Type::Storage bits) {
    if constexpr (Type::PER_WORD == 1) return __uint_as_float(bits);
    else return Type::value(bits);
}

template <class Type> QAD_DEVICE typename Type::Storage from_float(float value) {
    if constexpr (Type::PER_WORD == 1) return __float_as_uint(value);
    else return (typename Type::Storage)Type::pair(value, 0.0f);
}

/* Four elements of a row for each thread: neighbours, as one vector, where the whole chunk exists and rows are
 * aligned; else every THREADS-th, one by one. */
struct Four {
    int64_t first;
    int step;
};

QAD_DEVICE Four four_of(int64_t chunk, int64_t vocabulary, bool aligned) {
    const bool vector = aligned && chunk + 4 * (int64_t)blockDim.x <= vocabulary;
    Four four;
    four.first = chunk + (vector ? 4 * (int64_t)threadIdx.x : (int64_t)threadIdx.x);
    four.step = vector ? 1 : (int)blockDim.x;
    return four;
}

template <class Type>
QAD_DEVICE void load_four(float values[4], const typename Type::Storage *row, const Four &four, int64_t vocabulary) {
    if (four.step == 1) {
        if constexpr (Type::PER_WORD == 1) {
            const uint4 words = *reinterpret_cast<const uint4 *>(row + four.first);
            values[0] = __uint_as_float(words.x);
            values[1] = __uint_as_float(words.y);
            values[2] = __uint_as_float(words.z);
            values[3] = __uint_as_float(words.w);
        } else {
            const uint2 words = *reinterpret_cast<const uint2 *>(row + four.first);
            values[0] = Type::value((uint16_t)words.x);
            values[1] = Type::value((uint16_t)(words.x >> 16));
            values[2] = Type::value((uint16_t)words.y);
            values[3] = Type::value((uint16_t)(words.y >> 16));
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int64_t index = four.first + (int64_t)i * four.step;
            values[i] = index < vocabulary ? to_float<Type>(row[index]) : LOWEST; /* adds nothing to any sum */
        }
    }
}

template <class Type>
QAD_DEVICE void store_four(typename Type::Storage *row, const float values[4], const Four &four, int64_t vocabulary) {
    if (four.step == 1) {
        if constexpr (Type::PER_WORD == 1) {
            *reinterpret_cast<uint4 *>(row + four.first) = make_uint4(
                __float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
                __float_as_uint(values[3]));
        } else {
            *reinterpret_cast<uint2 *>(row + four.first) =
                make_uint2(Type::pair(values[0], values[1]), Type::pair(values[2], values[3]));
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int64_t index = four.first + (int64_t)i * four.step;
            if (index < vocabulary) row[index] = from_float<Type>(values[i]);
        }
    }
}

QAD_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
QAD_DEVICE double plus(double a, double b) { return a + b; }

/* Combine a value of every thread of the CTA, in an order that depends on its size alone; all threads get the result. */
template <class Value, Value (*combine)(Value, Value)> QAD_DEVICE Value over_cta(Value value, Value neutral) {
    __shared__ Value of_warps[WARPS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int distance = WARP / 2; distance; distance /= 2) {
        value = combine(value, __shfl_xor_sync(WHOLE_WARP, value, distance));
    }
    if (lane == 0) of_warps[warp] = value;
    __syncthreads();
    value = lane < (int)blockDim.x / WARP ? of_warps[lane] : neutral;
#pragma unroll
    for (int distance = WARP / 2; distance; distance /= 2) {
        value = combine(value, __shfl_xor_sync(WHOLE_WARP, value, distance));
    }
    __syncthreads(); /* of_warps is free again */
    return value;
}
QAD_DEVICE float largest_of_cta(float value) { return over_cta<float, larger>(value, LOWEST); }
QAD_DEVICE double sum_of_cta(double value) { return over_cta<double, plus>(value, 0.0); }

/* A thread's share of sum exp((x - max) / T), relative to the largest x that it has seen. */
struct Exponentials {
    float largest = LOWEST;
    double sum = 0.0;

    __device__ __forceinline__ void add(const float values[4], float coldness) {
        const float top = fmaxf(fmaxf(values[0], values[1]), fmaxf(values[2], values[3]));
        if (top > largest) {
            sum *= expf((largest - top) * coldness);
            largest = top;
        }
        float terms[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) terms[i] = expf((values[i] - largest) * coldness);
        sum += (terms[0] + terms[1]) + (terms[2] + terms[3]);
    }

    __device__ __forceinline__ double total(float of_all, float coldness) const {
        return sum_of_cta(sum * expf((largest - of_all) * coldness));
    }
};

/* A number in two floats. */
struct Split {
    float high, low;
};

QAD_DEVICE Split split(double value) {
    const float high = (float)value;
    return {high, (float)(value - (double)high)};
}

/* (a - b) x factor - offset, rounded about once: logits of 30 that differ by 1 would else lose the last digits. */
QAD_DEVICE float difference(float a, float b, float factor, Split offset) {
    const float high = a - b, back = high - a;
    /* Where one is infinite the difference is, and leaves no digits. */
    const float low = fabsf(high) <= -LOWEST ? (a - (high - back)) - (b + back) : 0.0f;
    return fmaf(high, factor, -offset.high) + fmaf(low, factor, -offset.low);
}

/* 0 where a probability is 0, whatever it is multiplied with. */
QAD_DEVICE float weighted(float probability, float x) { return probability == 0.0f ? 0.0f : probability * x; }

/* p (e^-d - 1 + d) for d = log p - log q. */
QAD_DEVICE float forward_term(float p, float q, float d) {
    if (fabsf(d) < 0.5f) {
        float series = 1.0f / 3628800.0f; /* e^-d - 1 + d = d^2 (1/2! - d/3! + d^2/4! - ...), to d^10 / 10! */
        series = fmaf(series, -d, 1.0f / 362880.0f);
        series = fmaf(series, -d, 1.0f / 40320.0f);
        series = fmaf(series, -d, 1.0f / 5040.0f);
        series = fmaf(series, -d, 1.0f / 720.0f);
        series = fmaf(series, -d, 1.0f / 120.0f);
        series = fmaf(series, -d, 1.0f / 24.0f);
        series = fmaf(series, -d, 1.0f / 6.0f);
        series = fmaf(series, -d, 0.5f);
        return p * (d * d * series);
    }
    /* Where e^-d grows large, p e^-d = q says the same without an overflow. */
    return d < -4.0f || p == 0.0f ? q - p + weighted(p, d) : p * (expm1f(-d) + d);
}

/* (1 + w) log(1 + w) - w for w within (-1/2, 2/3): with z = w / (2 + w), log(1 + w) = 2 (z + z^3 / 3 + z^5 / 5 + ...) */
QAD_DEVICE float entropy_term(float w) {
    const float z = w / (2.0f + w), square = z * z;
    float series = 1.0f / 13.0f;
    series = fmaf(series, square, 1.0f / 11.0f);
    series = fmaf(series, square, 1.0f / 9.0f);
    series = fmaf(series, square, 1.0f / 7.0f);
    series = fmaf(series, square, 1.0f / 5.0f);
    series = fmaf(series, square, 1.0f / 3.0f);
    return 2.0f * (square + (1.0f + z) * (z * square * series)) / (1.0f - z);
}

/* log m - log q for the mixture m = beta p + (1 - beta) q. */
QAD_DEVICE float log_mixture(float d, float beta) {
    return d > 0.0f ? d + log1pf((1.0f - beta) * expm1f(-d)) : log1pf(beta * expm1f(d));
}

/* beta p (log p - log m) + (1 - beta) q (log q - log m); `h` is log m - log q. */
QAD_DEVICE float mixture_term(float p, float q, float d, float h, float beta) {
    if (fabsf(d) < 0.5f) return beta * forward_term(p, q, d) - q * entropy_term(beta * expm1f(d));
    const float log_p_over_m = d > 0.0f ? -log1pf((1.0f - beta) * expm1f(-d)) : d - h;
    return beta * weighted(p, log_p_over_m) - (1.0f - beta) * weighted(q, h);
}

template <class Type, int KIND> QAD_DEVICE void divergence(const RowArguments &arguments) {
    typedef typename Type::Storage Storage;
    const int64_t vocabulary = arguments.vocabulary;
    const int64_t step = 4 * (int64_t)blockDim.x;
    const float temperature = arguments.temperature, coldness = 1.0f / temperature, beta = arguments.beta;

    for (int64_t token = blockIdx.x; token < arguments.tokens; token += gridDim.x) {
        Storage *student = static_cast<Storage *>(arguments.student) + token * arguments.student_stride;
        const Storage *teacher = static_cast<const Storage *>(arguments.teacher) + token * arguments.teacher_stride;
        const bool aligned = ((reinterpret_cast<uint64_t>(student) | reinterpret_cast<uint64_t>(teacher)) & 15) == 0;
        const int64_t label = arguments.labels ? arguments.labels[token] : -1;
        const bool labelled = label >= 0;
        /* A label outside the vocabulary is an error of the caller; NaN makes it visible. */
        float label_logit = __uint_as_float(0x7fc00000u);
        if (labelled && label < vocabulary) label_logit = to_float<Type>(student[label]);

        Exponentials by_student, by_teacher, plain;
        for (int64_t chunk = 0; chunk < vocabulary; chunk += step) {
            const Four four = four_of(chunk, vocabulary, aligned);
            float s[4], t[4];
            load_four<Type>(s, student, four, vocabulary);
            load_four<Type>(t, teacher, four, vocabulary);
            by_student.add(s, coldness);
            by_teacher.add(t, coldness);
            if (labelled && temperature != 1.0f) plain.add(s, 1.0f);
        }
        const float student_max = largest_of_cta(by_student.largest), teacher_max = largest_of_cta(by_teacher.largest);
        const double student_sum = by_student.total(student_max, coldness);
        const double teacher_sum = by_teacher.total(teacher_max, coldness);
        const double plain_sum = temperature != 1.0f ? plain.total(student_max, 1.0f) : student_sum;
        const float q_factor = (float)(1.0 / student_sum), p_factor = (float)(1.0 / teacher_sum);
        /* log p - log q = (t - s) / T - shift */
        const double shift = ((double)teacher_max - (double)student_max) / (double)temperature +
                             log(teacher_sum / student_sum);
        const Split to_log = split(shift);
        const float weight = labelled ? arguments.next_token_weight : 0.0f;
        const float plain_factor = weight * (float)(1.0 / plain_sum);
        const bool write = !arguments.keep_logits;

        /* The gradient of the next-token loss, weight x (softmax - one at the label), is added to each gradient. */
        const auto next_token = [&](float logit, int64_t index) {
            const float hit = index == label ? weight : 0.0f;
            return expf(logit - student_max) * plain_factor - hit;
        };

        double value = 0.0, by_q = 0.0;
        for (int64_t chunk = 0; chunk < vocabulary; chunk += step) {
            const Four four = four_of(chunk, vocabulary, aligned);
            float s[4], t[4], terms[4], q_terms[4];
            load_four<Type>(s, student, four, vocabulary);
            load_four<Type>(t, teacher, four, vocabulary);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float q = expf((s[i] - student_max) * coldness) * q_factor;
                const float p = expf((t[i] - teacher_max) * coldness) * p_factor;
                const float d = difference(t[i], s[i], coldness, to_log);
                if constexpr (KIND == FORWARD) {
                    terms[i] = forward_term(p, q, d);
                    float gradient = temperature * (q - p);
                    if (weight != 0.0f) gradient += next_token(s[i], four.first + (int64_t)i * four.step);
                    s[i] = gradient;
                } else if constexpr (KIND == REVERSE) {
                    terms[i] = forward_term(q, p, -d);
                } else {
                    const float h = log_mixture(d, beta);
                    terms[i] = mixture_term(p, q, d, h, beta);
                    q_terms[i] = weighted(q, -h);
                }
            }
            value += (terms[0] + terms[1]) + (terms[2] + terms[3]);
            if constexpr (KIND == JSD) by_q += (q_terms[0] + q_terms[1]) + (q_terms[2] + q_terms[3]);
            if (KIND == FORWARD && write) store_four<Type>(student, s, four, vocabulary);
        }
        value = sum_of_cta(value);

        if (KIND != FORWARD && write) {
            const float mean = KIND == JSD ? (float)sum_of_cta(by_q) : 0.0f;
            const Split to_ratio = split(value - shift); /* log q - log p - value, at once */
            const float factor = KIND == JSD ? temperature * (1.0f - beta) : temperature;
            for (int64_t chunk = 0; chunk < vocabulary; chunk += step) {
                const Four four = four_of(chunk, vocabulary, aligned);
                float s[4], t[4];
                load_four<Type>(s, student, four, vocabulary);
                load_four<Type>(t, teacher, four, vocabulary);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float q = expf((s[i] - student_max) * coldness) * q_factor;
                    float ratio;
                    if constexpr (KIND == JSD) {
                        ratio = -log_mixture(difference(t[i], s[i], coldness, to_log), beta) - mean;
                    } else {
                        ratio = difference(s[i], t[i], coldness, to_ratio);
                    }
                    float gradient = factor * weighted(q, ratio);
                    if (weight != 0.0f) gradient += next_token(s[i], four.first + (int64_t)i * four.step);
                    s[i] = gradient;
                }
                store_four<Type>(student, s, four, vocabulary);
            }
        }
        if (threadIdx.x == 0) {
            arguments.divergence[token] = value;
            arguments.nll[token] =
                labelled ? (double)student_max + log(plain_sum) - (double)label_logit : 0.0;
        }
    }
}

/* qad_divergence_<kind>_<type> */
#define ROW_KERNEL(kind, type, Type, KIND)                                                                             \
    QAD_KERNEL(qad_divergence_##kind##_##type, THREADS, RowArguments, (divergence<Type, KIND>))
#define FOR_KIND(kind, KIND) ROW_KERNEL(kind, f32, F32, KIND) ROW_KERNEL(kind, bf16, BF16, KIND)

FOR_KIND(forward, FORWARD)
FOR_KIND(reverse, REVERSE)
FOR_KIND(jsd, JSD)
