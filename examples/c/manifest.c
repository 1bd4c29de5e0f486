#define _POSIX_C_SOURCE 200809L
#include "manifest.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static const double MAX_SIZE = 4503599627370496.0; /* 2^52: a double counts every byte up to it */

static et_status refuse(et_error *error, const char *what) {
    return et_fail(error, ET_INTEGRITY, "manifest.json: %s", what);
}

static const char *text_of(const json_node *object, const char *key) {
    const json_node *node = json_get(object, key);
    return node && node->type == JSON_STRING ? node->string : NULL;
}

char *et_path(const et_manifest *manifest, const char *name) {
    size_t room = strlen(manifest->folder) + strlen(name) + 2;
    char *path = malloc(room);
    if (path) snprintf(path, room, "%s/%s", manifest->folder, name);
    return path;
}

/* Read at most `limit` bytes of a file. */
static et_status read_whole(const et_manifest *manifest, const char *name, size_t limit,
                            unsigned char **bytes, size_t *size, et_error *error) {
    et_status status = ET_OK;
    char *path = et_path(manifest, name);
    unsigned char *read = malloc(limit + 1);
    FILE *file = path ? fopen(path, "rb") : NULL;
    if (!path || !read) {
        status = et_fail(error, ET_RESOURCE, "out of memory");
    } else if (!file) {
        status = et_fail(error, ET_INTEGRITY, "%s: %s", path, strerror(errno));
    } else {
        *size = fread(read, 1, limit + 1, file);
        if (ferror(file)) status = et_fail(error, ET_INTEGRITY, "%s: cannot be read", path);
        else if (*size > limit) status = et_fail(error, ET_INTEGRITY, "%s: is too large", path);
    }
    if (file) fclose(file);
    free(path);
    if (status) free(read);
    else *bytes = read;
    return status;
}

et_status et_read_file(const et_manifest *manifest, const char *name, unsigned char **bytes,
                       size_t *size, et_error *error) {
    const json_node *entry =
        json_get(json_get(json_root(manifest->document), "files"), name);
    double stated;
    if (!json_whole(json_get(entry, "size"), 0, ET_MAX_READ_BYTES, &stated))
        return et_fail(error, ET_INTEGRITY, "manifest.json: lists no %s of at most 256 MiB", name);
    et_status status = read_whole(manifest, name, (size_t)stated, bytes, size, error);
    if (status || (double)*size == stated) return status;
    free(*bytes);
    return et_fail(error, ET_INTEGRITY, "%s/%s: is cut off", manifest->folder, name);
}

/* [A-Za-z0-9_][A-Za-z0-9._-]{0,127}: no folder, no link out of the bundle */
static bool is_file_name(const char *name) {
    static const char inside[] =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-";
    size_t length = strlen(name);
    return length >= 1 && length <= 128 && strspn(name, inside) == length && name[0] != '.' &&
           name[0] != '-' && strcmp(name, "manifest.json") != 0;
}

static et_status check_files(const et_manifest *manifest, const json_node *files, et_error *error) {
    if (!files || files->type != JSON_OBJECT) return refuse(error, "files: expected an object");
    for (const json_node *entry = files->first; entry; entry = entry->next) {
        double size;
        if (!is_file_name(entry->key))
            return et_fail(error, ET_INTEGRITY, "manifest.json: '%s' is no name of a bundle's file",
                           entry->key);
        if (!json_whole(json_get(entry, "size"), 0, MAX_SIZE, &size))
            return et_fail(error, ET_INTEGRITY, "manifest.json: %s: size is malformed", entry->key);
        char *path = et_path(manifest, entry->key);
        if (!path) return et_fail(error, ET_RESOURCE, "out of memory");
        struct stat found;
        et_status status = ET_OK;
        if (lstat(path, &found) != 0 || !S_ISREG(found.st_mode))
            status = et_fail(error, ET_INTEGRITY, "%s: expected a file, found none", path);
        else if ((double)found.st_size != size)
            status = et_fail(error, ET_INTEGRITY,
                             "%s: expected %.0f bytes, got %.0f; the bundle is damaged, copy it"
                             " again",
                             path, size, (double)found.st_size);
        free(path);
        if (status) return status;
    }
    return ET_OK;
}

static et_status read_labels(et_manifest *manifest, const json_node *labels, et_error *error) {
    if (!labels || labels->type != JSON_ARRAY || !labels->count || labels->count > ET_MAX_LABELS)
        return refuse(error, "labels: expected a list of 1 to 65536 strings");
    manifest->labels = calloc(labels->count, sizeof *manifest->labels);
    if (!manifest->labels) return et_fail(error, ET_RESOURCE, "out of memory");
    for (const json_node *label = labels->first; label; label = label->next) {
        if (label->type != JSON_STRING) return refuse(error, "labels: expected strings");
        manifest->labels[manifest->label_count++] = label->string;
    }
    return ET_OK;
}

/* Read the number object[key], which has to be in [low, high]. */
static bool read_number(const json_node *object, const char *key, double low, double high,
                        double *value) {
    const json_node *node = json_get(object, key);
    if (!node || node->type != JSON_NUMBER || node->number < low || node->number > high)
        return false;
    *value = node->number;
    return true;
}

/* How logits become answers; a manifest need not say. */
static et_status read_scoring(et_manifest *manifest, const json_node *calibration,
                              const json_node *abstention, et_error *error) {
    manifest->temperature = 1;
    manifest->threshold = 0;
    if (calibration &&
        !read_number(calibration, "temperature", 0.001, 1000, &manifest->temperature))
        return refuse(error, "calibration: temperature: expected 0.001 to 1000");
    if (abstention && !read_number(abstention, "threshold", 0, 1, &manifest->threshold))
        return refuse(error, "abstention: threshold: expected 0 to 1");
    return ET_OK;
}

/* Return whether `specs` describes a tensor of that name and type. */
static bool has_tensor(const json_node *specs, const char *name, const char *dtype) {
    for (const json_node *s = specs ? specs->first : NULL; s; s = s->next) {
        const char *found = text_of(s, "name"), *type = text_of(s, "dtype");
        if (found && type && strcmp(found, name) == 0) return strcmp(type, dtype) == 0;
    }
    return false;
}

static et_status read_task(et_manifest *manifest, const json_node *root, et_error *error) {
    const json_node *inputs = json_get(root, "inputs");
    const char *task = text_of(root, "task");
    double tokens;
    bool good;
    if (task && strcmp(task, "image-classification") == 0) {
        manifest->task = ET_IMAGES;
        good = has_tensor(inputs, "image", "uint8") && inputs->count == 1;
    } else if (task && strcmp(task, "text-classification") == 0) {
        manifest->task = ET_TEXTS;
        good = has_tensor(inputs, "input_ids", "int64") &&
               has_tensor(inputs, "attention_mask", "int64") && inputs->count == 2;
        if (!json_whole(json_get(json_get(root, "options"), "max_length"), 1, 1 << 20, &tokens))
            return refuse(error, "options: max_length: expected 1 or more");
        manifest->max_tokens = (size_t)tokens;
    } else {
        return et_fail(error, ET_CONFIG, "manifest.json: task '%s' is not known to this program",
                       task ? task : "");
    }
    if (!good || !has_tensor(json_get(root, "outputs"), "logits", "float32"))
        return refuse(error, "inputs and outputs are not those of its task");
    return ET_OK;
}

static et_status read_session(et_manifest *manifest, const json_node *session, et_error *error) {
    static const struct {
        const char *name;
        int level;
    } levels[] = {{"off", 0}, {"basic", 1}, {"extended", 2}, {"all", 99}};
    const json_node *spinning = json_get(session, "allow_spinning");
    const json_node *arena = json_get(session, "arena");
    const json_node *providers = json_get(session, "execution_providers");
    const char *level = text_of(session, "graph_optimization");
    double threads;
    bool found = false, cpu = false;
    if (!json_whole(json_get(session, "intra_op_threads"), 1, ET_MAX_THREADS, &threads))
        return refuse(error, "session: intra_op_threads: expected 1 to 1024");
    manifest->threads = (int)threads;
    if (!spinning || spinning->type != JSON_BOOLEAN)
        return refuse(error, "session: allow_spinning: expected true or false");
    manifest->allow_spinning = spinning->number != 0;
    if (arena && arena->type != JSON_BOOLEAN)
        return refuse(error, "session: arena: expected true or false");
    manifest->arena = !arena || arena->number != 0; /* older manifests do not name it */
    for (size_t i = 0; level && i < sizeof levels / sizeof *levels; i++)
        if (strcmp(level, levels[i].name) == 0) {
            manifest->graph_optimization = levels[i].level;
            found = true;
        }
    if (!found) return refuse(error, "session: graph_optimization is not known");
    for (const json_node *p = providers ? providers->first : NULL; p; p = p->next)
        cpu = cpu || (p->type == JSON_STRING && strcmp(p->string, "CPUExecutionProvider") == 0);
    if (!cpu)
        return et_fail(error, ET_CONFIG,
                       "manifest.json: session: execution_providers: this program runs on the"
                       " CPUExecutionProvider, which the bundle does not name");
    manifest->config = json_get(session, "config");
    if (!manifest->config || manifest->config->type != JSON_OBJECT)
        return refuse(error, "session: config: expected an object");
    for (const json_node *entry = manifest->config->first; entry; entry = entry->next)
        if (entry->type != JSON_STRING) return refuse(error, "session: config: expected strings");
    return ET_OK;
}

static et_status read_compatibility(et_manifest *manifest, const json_node *needs,
                                    et_error *error) {
    manifest->onnxruntime_min = text_of(needs, "onnxruntime_min");
    manifest->onnxruntime_excluded = json_get(needs, "onnxruntime_excluded");
    if (!manifest->onnxruntime_min || !manifest->onnxruntime_excluded ||
        manifest->onnxruntime_excluded->type != JSON_ARRAY)
        return refuse(error, "compatibility: onnxruntime_min or onnxruntime_excluded is malformed");
    return ET_OK;
}

static et_status read_goldens(et_manifest *manifest, const json_node *goldens, et_error *error) {
    const json_node *tolerance = json_get(goldens, "tolerance");
    double count;
    if (!json_whole(json_get(goldens, "count"), 0, ET_MAX_GOLDENS, &count))
        return refuse(error, "goldens: count: expected 0 to 1024");
    if (!tolerance || tolerance->type != JSON_NUMBER || tolerance->number < 0)
        return refuse(error, "goldens: tolerance: expected 0 or more");
    manifest->golden_count = (size_t)count;
    manifest->tolerance = tolerance->number;
    return ET_OK;
}

static et_status read_root(et_manifest *manifest, const json_node *root, et_error *error) {
    double version;
    if (!json_whole(json_get(root, "schema_version"), 1, 1, &version))
        return refuse(error, "bundle schema is not 1, which is the one this program reads");
    manifest->name = text_of(root, "name");
    if (!manifest->name) return refuse(error, "name: expected a string");
    et_status status = read_labels(manifest, json_get(root, "labels"), error);
    if (!status)
        status = read_scoring(manifest, json_get(root, "calibration"),
                              json_get(root, "abstention"), error);
    if (!status) status = read_task(manifest, root, error);
    if (!status) status = read_session(manifest, json_get(root, "session"), error);
    if (!status) status = read_compatibility(manifest, json_get(root, "compatibility"), error);
    if (!status) status = read_goldens(manifest, json_get(root, "goldens"), error);
    if (!status) status = check_files(manifest, json_get(root, "files"), error);
    return status;
}

et_status et_manifest_read(et_manifest *manifest, const char *folder, et_error *error) {
    unsigned char *text = NULL;
    size_t size;
    memset(manifest, 0, sizeof *manifest);
    manifest->folder = strdup(folder);
    if (!manifest->folder) return et_fail(error, ET_RESOURCE, "out of memory");
    et_status status =
        read_whole(manifest, "manifest.json", ET_MAX_MANIFEST_BYTES, &text, &size, error);
    if (!status) {
        et_error inner;
        status = json_parse((const char *)text, size, &manifest->document, &inner);
        if (status) et_fail(error, status, "manifest.json: %s", inner.text);
    }
    free(text);
    if (!status) status = read_root(manifest, json_root(manifest->document), error);
    if (status) et_manifest_free(manifest);
    return status;
}

void et_manifest_free(et_manifest *manifest) {
    json_free(manifest->document);
    free(manifest->labels);
    free(manifest->folder);
    memset(manifest, 0, sizeof *manifest);
}

/* Compare the first three numbers of two versions: negative where a is older. */
static int compare_versions(const char *a, const char *b) {
    for (int i = 0; i < 3; i++) {
        char *end_a, *end_b;
        long x = strtol(a, &end_a, 10), y = strtol(b, &end_b, 10);
        if (x != y) return x < y ? -1 : 1;
        a = *end_a == '.' ? end_a + 1 : "";
        b = *end_b == '.' ? end_b + 1 : "";
    }
    return 0;
}

et_status et_check_version(const et_manifest *manifest, const char *version, et_error *error) {
    if (compare_versions(version, manifest->onnxruntime_min) < 0)
        return et_fail(error, ET_CONFIG, "the bundle needs onnxruntime %s or newer, found %s",
                       manifest->onnxruntime_min, version);
    const json_node *excluded = manifest->onnxruntime_excluded->first;
    for (; excluded; excluded = excluded->next)
        if (excluded->type == JSON_STRING && compare_versions(version, excluded->string) == 0)
            return et_fail(error, ET_CONFIG,
                           "onnxruntime %s is known not to work on this bundle's device; use"
                           " another version",
                           version);
    return ET_OK;
}
