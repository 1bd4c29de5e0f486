/* verify_bundle BUNDLE - replay a bundle's goldens with onnxruntime's C interface.
 *
 * ORT_LIB in the environment is the path of libonnxruntime.so, where the dynamic loader does not
 * find it by itself. Exit status: 0 if every logit is within the manifest's tolerance, else that
 * of error.h.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bundle.h"
#include "goldens.h"

static et_status check_golden(const et_bundle *bundle, const et_goldens *goldens, size_t index,
                              float *logits, et_error *error) {
    size_t labels = et_label_count(bundle);
    double tolerance = et_manifest_of(bundle)->tolerance;
    et_golden golden;
    et_status status = et_golden_read(goldens, index, &golden, error);
    if (status) return status;
    if (golden.pixels)
        status = et_run_pixels(bundle, golden.pixels, golden.height, golden.width, logits, error);
    else
        status = et_run_ids(bundle, golden.ids, golden.tokens, logits, error);
    et_golden_free(&golden);
    if (status) return status;

    double difference = et_golden_difference(goldens, index, logits);
    size_t best = et_best(logits, labels);
    char label[256];
    snprintf(label, sizeof label, "%s", et_label(bundle, best));
    et_printable(label);
    et_softmax(bundle, logits);
    printf("golden %zu: label %s score %.2f%s, largest difference %.2g\n", index, label,
           (double)logits[best], et_is_sure(bundle, logits[best]) ? "" : " (abstained)",
           difference);
    if (difference <= tolerance) return ET_OK;
    return et_fail(error, ET_INTEGRITY,
                   "golden %zu: a logit is %.4g from the stored one, allowed %.4g; this device"
                   " does not answer as the exporter did",
                   index, difference, tolerance);
}

static et_status check_goldens(const et_bundle *bundle, et_error *error) {
    const et_manifest *manifest = et_manifest_of(bundle);
    et_goldens goldens;
    et_status status = et_goldens_read(&goldens, manifest, error);
    if (status) return status;
    float *logits = malloc(manifest->label_count * sizeof *logits);
    if (!logits) status = et_fail(error, ET_RESOURCE, "out of memory");
    for (size_t i = 0; i < manifest->golden_count && !status; i++)
        status = check_golden(bundle, &goldens, i, logits, error);
    if (!status)
        printf("%zu goldens, every logit within %.4g\n", manifest->golden_count,
               manifest->tolerance);
    free(logits);
    et_goldens_free(&goldens);
    return status;
}

int main(int count, char **arguments) {
    et_error error;
    et_bundle *bundle;
    if (count != 2 || arguments[1][0] == '-') {
        fprintf(stderr, "usage: verify_bundle BUNDLE\n");
        return ET_CONFIG;
    }
    et_status status = et_open(&bundle, arguments[1], getenv("ORT_LIB"), &error);
    if (!status) status = check_goldens(bundle, &error);
    et_close(bundle);
    if (status) fprintf(stderr, "verify_bundle: %s\n", error.text);
    return (int)status;
}
