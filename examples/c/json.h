/* json.h - a strict reader of small JSON documents (RFC 8259).
 *
 * Refused besides what the grammar refuses: a key that is repeated in its object, text that is no
 * UTF-8, U+0000 and half surrogate pairs in strings, numbers out of a double's range, and more
 * than the limits below. The document may be hostile: nothing is read outside of it.
 */
#ifndef ET_JSON_H
#define ET_JSON_H

#include <stdbool.h>
#include <stddef.h>

#include "error.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    JSON_MAX_DEPTH = 32,
    JSON_MAX_NODES = 200000,
    JSON_MAX_KEYS = 1024, /* of one object: finding a repeated one takes the square of it */
};

typedef enum {
    JSON_NULL,
    JSON_BOOLEAN,
    JSON_NUMBER,
    JSON_STRING,
    JSON_ARRAY,
    JSON_OBJECT,
} json_type;

typedef struct json_node {
    json_type type;
    size_t count;            /* of an array or object: its members */
    double number;           /* of a number; of a boolean 0 or 1 */
    const char *string;      /* of a string: UTF-8, ends with 0 */
    const char *key;         /* of an object's member */
    struct json_node *first; /* of an array or object, else NULL */
    struct json_node *next;  /* the member after this one */
} json_node;

typedef struct json_document json_document;

/* Parse the `size` bytes of `text`, which may be freed afterwards. On ET_OK `*document` is to be
 * given to json_free; else it is NULL. */
et_status json_parse(const char *text, size_t size, json_document **document, et_error *error);
void json_free(json_document *document);

const json_node *json_root(const json_document *document);

/* Return the member of `object` that has this key; NULL if there is none, or no object. */
const json_node *json_get(const json_node *object, const char *key);

/* Read a whole number in [low, high]. Return false if `node` (which may be NULL) is none. */
bool json_whole(const json_node *node, double low, double high, double *value);

#ifdef __cplusplus
}
#endif
#endif
