/* npz.h - arrays of a file that numpy.savez wrote (a zip of .npy files, not compressed).
 *
 * The file may be hostile: every offset is checked, and CRC-32s too. Compressed or encrypted
 * members are refused.
 */
#ifndef ET_NPZ_H
#define ET_NPZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { NPZ_MAX_MEMBERS = 8192, NPZ_MAX_AXES = 8 };

typedef struct {
    const unsigned char *bytes; /* of the whole file; must outlive what is read from it */
    size_t size;
    size_t directory, directory_size, members;
} npz_file;

typedef struct {
    char dtype[8]; /* as numpy writes it: "<f4", "|u1", "<i8", "<U12" */
    size_t axes, shape[NPZ_MAX_AXES];
    size_t elements;           /* product of the shape */
    const unsigned char *data; /* elements x item size bytes, in C order, not aligned */
} npz_array;

/* Find the directory of the zip file `bytes`. */
et_status npz_open(npz_file *file, const void *bytes, size_t size, et_error *error);

/* Find the array `name` (without ".npy"), whose elements must be of `dtype`, one of "<f4", "<i8"
 * and "|u1". */
et_status npz_read(const npz_file *file, const char *name, const char *dtype, npz_array *array,
                   et_error *error);

/* Return whether there is an array of that name. */
bool npz_has(const npz_file *file, const char *name);

/* Return element `i` of an array of that type, on little and big-endian machines. */
float npz_float32(const npz_array *array, size_t i);
int64_t npz_int64(const npz_array *array, size_t i);

#ifdef __cplusplus
}
#endif
#endif
