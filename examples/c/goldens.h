/* goldens.h - a bundle's goldens.npz: inputs of the graph and the logits expected of them. */
#ifndef ET_GOLDENS_H
#define ET_GOLDENS_H

#include "manifest.h"
#include "npz.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const et_manifest *manifest;
    unsigned char *bytes;
    npz_file file;
    npz_array logits;
} et_goldens;

/* One golden's input: pixels for images, else ids. To be given to et_golden_free. */
typedef struct {
    uint8_t *pixels; /* RGB, shape (height, width, 3) */
    size_t height, width;
    int64_t *ids;
    size_t tokens;
} et_golden;

/* Read the bundle's goldens. `manifest` must outlive them; on ET_OK give them to
 * et_goldens_free. */
et_status et_goldens_read(et_goldens *goldens, const et_manifest *manifest, et_error *error);
void et_goldens_free(et_goldens *goldens);

/* Read the input of golden `index`, which is below manifest->golden_count. */
et_status et_golden_read(const et_goldens *goldens, size_t index, et_golden *golden,
                         et_error *error);
void et_golden_free(et_golden *golden);

/* Return the largest distance of a logit from the stored one; infinity if one is not finite. */
double et_golden_difference(const et_goldens *goldens, size_t index, const float *logits);

#ifdef __cplusplus
}
#endif
#endif
