/* Rounding to codes of 4 bits by a table: a rounding sum ends in the code, and that looks up the product of the code
 * and its block's scale. The table also clamps: it has an entry for every code from -16 to 15.
 *
 * Of fp16, and of bf16 where an instruction rounds two vectors, products are rounded after they were looked up. Other
 * bf16 is rounded before, because a block has fewer codes than elements; so is what comes from bf16, whose pairs would
 * have to be interleaved again; and on some processors fp16 without noise (see rounds_tables).
 */
#ifndef QAD_LOOK_UP_H
#define QAD_LOOK_UP_H

#include "../qad.h"
#include "elements.h"
#include "simd.h"

#ifdef QAD_HAS_LOOK_UP
namespace {

constexpr int table_size = 32;

/* What the lowest 5 bits of a rounding sum mean. */
QAD_INLINE int code_from(int bits, const qad_grid &grid) {
    const int code = bits < table_size / 2 ? bits : bits - table_size;
    return code < grid.code_min ? grid.code_min : code > grid.code_max ? grid.code_max : code;
}

/* Products as they are. */
struct ProductTables {
    struct Table {
        F low, high;

        QAD_MEMBER Pair look_up(F first, F second) const {
            return {look_up_words(low, high, bits_of(first)), look_up_words(low, high, bits_of(second))};
        }
    };

    Table codes;

    explicit ProductTables(const qad_grid &grid) {
        float all[table_size];
        for (int i = 0; i < table_size; ++i) all[i] = (float)code_from(i, grid);
        codes = {load(all), load(all + width)};
    }

    QAD_MEMBER Table table_of(F scale) const { return {mul(codes.low, scale), mul(codes.high, scale)}; }
};

/* Products rounded to 16 bits. Pairs come out interleaved, as words, or one vector after the other. */
template <int dtype, bool interleaved> struct HalfTables {
    typedef U Table;

    F codes;
    U halves; /* which half of the products a sum means */
    U order;  /* of a pair's halves, one vector after the other */

    explicit HalfTables(const qad_grid &grid) {
        float all[width];
        uint16_t half[table_size], place[table_size];
        for (int i = 0; i < width; ++i) all[i] = (float)(grid.code_min + i);
        for (int i = 0; i < table_size; ++i) {
            const int from_first = code_from(i, grid) - grid.code_min;
            half[i] = (uint16_t)(dtype == QAD_BF16 ? 2 * from_first + 1 : from_first);
            place[i / 2 + i % 2 * width] = (uint16_t)i;
        }
        codes = load(all);
        halves = load_words(half);
        order = load_words(place);
    }

    QAD_MEMBER Table table_of(F scale) const {
        const F products = mul(codes, scale);
        return look_up_halves(dtype == QAD_BF16 ? round_bfloat(products) : round_half(products), halves);
    }
    QAD_MEMBER void store_pair(uint16_t *p, Table table, F first, F second, bool past) const {
        const U pairs = look_up_halves(table, join_halves(bits_of(first), shift_left(bits_of(second), 16)));
        put_words(p, interleaved ? pairs : look_up_halves(pairs, order), past);
    }
};

/* The tables for what is stored as E does it. */
template <typename E> struct LookUp : ProductTables {
    using ProductTables::ProductTables;

    QAD_MEMBER void store_pair(uint16_t *p, const Table &table, F first, F second, bool past) const {
        put_words(p, E::pair_of(table.look_up(first, second)), past);
    }
};

template <> struct LookUp<Elements<QAD_F32>> : ProductTables {
    using ProductTables::ProductTables;

    QAD_MEMBER void store_pair(float *p, const Table &table, F first, F second, bool past) const {
        const Pair pair = table.look_up(first, second);
        put_words(p, bits_of(pair.first), past);
        put_words(p + width, bits_of(pair.second), past);
    }
};

template <> struct LookUp<Elements<QAD_F16>> : ProductTables {
    using ProductTables::ProductTables;

    QAD_MEMBER void store_pair(uint16_t *p, const Table &table, F first, F second, bool past) const {
        const Pair pair = table.look_up(first, second);
        if (past) return stream_words(p, Elements<QAD_F16>::pair_of(pair));
        /* Apart: to join them would take a place at the port that conversions and tables need. */
        store_half(p, pair.first);
        store_half(p + width, pair.second);
    }
};

template <> struct LookUp<Elements<QAD_BF16>> : HalfTables<QAD_BF16, true> {
    using HalfTables<QAD_BF16, true>::HalfTables;
};

#ifndef QAD_HAS_BFLOATS
template <> struct LookUp<NormalBfloatInOrder> : HalfTables<QAD_BF16, false> {
    using HalfTables<QAD_BF16, false>::HalfTables;
};
#endif

} // namespace
#endif
#endif
