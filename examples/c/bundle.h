/* bundle.h - open an edgetune bundle and predict, with onnxruntime's C interface.
 *
 *     et_error error;
 *     et_bundle *bundle;
 *     if (et_open(&bundle, "bundle", NULL, &error)) { puts(error.text); return error.status; }
 *     float *scores = malloc(et_label_count(bundle) * sizeof *scores);
 *     if (!et_run_pixels(bundle, rgb, height, width, scores, &error)) {
 *         size_t best = et_best(scores, et_label_count(bundle));
 *         et_softmax(bundle, scores);
 *         if (et_is_sure(bundle, scores[best])) puts(et_label(bundle, best));
 *     }
 *     et_close(bundle);
 *
 * onnxruntime is loaded with dlopen when the first bundle is opened and stays loaded. et_run_*
 * may be called from several threads at once; et_open and et_close may not.
 */
#ifndef ET_BUNDLE_H
#define ET_BUNDLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"
#include "manifest.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The version of onnxruntime's interface that is asked for: onnxruntime 1.17 has it, and every
 * later one. */
#define EDGETUNE_ORT_API 17

typedef struct et_bundle et_bundle;

/* Open the bundle in `folder`. `library` is the path of libonnxruntime.so; NULL lets the dynamic
 * loader find libonnxruntime.so.1 or libonnxruntime.so. Everything but hashes is checked, see
 * manifest.h. On ET_OK give `*bundle` to et_close; else it is NULL. */
et_status et_open(et_bundle **bundle, const char *folder, const char *library, et_error *error);
void et_close(et_bundle *bundle);

const et_manifest *et_manifest_of(const et_bundle *bundle);
size_t et_label_count(const et_bundle *bundle);
const char *et_label(const et_bundle *bundle, size_t index);

/* Run an image-classification bundle. `rgb`: shape (height, width, 3), of any size; the graph
 * resizes and normalises. `logits`: room for et_label_count floats. */
et_status et_run_pixels(const et_bundle *bundle, const uint8_t *rgb, size_t height, size_t width,
                        float *logits, et_error *error);

/* Run a text-classification bundle. `ids`: shape (tokens,), as tokenizer.json encodes the text,
 * special tokens included, no padding, at most options.max_length of the manifest. */
et_status et_run_ids(const et_bundle *bundle, const int64_t *ids, size_t tokens, float *logits,
                     et_error *error);

/* Turn logits into probabilities, in place: softmax(logits / T), T as the manifest states it. */
void et_softmax(const et_bundle *bundle, float *scores);

/* Return whether the probability of the best label reaches the manifest's threshold; below it the
 * label is no more than a best guess. */
bool et_is_sure(const et_bundle *bundle, float score);

/* Return the index of the largest score. Ask it of the logits: a high temperature can make two
 * probabilities equal. */
size_t et_best(const float *scores, size_t count);

#ifdef __cplusplus
}
#endif
#endif
