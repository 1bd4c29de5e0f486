/* classify BUNDLE WIDTH HEIGHT - classify raw RGB images from standard input until it ends.
 *
 *     ffmpeg -i photo.jpg -f rawvideo -pix_fmt rgb24 - | ./classify bundle 640 480
 *
 * One line an image: label and probability, and "(abstained)" where that is below the bundle's
 * threshold. ORT_LIB and exit status: as of verify_bundle.
 */
#include <stdio.h>
#include <stdlib.h>

#include "bundle.h"

static et_status classify(const et_bundle *bundle, size_t width, size_t height, uint8_t *pixels,
                          float *scores, et_error *error) {
    size_t labels = et_label_count(bundle), expected = width * height * 3, got;
    while ((got = fread(pixels, 1, expected, stdin)) == expected) {
        et_status status = et_run_pixels(bundle, pixels, height, width, scores, error);
        if (status) return status;
        size_t best = et_best(scores, labels);
        et_softmax(bundle, scores);
        char label[256];
        snprintf(label, sizeof label, "%s", et_label(bundle, best));
        et_printable(label);
        printf("%s %.4f%s\n", label, (double)scores[best],
               et_is_sure(bundle, scores[best]) ? "" : " (abstained)");
        fflush(stdout);
    }
    if (got == 0 && !ferror(stdin)) return ET_OK;
    return et_fail(error, ET_DATA, "standard input ends within an image: got %zu bytes of %zu", got,
                   expected);
}

int main(int count, char **arguments) {
    et_error error;
    et_bundle *bundle;
    char *after_width = "", *after_height = "";
    long width = count == 4 ? strtol(arguments[2], &after_width, 10) : 0;
    long height = count == 4 ? strtol(arguments[3], &after_height, 10) : 0;
    if (width < 1 || height < 1 || width > 16384 || height > 16384 || *after_width ||
        *after_height) {
        fprintf(stderr, "usage: classify BUNDLE WIDTH HEIGHT (1 to 16384 pixels)\n");
        return ET_CONFIG;
    }
    et_status status = et_open(&bundle, arguments[1], getenv("ORT_LIB"), &error);
    if (!status) {
        uint8_t *pixels = malloc((size_t)width * (size_t)height * 3);
        float *scores = malloc(et_label_count(bundle) * sizeof *scores);
        if (pixels && scores)
            status = classify(bundle, (size_t)width, (size_t)height, pixels, scores, &error);
        else status = et_fail(&error, ET_RESOURCE, "out of memory");
        free(scores);
        free(pixels);
    }
    et_close(bundle);
    if (status) fprintf(stderr, "classify: %s\n", error.text);
    return (int)status;
}
