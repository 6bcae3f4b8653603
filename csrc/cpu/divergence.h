/* The distillation head: divergence, next-token loss and their gradient, one token's rows of logits at a time.
 *
 * Passes over the two rows, which stay in a second-level cache: the maxima; the sums of exponentials; the divergence,
 * and with it the forward kind's gradient. The gradient of the other two needs a mean first and takes a fourth pass,
 * which computes the probabilities anew: storing them would cost a row of memory per thread.
 *
 * Precision, in float32 but for the sums. A divergence is a difference of terms that cancel where student and teacher
 * agree. So each entry's share is written as a number that is never negative, with d = log p - log q: instead of
 * p (log p - log q), p (e^-d - 1 + d), which adds q - p and so nothing over the vocabulary. An error of a normalizer then
 * enters squared, and small d goes through a polynomial that does not cancel. The sums of exponentials leave the largest
 * entries, which are 1, to a count: a row that is nearly certain keeps what little its other entries hold.
 *
 * Gradients by the student's logits, times the square of the temperature T: forward T (q - p); for a divergence whose
 * derivative by q is f', T q (f' - sum q f').
 *
 * Probabilities below e^-87 of the largest count as 0. Minus infinity is a probability of 0; where the divergence itself
 * is infinite so is the value, and the gradient may hold NaN. A NaN spreads over its row.
 */
#ifndef QAD_DIVERGENCE_H
#define QAD_DIVERGENCE_H

#include <math.h>

#include "kernels.h"
#include "simd.h"

namespace {

/* Vectors of float32 terms that are added up before they go to a double: a few roundings, not a row's. */
enum { QAD_TERMS = 32 };

QAD_INLINE F negative(F x) { return float_of(bit_xor(bits_of(x), set_words(0x80000000u))); }
QAD_INLINE F magnitude(F x) { return float_of(bit_and(bits_of(x), set_words(0x7fffffffu))); }

/* e^x for x <= 1, within 1.01 ulp; 0 below -87. x = n log 2 + r, and a minimax polynomial for (e^r - 1 - r) / r^2. */
QAD_INLINE F exponential(F x) {
    const F magic = set(12582912.0f), lowest = set(-87.0f);
    const F clamped = max_of(lowest, x);
    const F shifted = fused_add(clamped, set(0x1.715476p+0f), magic); /* its low bits are n */
    const F n = sub(shifted, magic);
    /* 355/512 times n is exact, and so is its difference to x */
    const F r = fused_add(n, set(0x1.bd0106p-13f), fused_add(n, set(-0.693359375f), clamped));
    F series = set(0.0013813134282827377f);
    series = fused_add(series, r, set(0.008369418792426586f));
    series = fused_add(series, r, set(0.04166845604777336f));
    series = fused_add(series, r, set(0.16666515171527863f));
    series = fused_add(series, r, set(0.4999999403953552f));
    const F power = add(fused_add(mul(r, r), series, r), set(1.0f));
    const F scaled = float_of(add_words(bits_of(power), shift_left(bits_of(shifted), 23)));
    return choose(less(x, lowest), set(0.0f), scaled);
}

/* e^x - 1 - x for |x| <= 1, by a minimax polynomial for it over x^2: no cancellation near 0. */
QAD_INLINE F beyond_linear(F x) {
    F series = set(2.7722717277357423e-06f);
    series = fused_add(series, x, set(2.535482417442836e-05f));
    series = fused_add(series, x, set(0.00019844026246573776f));
    series = fused_add(series, x, set(0.001388545148074627f));
    series = fused_add(series, x, set(0.00833331048488617f));
    series = fused_add(series, x, set(0.04166673496365547f));
    series = fused_add(series, x, set(0.1666666716337204f));
    series = fused_add(series, x, set(0.5f));
    return mul(mul(x, x), series);
}

/* log(1 + w) for 1 + w up to 1.86, by way of z = w / (2 + w): log(1 + w) = 2 z + z^3 (2/3 + 2/5 z^2 + ...). */
struct Log1p {
    F value;
    F z, square, cubic; /* where 1 + w >= 0.67: z, z^2, and the terms from z^3 on */
};

QAD_INLINE Log1p log1p_of(F w) {
    constexpr uint32_t lowest = 0x3f2b851fu; /* 0.67, below which 1 + w = 2^k f with f from 0.67 to 1.34 */
    const F one = set(1.0f), whole = add(one, w);
    const M far = less(whole, float_of(set_words(lowest))); /* not so for a NaN, which goes on as w */
    const U moved = add_words(bits_of(whole), set_words(0x3f800000u - lowest));
    const F k = convert(add_words(shift_right(moved, 23), set_words((uint32_t)-127)));
    const F f = float_of(add_words(bit_and(moved, set_words(0x007fffffu)), set_words(lowest)));
    const F over_one = choose(far, sub(f, one), w); /* 1 + w has lost bits of w */
    Log1p log;
    log.z = div(over_one, add(over_one, set(2.0f)));
    log.square = mul(log.z, log.z);
    F series = set(0.268052339553833f);
    series = fused_add(series, log.square, set(0.28206634521484375f));
    series = fused_add(series, log.square, set(0.4001121520996094f));
    series = fused_add(series, log.square, set(0.6666656136512756f));
    log.cubic = mul(mul(log.z, log.square), series);
    log.value = fused_add(keep_if(far, k), set(0x1.62e43p-1f), add(add(log.z, log.z), log.cubic));
    return log;
}

/* A sum of floats that goes to a double now and then. */
struct Sum {
    F part;
    double total;
};

/* The sum of a vector's lanes, in double. */
QAD_INLINE double wide_sum(F a) {
    float lanes[width];
    store(lanes, a);
    double sum = 0.0;
    for (int k = 0; k < width; ++k) sum += (double)lanes[k];
    return sum;
}

QAD_INLINE Sum no_terms() { return {set(0.0f), 0.0}; }
QAD_INLINE void add_terms(Sum &sum, F terms) { sum.part = add(sum.part, terms); }
QAD_INLINE void flush(Sum &sum) {
    sum.total += wide_sum(sum.part);
    sum.part = set(0.0f);
}

/* A sum of e^x over a row where no x is above 0. */
struct Exponentials {
    Sum others; /* of those below 0 */
    F maxima;   /* how many are 0 */
};

QAD_INLINE Exponentials no_exponentials() { return {no_terms(), set(0.0f)}; }
QAD_INLINE void add_exponentials(Exponentials &sum, F x) {
    const M top = less_equal(set(0.0f), x);
    sum.maxima = add(sum.maxima, keep_if(top, set(1.0f)));
    add_terms(sum.others, choose(top, set(0.0f), exponential(x)));
}
/* The sum less 1, for log1p. */
QAD_INLINE double less_one(const Exponentials &sum) {
    return (wide_sum(sum.maxima) - 1.0) + sum.others.total;
}

/* Call body(student's, teacher's) for each vector of two rows, and settle() now and then. What body returns goes to
 * `out`, which may be one of the rows, or nowhere if it is null. The last vector is filled up with minus infinity. */
template <typename Body, typename Settle>
QAD_INLINE void for_row(const float *student, const float *teacher, int64_t count, float *out, Body body,
                        Settle settle) {
    int terms = 0;
    for (int64_t i = 0; i < count; i += width) {
        const int left = count - i < width ? (int)(count - i) : width;
        float padded[2][width];
        const float *s = student + i, *t = teacher + i;
        if (left < width) {
            for (int k = 0; k < width; ++k) {
                padded[0][k] = k < left ? s[k] : -INFINITY;
                padded[1][k] = k < left ? t[k] : -INFINITY;
            }
            s = padded[0];
            t = padded[1];
        }
        const F result = body(load(s), load(t));
        if (out && left == width) {
            store(out + i, result);
        } else if (out) {
            store(padded[0], result);
            memcpy(out + i, padded[0], (size_t)left * sizeof(float));
        }
        if (++terms == QAD_TERMS) {
            settle();
            terms = 0;
        }
    }
    settle();
}

QAD_INLINE float largest(F a) {
    float lanes[width];
    store(lanes, a);
    float most = lanes[0];
    for (int k = 1; k < width; ++k) most = lanes[k] > most ? lanes[k] : most;
    return most;
}

/* What is known of a token's two rows after the first two passes. */
struct Row {
    F student_max, teacher_max, coldness; /* 1 / T */
    F q_factor, p_factor;                 /* T over the sum of exponentials: probabilities come out times T */
    F offset, residual;                   /* of the teacher's maximum to the student's: a whole number, and the rest */
    F shift;                              /* log of the teacher's sum over the student's */
    F beta, rest;                         /* and 1 - beta */
    F heavier;                            /* 1 if the teacher has the larger weight, beta, else -1 */
};

QAD_INLINE F student_exponent(const Row &row, F logits) { return mul(sub(logits, row.student_max), row.coldness); }
QAD_INLINE F teacher_exponent(const Row &row, F logits) { return mul(sub(logits, row.teacher_max), row.coldness); }
/* d. The difference of the logits themselves is exact where they are close, which that of the exponents is not; a whole
 * number is taken off first, so that two models whose logits differ by a large constant are close too. */
QAD_INLINE F log_ratio(const Row &row, F student, F teacher) {
    const F apart = sub(sub(teacher, add(student, row.offset)), row.residual);
    return fused_add(apart, row.coldness, negative(row.shift));
}

/* An entry of a row: T q, T p, d. */
struct Entry {
    F q, p, d;
};

QAD_INLINE Entry entry_of(const Row &row, F student, F teacher) {
    const F a = student_exponent(row, student), b = teacher_exponent(row, teacher);
    return {mul(exponential(a), row.q_factor), mul(exponential(b), row.p_factor), log_ratio(row, student, teacher)};
}

/* 0 where a probability is 0, whatever it is multiplied with. */
QAD_INLINE F weighted(F probability, F x) {
    return choose(less_equal(probability, set(0.0f)), set(0.0f), mul(probability, x));
}

/* An entry's part in a divergence. */
struct Share {
    F q;     /* T q */
    F term;  /* T times what it adds */
    F slope; /* forward: the gradient; else f' */
};

/* KL(p || q) */
QAD_INLINE Share forward_share(const Row &row, F student, F teacher) {
    const Entry e = entry_of(row, student, teacher);
    const M close = less_equal(magnitude(e.d), set(1.0f));
    const F curved = beyond_linear(negative(e.d)), apart = sub(e.q, e.p);
    return {e.q, choose(close, mul(e.p, curved), add(apart, weighted(e.p, e.d))),
            choose(close, mul(e.p, sub(curved, e.d)), apart)};
}

/* KL(q || p) */
QAD_INLINE Share reverse_share(const Row &row, F student, F teacher) {
    const Entry e = entry_of(row, student, teacher);
    const M close = less_equal(magnitude(e.d), set(1.0f));
    const F apart = sub(sub(e.p, e.q), weighted(e.q, e.d));
    return {e.q, choose(close, mul(e.q, beyond_linear(e.d)), apart), negative(e.d)};
}

/* beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; f' = (1 - beta) log(q / m).
 *
 * One of p and q is the reference, the other x = e^y times it, and m = 1 + w times it with w = beta_other (x - 1).
 * Where they are close, the term over the reference is beta_other (x y - x + 1) - ((1 + w) log(1 + w) - w), two numbers
 * of second order: the reference is the one of the larger weight, so that their difference keeps a third of the first.
 * Elsewhere it is the larger probability, so that x and w are bounded. */
QAD_INLINE Share jsd_share(const Row &row, F student, F teacher) {
    const F one = set(1.0f), zero = set(0.0f);
    const F a = student_exponent(row, student), b = teacher_exponent(row, teacher), d = log_ratio(row, student, teacher);
    const M close = less_equal(magnitude(d), one);
    const M teacher_first = less(zero, choose(close, row.heavier, d));
    const F reference = mul(exponential(choose(teacher_first, b, a)), choose(teacher_first, row.p_factor, row.q_factor));
    const F of_reference = choose(teacher_first, row.beta, row.rest);
    const F of_other = choose(teacher_first, row.rest, row.beta);
    const F y = choose(teacher_first, negative(d), d), x = exponential(y);
    const F curved = beyond_linear(negative(y)); /* x times it is x y - x + 1, and x - 1 is x (y - it) */
    const F w = mul(of_other, choose(close, mul(x, sub(y, curved)), sub(x, one)));
    const Log1p log = log1p_of(w);
    const F reference_over_m = negative(log.value), other_over_m = add(y, reference_over_m);
    const F entropy = mul(fused_add(w, set(0.5f), one),
                          fused_add(add(one, log.z), log.cubic, add(log.square, log.square)));
    const F near = sub(mul(of_other, mul(x, curved)), entropy);
    const F far = fused_add(of_reference, reference_over_m, mul(of_other, weighted(x, other_over_m)));
    return {mul(reference, choose(teacher_first, x, one)), weighted(reference, choose(close, near, far)),
            mul(row.rest, choose(teacher_first, other_over_m, reference_over_m))};
}

template <int kind> QAD_INLINE Share share_of(const Row &row, F student, F teacher) {
    if (kind == QAD_KL_FORWARD) return forward_share(row, student, teacher);
    if (kind == QAD_KL_REVERSE) return reverse_share(row, student, teacher);
    return jsd_share(row, student, teacher);
}

/* The first two passes. `plain_less_one`: the student's sum at temperature 1, less 1. */
Row row_of(const qad_divergence_job &job, const float *student, const float *teacher, bool labelled,
           double &plain_less_one) {
    Row row;
    F most = set(-INFINITY), teacher_most = set(-INFINITY);
    for_row(
        student, teacher, job.vocabulary, nullptr,
        [&](F s, F t) {
            most = max_of(most, s);
            teacher_most = max_of(teacher_most, t);
            return s;
        },
        [] {});
    const float top = largest(most), teacher_top = largest(teacher_most), offset = rintf(teacher_top - top);
    row.student_max = set(top);
    row.teacher_max = set(teacher_top);
    row.offset = set(offset);
    row.residual = set(teacher_top - (top + offset));
    row.coldness = set(1.0f / job.temperature);
    row.beta = set(job.beta);
    row.rest = set(1.0f - job.beta);
    row.heavier = set(job.beta > 0.5f ? 1.0f : -1.0f);

    const bool tempered = job.temperature != 1.0f;
    Exponentials by_student = no_exponentials(), by_teacher = no_exponentials(), plain = no_exponentials();
    for_row(
        student, teacher, job.vocabulary, nullptr,
        [&](F s, F t) {
            add_exponentials(by_student, student_exponent(row, s));
            add_exponentials(by_teacher, teacher_exponent(row, t));
            if (tempered && labelled) add_exponentials(plain, sub(s, row.student_max));
            return s;
        },
        [&] {
            flush(by_student.others);
            flush(by_teacher.others);
            flush(plain.others);
        });
    const double student_sum = less_one(by_student), teacher_sum = less_one(by_teacher);
    plain_less_one = tempered ? less_one(plain) : student_sum;
    row.q_factor = set((float)(job.temperature / (1.0 + student_sum)));
    row.p_factor = set((float)(job.temperature / (1.0 + teacher_sum)));
    row.shift = set((float)(log1p(teacher_sum) - log1p(student_sum)));
    return row;
}

/* What is added to the gradient for the next token: weight x softmax at temperature 1; its label comes last. */
struct NextToken {
    float weight;
    bool tempered;
    float factor; /* weight over the student's sum at temperature 1 */
};

QAD_INLINE F add_next_token(const NextToken &next, const Row &row, F student, F scaled_q, F gradient) {
    if (next.weight == 0.0f) return gradient;
    if (!next.tempered) return fused_add(scaled_q, set(next.weight), gradient);
    return fused_add(exponential(sub(student, row.student_max)), set(next.factor), gradient);
}

/* The third pass. Returns T x the divergence; the forward kind also writes the gradient unless `out` is null, the others
 * sum up T x the mean of f'. */
template <int kind>
double sum_row(const Row &row, const NextToken &next, const float *student, const float *teacher, int64_t count,
               float *out, double &mean) {
    Sum value = no_terms(), mean_sum = no_terms();
    for_row(
        student, teacher, count, kind == QAD_KL_FORWARD ? out : nullptr,
        [&](F s, F t) {
            const Share share = share_of<kind>(row, s, t);
            add_terms(value, share.term);
            if (kind == QAD_KL_FORWARD) return add_next_token(next, row, s, share.q, share.slope);
            add_terms(mean_sum, weighted(share.q, share.slope));
            return s;
        },
        [&] {
            flush(value);
            flush(mean_sum);
        });
    mean = mean_sum.total;
    return value.total;
}

/* The fourth pass, of the kinds that need it. */
template <int kind>
void write_gradient(const Row &row, const NextToken &next, const float *student, const float *teacher, int64_t count,
                    float *out, float mean) {
    for_row(
        student, teacher, count, out,
        [&](F s, F t) {
            const Share share = share_of<kind>(row, s, t);
            return add_next_token(next, row, s, share.q, weighted(share.q, sub(share.slope, set(mean))));
        },
        [] {});
}

template <int kind> void divergence_row(const qad_divergence_job &job, int64_t token) {
    float *student = job.student + token * job.student_stride;
    const float *teacher = job.teacher + token * job.teacher_stride;
    const int64_t count = job.vocabulary, label = job.labels ? job.labels[token] : -1;
    const bool labelled = label >= 0, known = labelled && label < count;
    /* A label outside the vocabulary is the caller's error; NaN shows it. */
    const float at_label = known ? student[label] : NAN, teacher_at_label = known ? teacher[label] : NAN;

    double plain_less_one, mean;
    const Row row = row_of(job, student, teacher, labelled, plain_less_one);
    float lanes[width];
    store(lanes, row.student_max);
    const double nll = labelled ? ((double)lanes[0] - (double)at_label) + log1p(plain_less_one) : 0.0;
    const float weight = labelled ? job.next_token_weight : 0.0f;
    const NextToken next = {weight, job.temperature != 1.0f, (float)(weight / (1.0 + plain_less_one))};
    const NextToken none = {0.0f, false, 0.0f};
    float *out = job.keep_logits ? nullptr : student;

    job.divergence[token] = sum_row<kind>(row, next, student, teacher, count, out, mean) / job.temperature;
    job.nll[token] = nll;
    if (!out) return;
    /* By f' of the same d throughout, so that an error common to all d leaves the gradient. */
    const float mean_slope = (float)(mean / job.temperature);
    if (kind != QAD_KL_FORWARD) write_gradient<kind>(row, next, student, teacher, count, out, mean_slope);
    if (known && weight != 0.0f) {
        /* softmax - 1 where the label is nearly certain: not the difference of two floats near 1 */
        float gradient;
        if (kind == QAD_KL_FORWARD)
            sum_row<kind>(row, none, &at_label, &teacher_at_label, 1, &gradient, mean);
        else
            write_gradient<kind>(row, none, &at_label, &teacher_at_label, 1, &gradient, mean_slope);
        student[label] = (float)((double)gradient + weight * expm1(-nll));
    }
}

void divergence_rows(const qad_divergence_job *job, int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
        if (job->kind == QAD_KL_FORWARD)
            divergence_row<QAD_KL_FORWARD>(*job, token);
        else if (job->kind == QAD_KL_REVERSE)
            divergence_row<QAD_KL_REVERSE>(*job, token);
        else
            divergence_row<QAD_KL_JSD>(*job, token);
    }
}

} // namespace
#endif
