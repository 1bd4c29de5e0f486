#include "npz.h"

#include <stdio.h>
#include <string.h>

/* Sizes and signatures of APPNOTE.TXT, PKWARE's description of zip, 4.3.7, 4.3.12 and 4.3.16. */
enum { LOCAL_SIZE = 30, CENTRAL_SIZE = 46, END_SIZE = 22, MAX_COMMENT = 65535 };
static const uint32_t LOCAL = 0x04034b50, CENTRAL = 0x02014b50, END = 0x06054b50;

typedef struct {
    const unsigned char *name;
    size_t name_size;
    unsigned flags, method;
    uint32_t crc, packed, size, local;
} member;

static unsigned u16(const unsigned char *p) { return (unsigned)p[0] | (unsigned)p[1] << 8; }

static uint32_t u32(const unsigned char *p) { return u16(p) | (uint32_t)u16(p + 2) << 16; }

static uint32_t crc32_of(const unsigned char *bytes, size_t size) {
    uint32_t table[256], crc = 0xffffffff;
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; bit++) value = value >> 1 ^ (value & 1 ? 0xedb88320 : 0);
        table[i] = value;
    }
    for (size_t i = 0; i < size; i++) crc = crc >> 8 ^ table[(crc ^ bytes[i]) & 0xff];
    return ~crc;
}

et_status npz_open(npz_file *file, const void *bytes, size_t size, et_error *error) {
    const unsigned char *start = bytes;
    for (size_t back = END_SIZE; back <= size && back <= END_SIZE + MAX_COMMENT; back++) {
        const unsigned char *end = start + (size - back);
        if (u32(end) != END || u16(end + 20) != back - END_SIZE) continue;
        size_t members = u16(end + 10), length = u32(end + 12), offset = u32(end + 16);
        if (members > NPZ_MAX_MEMBERS)
            return et_fail(error, ET_INTEGRITY, "has %zu members, expected at most %d", members,
                           NPZ_MAX_MEMBERS);
        if (offset > size - back || length > size - back - offset) break;
        *file = (npz_file){start, size, offset, length, members};
        return ET_OK;
    }
    return et_fail(error, ET_INTEGRITY, "is no npz file, or is cut off");
}

/* Read the directory's entry at `*at` and step over it. Return false if it does not fit. */
static bool next_member(const npz_file *file, size_t *at, member *m) {
    size_t end = file->directory + file->directory_size;
    if (end - *at < CENTRAL_SIZE) return false;
    const unsigned char *p = file->bytes + *at;
    size_t tail = (size_t)u16(p + 28) + u16(p + 30) + u16(p + 32);
    if (u32(p) != CENTRAL || end - *at - CENTRAL_SIZE < tail) return false;
    *m = (member){p + CENTRAL_SIZE, u16(p + 28), u16(p + 8), u16(p + 10),
                  u32(p + 16),      u32(p + 20), u32(p + 24), u32(p + 42)};
    *at += CENTRAL_SIZE + tail;
    return true;
}

static bool is_named(const member *m, const char *name) {
    size_t length = strlen(name);
    return m->name_size == length + 4 && memcmp(m->name, name, length) == 0 &&
           memcmp(m->name + length, ".npy", 4) == 0;
}

static et_status find(const npz_file *file, const char *name, member *found, et_error *error) {
    size_t at = file->directory, count = 0;
    for (size_t i = 0; i < file->members; i++) {
        member m;
        if (!next_member(file, &at, &m))
            return et_fail(error, ET_INTEGRITY, "has a malformed directory");
        if (!is_named(&m, name)) continue;
        *found = m;
        count++;
    }
    if (count == 0) return et_fail(error, ET_INTEGRITY, "has no %s", name);
    if (count > 1) return et_fail(error, ET_INTEGRITY, "has %s twice", name);
    return ET_OK;
}

bool npz_has(const npz_file *file, const char *name) {
    member m;
    et_error ignored;
    return find(file, name, &m, &ignored) == ET_OK;
}

/* Find the bytes of a member. Sizes are the directory's: savez leaves 2^32 - 1 in local headers. */
static et_status contents(const npz_file *file, const char *name, const unsigned char **bytes,
                          size_t *size, et_error *error) {
    member m;
    et_status status = find(file, name, &m, error);
    if (status) return status;
    if (m.flags & 1) return et_fail(error, ET_INTEGRITY, "%s is encrypted", name);
    if (m.method != 0 || m.packed != m.size)
        return et_fail(error, ET_INTEGRITY,
                       "%s is compressed, as in bundles of an early edgetune; export it again",
                       name);
    if (m.local > file->size || file->size - m.local < LOCAL_SIZE)
        return et_fail(error, ET_INTEGRITY, "%s lies outside of the file", name);
    const unsigned char *local = file->bytes + m.local;
    size_t left = file->size - m.local - LOCAL_SIZE;
    size_t skip = (size_t)u16(local + 26) + u16(local + 28);
    if (u32(local) != LOCAL || skip > left || m.size > left - skip)
        return et_fail(error, ET_INTEGRITY, "%s lies outside of the file", name);
    *bytes = local + LOCAL_SIZE + skip;
    *size = m.size;
    if (crc32_of(*bytes, *size) != m.crc)
        return et_fail(error, ET_INTEGRITY, "%s is damaged (CRC-32)", name);
    return ET_OK;
}

/* A .npy header is a Python literal, like {'descr': '<f4', 'fortran_order': False, 'shape': (4,), }
 * (NEP 1). The functions below take from its front what they expect, or return false. */
typedef struct {
    const char *at, *end;
} literal;

static bool take(literal *text, const char *expected) {
    size_t length = strlen(expected);
    while (text->at < text->end && (*text->at == ' ' || *text->at == '\n')) text->at++;
    if ((size_t)(text->end - text->at) < length) return false;
    if (memcmp(text->at, expected, length) != 0) return false;
    text->at += length;
    return true;
}

static bool take_dtype(literal *text, char *dtype, size_t room) {
    if (!take(text, "'")) return false;
    size_t length = 0;
    for (; text->at < text->end && *text->at != '\''; text->at++) {
        if (length + 1 == room) return false;
        dtype[length++] = *text->at;
    }
    dtype[length] = 0;
    return take(text, "'");
}

static bool take_length(literal *text, size_t *value) {
    *value = 0;
    const char *start = text->at;
    for (; text->at < text->end && *text->at >= '0' && *text->at <= '9'; text->at++) {
        if (*value > (SIZE_MAX - 9) / 10) return false;
        *value = *value * 10 + (size_t)(*text->at - '0');
    }
    return text->at > start;
}

static bool take_shape(literal *text, npz_array *array) {
    if (!take(text, "(")) return false;
    array->axes = 0;
    array->elements = 1;
    while (!take(text, ")")) { /* which skips spaces too */
        size_t length;
        if (array->axes == NPZ_MAX_AXES || !take_length(text, &length)) return false;
        if (length && array->elements > SIZE_MAX / length) return false;
        array->shape[array->axes++] = length;
        array->elements *= length;
        if (take(text, ",")) continue;
        return array->axes > 1 && take(text, ")"); /* (4) is no tuple */
    }
    return true;
}

static bool parse_header(literal text, npz_array *array) {
    int descr = 0, order = 0, shape = 0;
    if (!take(&text, "{")) return false;
    while (!take(&text, "}")) {
        bool good = false;
        if (take(&text, "'descr':")) {
            good = take_dtype(&text, array->dtype, sizeof array->dtype);
            descr++;
        } else if (take(&text, "'fortran_order':")) {
            good = take(&text, "False");
            order++;
        } else if (take(&text, "'shape':")) {
            good = take_shape(&text, array);
            shape++;
        }
        if (!good) return false;
        if (take(&text, ",")) continue;
        if (take(&text, "}")) break;
        return false;
    }
    return descr == 1 && order == 1 && shape == 1 && take(&text, "") && text.at == text.end;
}

static size_t item_size(const char *dtype) {
    if (strcmp(dtype, "<f4") == 0) return 4;
    if (strcmp(dtype, "<i8") == 0) return 8;
    return strcmp(dtype, "|u1") == 0 ? 1 : 0;
}

et_status npz_read(const npz_file *file, const char *name, const char *dtype, npz_array *array,
                   et_error *error) {
    const unsigned char *bytes = NULL;
    size_t size = 0;
    et_status status = contents(file, name, &bytes, &size, error);
    if (status) return status;
    if (size < 12 || memcmp(bytes, "\x93NUMPY", 6) != 0 || bytes[6] < 1 || bytes[6] > 3)
        return et_fail(error, ET_INTEGRITY, "%s is no npy array", name);
    size_t start = bytes[6] == 1 ? 10 : 12;
    size_t header = bytes[6] == 1 ? u16(bytes + 8) : u32(bytes + 8);
    if (header > size - start)
        return et_fail(error, ET_INTEGRITY, "%s has a malformed header", name);
    literal text = {(const char *)bytes + start, (const char *)bytes + start + header};
    if (!parse_header(text, array))
        return et_fail(error, ET_INTEGRITY, "%s has a malformed header", name);
    if (strcmp(array->dtype, dtype) != 0 || !item_size(dtype))
        return et_fail(error, ET_INTEGRITY, "%s: expected elements of type %s, got %s", name, dtype,
                       array->dtype);
    size_t data = size - start - header;
    if (array->elements != data / item_size(dtype) || data % item_size(dtype) != 0)
        return et_fail(error, ET_INTEGRITY, "%s: its %zu bytes do not fill its shape", name, data);
    array->data = bytes + start + header;
    return ET_OK;
}

float npz_float32(const npz_array *array, size_t i) {
    uint32_t bits = u32(array->data + 4 * i);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

int64_t npz_int64(const npz_array *array, size_t i) {
    const unsigned char *p = array->data + 8 * i;
    uint64_t bits = u32(p) | (uint64_t)u32(p + 4) << 32;
    int64_t value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
