#include "goldens.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char FILE_NAME[] = "goldens.npz";

et_status et_goldens_read(et_goldens *goldens, const et_manifest *manifest, et_error *error) {
    size_t size;
    et_error inner;
    memset(goldens, 0, sizeof *goldens);
    goldens->manifest = manifest;
    et_status status = et_read_file(manifest, FILE_NAME, &goldens->bytes, &size, error);
    if (status) return status;
    npz_array *logits = &goldens->logits;
    status = npz_open(&goldens->file, goldens->bytes, size, &inner);
    if (!status) status = npz_read(&goldens->file, "logits", "<f4", logits, &inner);
    if (!status && (logits->axes != 2 || logits->shape[0] != manifest->golden_count ||
                    logits->shape[1] != manifest->label_count))
        status = et_fail(&inner, ET_INTEGRITY, "logits: expected the shape (%zu, %zu)",
                         manifest->golden_count, manifest->label_count);
    if (status) {
        et_fail(error, status, "%s: %s", FILE_NAME, inner.text);
        et_goldens_free(goldens);
    }
    return status;
}

void et_goldens_free(et_goldens *goldens) {
    free(goldens->bytes);
    memset(goldens, 0, sizeof *goldens);
}

static et_status read_pixels(const npz_file *file, const char *name, et_golden *golden,
                             et_error *error) {
    npz_array array;
    et_status status = npz_read(file, name, "|u1", &array, error);
    if (status) return status;
    if (array.axes != 3 || array.shape[2] != 3 || array.elements == 0)
        return et_fail(error, ET_INTEGRITY, "%s: expected the shape (height, width, 3)", name);
    golden->pixels = malloc(array.elements);
    if (!golden->pixels) return et_fail(error, ET_RESOURCE, "out of memory");
    memcpy(golden->pixels, array.data, array.elements);
    golden->height = array.shape[0];
    golden->width = array.shape[1];
    return ET_OK;
}

static et_status read_ids(const npz_file *file, const char *name, size_t most, et_golden *golden,
                          et_error *error) {
    npz_array array;
    if (!npz_has(file, name))
        return et_fail(error, ET_INTEGRITY,
                       "has no %s: it was written by an edgetune that stored texts only; export"
                       " the bundle again",
                       name);
    et_status status = npz_read(file, name, "<i8", &array, error);
    if (status) return status;
    if (array.axes != 1 || array.elements == 0 || array.elements > most)
        return et_fail(error, ET_INTEGRITY, "%s: expected the shape (tokens,), 1 to %zu of them",
                       name, most);
    golden->ids = malloc(array.elements * sizeof *golden->ids);
    if (!golden->ids) return et_fail(error, ET_RESOURCE, "out of memory");
    for (size_t i = 0; i < array.elements; i++) golden->ids[i] = npz_int64(&array, i);
    golden->tokens = array.elements;
    return ET_OK;
}

et_status et_golden_read(const et_goldens *goldens, size_t index, et_golden *golden,
                         et_error *error) {
    char name[32];
    et_error inner;
    const et_manifest *manifest = goldens->manifest;
    bool images = manifest->task == ET_IMAGES;
    memset(golden, 0, sizeof *golden);
    snprintf(name, sizeof name, "%s_%zu", images ? "input" : "ids", index);
    et_status status =
        images ? read_pixels(&goldens->file, name, golden, &inner)
               : read_ids(&goldens->file, name, manifest->max_tokens, golden, &inner);
    if (status) et_fail(error, status, "%s: %s", FILE_NAME, inner.text);
    return status;
}

void et_golden_free(et_golden *golden) {
    free(golden->pixels);
    free(golden->ids);
    memset(golden, 0, sizeof *golden);
}

double et_golden_difference(const et_goldens *goldens, size_t index, const float *logits) {
    size_t labels = goldens->manifest->label_count;
    double largest = 0;
    for (size_t i = 0; i < labels; i++) {
        double stored = npz_float32(&goldens->logits, index * labels + i);
        double difference = fabs((double)logits[i] - stored);
        if (isnan(difference)) return INFINITY;
        if (difference > largest) largest = difference;
    }
    return largest;
}
