#include "json.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK_NODES = 128 };

typedef struct block {
    struct block *next;
    json_node nodes[BLOCK_NODES];
} block;

struct json_document {
    json_node *root;
    block *blocks; /* nodes never move, so that they can point at each other */
    size_t nodes;
    char *strings; /* as long as the text: what is decoded is never longer than its source */
};

typedef struct {
    const char *at, *end, *start;
    char *free_string;
    json_document *document;
    et_error *error;
} reader;

static et_status parse_value(reader *r, json_node *node, int depth);

static et_status refuse(reader *r, const char *what) {
    return et_fail(r->error, ET_INTEGRITY, "is no valid JSON: %s at byte %zu", what,
                   (size_t)(r->at - r->start));
}

static json_node *new_node(reader *r) {
    json_document *d = r->document;
    if (d->nodes == JSON_MAX_NODES) {
        et_fail(r->error, ET_INTEGRITY, "holds more than %d JSON values", JSON_MAX_NODES);
        return NULL;
    }
    size_t place = d->nodes % BLOCK_NODES;
    if (place == 0) {
        block *fresh = calloc(1, sizeof *fresh);
        if (!fresh) {
            et_fail(r->error, ET_RESOURCE, "out of memory");
            return NULL;
        }
        fresh->next = d->blocks;
        d->blocks = fresh;
    }
    d->nodes++;
    return &d->blocks->nodes[place];
}

static void skip_space(reader *r) {
    while (r->at < r->end && strchr(" \t\n\r", *r->at) && *r->at) r->at++;
}

static bool take(reader *r, char expected) {
    if (r->at == r->end || *r->at != expected) return false;
    r->at++;
    return true;
}

static bool take_word(reader *r, const char *word) {
    size_t length = strlen(word);
    if ((size_t)(r->end - r->at) < length || memcmp(r->at, word, length) != 0) return false;
    r->at += length;
    return true;
}

static bool is_digit(const reader *r) { return r->at < r->end && *r->at >= '0' && *r->at <= '9'; }

/* Return m 10^e. Dividing is exact to the last bit for the usual numbers, 10^-e is not a double. */
static double scale(double m, long e) {
    for (; e < -300 && m > 0; e += 300) m /= 1e300;
    for (; e > 300 && m > 0 && isfinite(m); e -= 300) m *= 1e300;
    if (m == 0 || !isfinite(m)) return m;
    return e < 0 ? m / pow(10, (double)-e) : m * pow(10, (double)e);
}

/* strtod would read "0.5" as 0 where the program's locale writes "0,5" */
static et_status parse_number(reader *r, json_node *node) {
    bool negative = take(r, '-');
    if (!is_digit(r)) return refuse(r, "no number");
    if (*r->at == '0' && r->at + 1 < r->end && r->at[1] >= '0' && r->at[1] <= '9')
        return refuse(r, "leading zero");
    double mantissa = 0;
    long exponent = 0;
    for (; is_digit(r); r->at++) mantissa = mantissa * 10 + (*r->at - '0');
    if (take(r, '.')) {
        if (!is_digit(r)) return refuse(r, "no digit after the point");
        for (; is_digit(r); r->at++) {
            if (mantissa > 1e17) continue; /* further digits would not change the double */
            mantissa = mantissa * 10 + (*r->at - '0');
            exponent--;
        }
    }
    if (take(r, 'e') || take(r, 'E')) {
        bool down = take(r, '-');
        if (!down) take(r, '+');
        if (!is_digit(r)) return refuse(r, "no digit in the exponent");
        long stated = 0;
        for (; is_digit(r); r->at++)
            if (stated < 10000) stated = stated * 10 + (*r->at - '0');
        exponent += down ? -stated : stated;
    }
    node->type = JSON_NUMBER;
    double value = scale(mantissa, exponent);
    if (!isfinite(value)) return refuse(r, "a number that is too large");
    node->number = negative ? -value : value;
    return ET_OK;
}

static bool parse_hex4(reader *r, uint32_t *code) {
    *code = 0;
    if (r->end - r->at < 4) return false;
    for (int i = 0; i < 4; i++, r->at++) {
        char c = *r->at;
        uint32_t digit;
        if (c >= '0' && c <= '9') digit = (uint32_t)(c - '0');
        else if (c >= 'a' && c <= 'f') digit = (uint32_t)(c - 'a') + 10;
        else if (c >= 'A' && c <= 'F') digit = (uint32_t)(c - 'A') + 10;
        else return false;
        *code = *code << 4 | digit;
    }
    return true;
}

static char *write_utf8(char *to, uint32_t code) {
    if (code < 0x80) {
        *to++ = (char)code;
    } else if (code < 0x800) {
        *to++ = (char)(0xc0 | code >> 6);
        *to++ = (char)(0x80 | (code & 0x3f));
    } else if (code < 0x10000) {
        *to++ = (char)(0xe0 | code >> 12);
        *to++ = (char)(0x80 | (code >> 6 & 0x3f));
        *to++ = (char)(0x80 | (code & 0x3f));
    } else {
        *to++ = (char)(0xf0 | code >> 18);
        *to++ = (char)(0x80 | (code >> 12 & 0x3f));
        *to++ = (char)(0x80 | (code >> 6 & 0x3f));
        *to++ = (char)(0x80 | (code & 0x3f));
    }
    return to;
}

/* Return the length of the well-formed UTF-8 sequence at `at`, else 0 (RFC 3629, section 4). */
static size_t utf8_length(const char *at, const char *end) {
    const unsigned char *u = (const unsigned char *)at;
    size_t left = (size_t)(end - at), length;
    unsigned char low = 0x80, high = 0xbf; /* of the second byte */
    if (u[0] < 0x80) return 1;
    if (u[0] >= 0xc2 && u[0] <= 0xdf) length = 2;
    else if (u[0] >= 0xe0 && u[0] <= 0xef) length = 3;
    else if (u[0] >= 0xf0 && u[0] <= 0xf4) length = 4;
    else return 0;
    if (u[0] == 0xe0) low = 0xa0;      /* shorter forms exist */
    else if (u[0] == 0xed) high = 0x9f; /* surrogates */
    else if (u[0] == 0xf0) low = 0x90;
    else if (u[0] == 0xf4) high = 0x8f; /* beyond U+10FFFF */
    if (left < length || u[1] < low || u[1] > high) return 0;
    for (size_t i = 2; i < length; i++)
        if (u[i] < 0x80 || u[i] > 0xbf) return 0;
    return length;
}

static et_status parse_escape(reader *r, char **to) {
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    if (r->at == r->end) return refuse(r, "the end in a string");
    char c = *r->at++;
    if (c != 'u') {
        const char *found = c ? strchr(names, c) : NULL;
        if (!found) return refuse(r, "an unknown escape");
        *(*to)++ = values[found - names];
        return ET_OK;
    }
    uint32_t code, low;
    if (!parse_hex4(r, &code)) return refuse(r, "a malformed \\u");
    if (code >= 0xd800 && code <= 0xdbff) {
        if (!take_word(r, "\\u") || !parse_hex4(r, &low) || low < 0xdc00 || low > 0xdfff)
            return refuse(r, "half of a surrogate pair");
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    } else if (code >= 0xdc00 && code <= 0xdfff) {
        return refuse(r, "half of a surrogate pair");
    }
    if (code == 0) return refuse(r, "a zero character");
    *to = write_utf8(*to, code);
    return ET_OK;
}

static et_status parse_string(reader *r, const char **string) {
    if (!take(r, '"')) return refuse(r, "no string");
    char *to = r->free_string;
    *string = to;
    while (!take(r, '"')) {
        if (r->at == r->end) return refuse(r, "the end in a string");
        if (take(r, '\\')) {
            et_status status = parse_escape(r, &to);
            if (status) return status;
            continue;
        }
        size_t length = utf8_length(r->at, r->end);
        if (length == 0) return refuse(r, "text that is no UTF-8");
        if ((unsigned char)*r->at < 0x20) return refuse(r, "a control character");
        memcpy(to, r->at, length);
        to += length;
        r->at += length;
    }
    *to++ = 0; /* there is room: the quotes of this string are not copied */
    r->free_string = to;
    return ET_OK;
}

static et_status parse_member(reader *r, json_node *object, json_node *member) {
    et_status status = parse_string(r, &member->key);
    if (status) return status;
    if (object->count == JSON_MAX_KEYS) return refuse(r, "too many keys in an object");
    if (json_get(object, member->key)) return refuse(r, "a repeated key");
    skip_space(r);
    return take(r, ':') ? ET_OK : refuse(r, "no ':'");
}

static et_status parse_members(reader *r, json_node *parent, char close, int depth) {
    if (depth == JSON_MAX_DEPTH) return refuse(r, "too deep a nesting");
    json_node *last = NULL;
    skip_space(r);
    if (take(r, close)) return ET_OK;
    do {
        json_node *member = new_node(r);
        if (!member) return r->error->status;
        skip_space(r);
        et_status status = close == '}' ? parse_member(r, parent, member) : ET_OK;
        if (!status) status = parse_value(r, member, depth + 1);
        if (status) return status;
        if (last) last->next = member;
        else parent->first = member;
        last = member;
        parent->count++;
        skip_space(r);
    } while (take(r, ','));
    return take(r, close) ? ET_OK : refuse(r, "no ',' and no end of an array or object");
}

static et_status parse_value(reader *r, json_node *node, int depth) {
    skip_space(r);
    if (r->at == r->end) return refuse(r, "the end before a value");
    switch (*r->at) {
    case '{':
        r->at++;
        node->type = JSON_OBJECT;
        return parse_members(r, node, '}', depth);
    case '[':
        r->at++;
        node->type = JSON_ARRAY;
        return parse_members(r, node, ']', depth);
    case '"':
        node->type = JSON_STRING;
        return parse_string(r, &node->string);
    case 't':
        node->type = JSON_BOOLEAN;
        node->number = 1;
        return take_word(r, "true") ? ET_OK : refuse(r, "an unknown word");
    case 'f':
        node->type = JSON_BOOLEAN;
        return take_word(r, "false") ? ET_OK : refuse(r, "an unknown word");
    case 'n':
        node->type = JSON_NULL;
        return take_word(r, "null") ? ET_OK : refuse(r, "an unknown word");
    default:
        return parse_number(r, node);
    }
}

et_status json_parse(const char *text, size_t size, json_document **document, et_error *error) {
    *document = NULL;
    json_document *d = calloc(1, sizeof *d);
    if (d) d->strings = malloc(size + 1);
    if (!d || !d->strings) {
        free(d);
        return et_fail(error, ET_RESOURCE, "out of memory");
    }
    reader r = {text, text + size, text, d->strings, d, error};
    d->root = new_node(&r);
    et_status status = d->root ? parse_value(&r, d->root, 0) : error->status;
    skip_space(&r);
    if (!status && r.at != r.end) status = refuse(&r, "something after the end");
    if (status) json_free(d);
    else *document = d;
    return status;
}

void json_free(json_document *document) {
    if (!document) return;
    while (document->blocks) {
        block *next = document->blocks->next;
        free(document->blocks);
        document->blocks = next;
    }
    free(document->strings);
    free(document);
}

const json_node *json_root(const json_document *document) { return document->root; }

const json_node *json_get(const json_node *object, const char *key) {
    if (!object || object->type != JSON_OBJECT) return NULL;
    for (const json_node *member = object->first; member; member = member->next)
        if (strcmp(member->key, key) == 0) return member;
    return NULL;
}

bool json_whole(const json_node *node, double low, double high, double *value) {
    if (!node || node->type != JSON_NUMBER || node->number != floor(node->number)) return false;
    if (node->number < low || node->number > high) return false;
    *value = node->number;
    return true;
}
