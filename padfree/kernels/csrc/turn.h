/* Sixteen planes beside each other, pixel by pixel, and back. */
#ifndef PADFREE_TURN_H
#define PADFREE_TURN_H
#include "maxpool.h"

enum { VECTOR = 16, QUAD = 4 }; /* floats of a vector, and planes that are turned; how many at once */

#if SHUFFLES
typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));

/* Four floats of four rows, `pitch` apart: a column goes to each of the targets. */
INLINE void turn_quad(const float *from, size pitch, float *first, float *second, float *third, float *fourth) {
    const quad a = *(const quad *)from, b = *(const quad *)(from + pitch);
    const quad c = *(const quad *)(from + 2 * pitch), d = *(const quad *)(from + 3 * pitch);
    const quad ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    const quad AB = __builtin_shufflevector(a, b, 2, 6, 3, 7), CD = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    *(quad *)first = __builtin_shufflevector(ab, cd, 0, 1, 4, 5);
    *(quad *)second = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
    *(quad *)third = __builtin_shufflevector(AB, CD, 0, 1, 4, 5);
    *(quad *)fourth = __builtin_shufflevector(AB, CD, 2, 3, 6, 7);
}
#else
INLINE void turn_quad(const float *from, size pitch, float *first, float *second, float *third, float *fourth) {
    (void)from, (void)pitch, (void)first, (void)second, (void)third, (void)fourth; /* not called */
}
#endif

/* Rows of a matrix, `apart`, to columns of another, whose rows are `pitch` apart. */
INLINE void turn_matrix(const float *restrict from, size apart, size rows, size columns, float *restrict to, size pitch) {
    const size high = SHUFFLES ? rows / QUAD * QUAD : 0, wide = SHUFFLES ? columns / QUAD * QUAD : 0;
    for (size i = 0; i < wide; i += QUAD)
        for (size r = 0; r < high; r += QUAD) {
            float *at = to + i * pitch + r;
            turn_quad(from + r * apart + i, apart, at, at + pitch, at + 2 * pitch, at + 3 * pitch);
        }
    for (size r = 0; r < rows; r++)
        for (size i = r < high ? wide : 0; i < columns; i++) to[i * pitch + r] = from[r * apart + i];
}

/* `planes` (up to sixteen) of `area` floats, to where `places` says that each pixel's sixteen values lie. */
INLINE void turn(const float *restrict from, size planes, size area, const int *restrict places, float *restrict to) {
    const size whole = SHUFFLES && planes == VECTOR ? area / QUAD * QUAD : 0;
    for (size i = 0; i < whole; i += QUAD) {
        const int *at = places + i;
        for (size c = 0; c < VECTOR; c += QUAD)
            turn_quad(from + c * area + i, area, to + at[0] + c, to + at[1] + c, to + at[2] + c, to + at[3] + c);
    }
    for (size i = whole; i < area; i++)
        for (size c = 0; c < planes; c++) to[places[i] + c] = from[c * area + i];
}

/* The way back, from pixels that lie one after another to planes that are `pitch` apart. */
INLINE void turn_back(const float *restrict from, size planes, size area, float *restrict to, size pitch) {
    const size whole = SHUFFLES && planes == VECTOR ? area / QUAD * QUAD : 0;
    for (size i = 0; i < whole; i += QUAD)
        for (size c = 0; c < VECTOR; c += QUAD) {
            float *at = to + c * pitch + i;
            turn_quad(from + i * VECTOR + c, VECTOR, at, at + pitch, at + 2 * pitch, at + 3 * pitch);
        }
    for (size c = 0; c < planes; c++)
        for (size i = whole; i < area; i++) to[c * pitch + i] = from[i * VECTOR + c];
}

#endif
