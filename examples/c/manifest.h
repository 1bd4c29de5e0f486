/* manifest.h - a bundle's manifest.json: what is in the bundle and how it is to be run.
 *
 * docs/bundle-format.md describes the file. Checked here: the schema, the types and bounds of
 * what is read, and the size of every file. Not checked: hashes, the digest, unknown keys.
 */
#ifndef ET_MANIFEST_H
#define ET_MANIFEST_H

#include <stdbool.h>
#include <stddef.h>

#include "error.h"
#include "json.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    ET_MAX_MANIFEST_BYTES = 4 << 20,
    ET_MAX_READ_BYTES = 256 << 20, /* of a file that is read as a whole */
    ET_MAX_LABELS = 65536,
    ET_MAX_GOLDENS = 1024,
    ET_MAX_THREADS = 1024,
};

typedef enum { ET_IMAGES, ET_TEXTS } et_task;

typedef struct {
    char *folder;
    et_task task;
    const char *name;
    size_t label_count;
    const char **labels; /* in the order of the logits */
    double temperature;  /* logits are divided by it before softmax; 1 where none is stated */
    double threshold;    /* a score below it is a best guess only; 0 where none is stated */
    size_t max_tokens;   /* of a text */
    const char *onnxruntime_min;
    const json_node *onnxruntime_excluded; /* array of strings */
    int threads;
    bool allow_spinning;
    bool arena;              /* onnxruntime's own pool of memory */
    int graph_optimization;  /* a GraphOptimizationLevel of onnxruntime_c_api.h */
    const json_node *config; /* object of strings: further session options */
    size_t golden_count;
    double tolerance;
    json_document *document; /* owns the strings */
} et_manifest;

/* Read folder/manifest.json and compare the size of every file that it lists.
 * On ET_OK the manifest is to be given to et_manifest_free. */
et_status et_manifest_read(et_manifest *manifest, const char *folder, et_error *error);
void et_manifest_free(et_manifest *manifest);

/* Return the path of a file of the bundle, to be freed by the caller; NULL if memory ran out. */
char *et_path(const et_manifest *manifest, const char *name);

/* Return the bytes of a file of the bundle that the manifest lists, to be freed by the caller. */
et_status et_read_file(const et_manifest *manifest, const char *name, unsigned char **bytes,
                       size_t *size, et_error *error);

/* Refuse this version of onnxruntime ("1.31.1") if the bundle cannot be run by it. */
et_status et_check_version(const et_manifest *manifest, const char *version, et_error *error);

#ifdef __cplusplus
}
#endif
#endif
