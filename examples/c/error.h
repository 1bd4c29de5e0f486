/* error.h - what went wrong, in one line. */
#ifndef ET_ERROR_H
#define ET_ERROR_H

#ifdef __cplusplus
extern "C" {
#endif

/* The same numbers as the exit codes of the edgetune command line. */
typedef enum {
    ET_OK = 0,
    ET_FAILED = 1,    /* onnxruntime cannot run the graph on this input */
    ET_CONFIG = 2,    /* called wrongly, or no suitable onnxruntime here */
    ET_DATA = 3,      /* the input is not what the bundle takes */
    ET_RESOURCE = 4,  /* memory ran out */
    ET_INTEGRITY = 6, /* a file is not what the manifest says, or an answer is off */
} et_status;

typedef struct {
    et_status status;
    char text[512]; /* no line break and no other control character, whatever a file held */
} et_error;

#if defined(__GNUC__)
#define ET_PRINTF __attribute__((format(printf, 3, 4)))
#else
#define ET_PRINTF
#endif

/* Fill `error` and return `status`, so that a caller can write `return et_fail(...)`. */
et_status et_fail(et_error *error, et_status status, const char *text, ...) ET_PRINTF;

/* Replace the control characters of `text`, which may come from a hostile file, by '?'. */
void et_printable(char *text);

#ifdef __cplusplus
}
#endif
#endif
