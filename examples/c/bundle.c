#define _POSIX_C_SOURCE 200809L
#include "bundle.h"

#include <dlfcn.h>
#include <math.h>
#include <onnxruntime_c_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct et_bundle {
    et_manifest manifest;
    OrtSession *session;
    OrtMemoryInfo *memory;
};

/* onnxruntime keeps threads and an environment of its own until the process ends, so that the
 * library cannot be unloaded: one of each for all bundles. */
static const OrtApi *api;
static OrtEnv *environment;

/* Turn onnxruntime's answer into ours. */
static et_status check(OrtStatus *said, et_status status, const char *doing, et_error *error) {
    if (!said) return ET_OK;
    et_fail(error, status, "%s: onnxruntime: %s", doing, api->GetErrorMessage(said));
    api->ReleaseStatus(said);
    return status;
}

static et_status load_onnxruntime(const char *library, const et_manifest *manifest,
                                  et_error *error) {
    static const OrtApiBase *base;
    if (!base) {
        /* its telemetry opens a network connection; it reads this when it is loaded */
        setenv("ORT_DISABLE_TELEMETRY", "1", 1);
        if (library && !*library) library = NULL;
        void *handle = dlopen(library ? library : "libonnxruntime.so.1", RTLD_NOW | RTLD_LOCAL);
        if (!handle && !library) handle = dlopen("libonnxruntime.so", RTLD_NOW | RTLD_LOCAL);
        if (!handle)
            return et_fail(error, ET_CONFIG, "onnxruntime cannot be loaded: %s", dlerror());
        const OrtApiBase *(ORT_API_CALL *get)(void);
        *(void **)&get = dlsym(handle, "OrtGetApiBase"); /* the cast that POSIX shows for dlsym */
        if (!get)
            return et_fail(error, ET_CONFIG, "onnxruntime cannot be loaded: %s", dlerror());
        base = get();
    }
    et_status status = et_check_version(manifest, base->GetVersionString(), error);
    if (status || api) return status;
    api = base->GetApi(EDGETUNE_ORT_API);
    if (!api)
        return et_fail(error, ET_CONFIG, "expected onnxruntime 1.%d or newer, found %s",
                       EDGETUNE_ORT_API, base->GetVersionString());
    status = check(api->CreateEnv(ORT_LOGGING_LEVEL_FATAL, "edgetune", &environment), ET_CONFIG,
                   "starting", error);
    if (status) api = NULL;
    return status;
}

static et_status set_options(OrtSessionOptions *options, const et_manifest *m, et_error *error) {
    static const char spinning[] = "session.intra_op.allow_spinning";
    /* what goes wrong comes back as a status; logged too, it would be there twice */
    OrtStatus *said = api->SetSessionLogSeverityLevel(options, ORT_LOGGING_LEVEL_FATAL);
    if (!said) said = api->SetIntraOpNumThreads(options, m->threads);
    if (!said) said = api->SetInterOpNumThreads(options, 1);
    if (!said)
        said = api->SetSessionGraphOptimizationLevel(
            options, (GraphOptimizationLevel)m->graph_optimization);
    if (!said)
        said = m->arena ? api->EnableCpuMemArena(options) : api->DisableCpuMemArena(options);
    if (!said)
        said = api->AddSessionConfigEntry(options, spinning, m->allow_spinning ? "1" : "0");
    for (const json_node *entry = m->config->first; entry && !said; entry = entry->next)
        said = api->AddSessionConfigEntry(options, entry->key, entry->string);
    return check(said, ET_INTEGRITY, "manifest.json: session", error);
}

static et_status open_session(et_bundle *bundle, et_error *error) {
    OrtSessionOptions *options = NULL;
    char *path = et_path(&bundle->manifest, "model.onnx");
    et_status status = path ? ET_OK : et_fail(error, ET_RESOURCE, "out of memory");
    if (!status)
        status = check(api->CreateSessionOptions(&options), ET_RESOURCE, "session options", error);
    if (!status) status = set_options(options, &bundle->manifest, error);
    /* the CPU provider is onnxruntime's own where no other was appended */
    if (!status)
        status = check(api->CreateSession(environment, path, options, &bundle->session),
                       ET_INTEGRITY, "model.onnx", error);
    if (!status)
        status = check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault,
                                                &bundle->memory),
                       ET_RESOURCE, "memory", error);
    if (options) api->ReleaseSessionOptions(options);
    free(path);
    return status;
}

et_status et_open(et_bundle **bundle, const char *folder, const char *library, et_error *error) {
    *bundle = NULL;
    et_bundle *fresh = calloc(1, sizeof *fresh);
    if (!fresh) return et_fail(error, ET_RESOURCE, "out of memory");
    et_status status = et_manifest_read(&fresh->manifest, folder, error);
    if (!status) status = load_onnxruntime(library, &fresh->manifest, error);
    if (!status) status = open_session(fresh, error);
    if (status) et_close(fresh);
    else *bundle = fresh;
    return status;
}

void et_close(et_bundle *bundle) {
    if (!bundle) return;
    if (bundle->memory) api->ReleaseMemoryInfo(bundle->memory);
    if (bundle->session) api->ReleaseSession(bundle->session);
    et_manifest_free(&bundle->manifest);
    free(bundle);
}

const et_manifest *et_manifest_of(const et_bundle *bundle) { return &bundle->manifest; }

size_t et_label_count(const et_bundle *bundle) { return bundle->manifest.label_count; }

const char *et_label(const et_bundle *bundle, size_t index) {
    return bundle->manifest.labels[index];
}

/* Copy the graph's answer out, if it is float32 of shape (1, labels). */
static et_status copy_logits(const et_bundle *bundle, const OrtValue *output, float *logits,
                             et_error *error) {
    size_t labels = et_label_count(bundle), axes = 0;
    OrtTensorTypeAndShapeInfo *info = NULL;
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    int64_t shape[2] = {0, 0};
    void *values = NULL;
    OrtStatus *said = api->GetTensorTypeAndShape(output, &info);
    if (!said) said = api->GetTensorElementType(info, &type);
    if (!said) said = api->GetDimensionsCount(info, &axes);
    if (!said && axes == 2) said = api->GetDimensions(info, shape, 2);
    /* "Mutable" in name only; there is no other way to read a tensor */
    if (!said) said = api->GetTensorMutableData((OrtValue *)output, &values);
    if (info) api->ReleaseTensorTypeAndShapeInfo(info);
    et_status status = check(said, ET_FAILED, "reading the logits", error);
    if (status) return status;
    if (type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || axes != 2 || shape[0] != 1 ||
        shape[1] != (int64_t)labels)
        return et_fail(error, ET_INTEGRITY,
                       "model.onnx: expected float32 logits of shape (1, %zu)", labels);
    memcpy(logits, values, labels * sizeof *logits);
    return ET_OK;
}

typedef struct {
    const char *name;
    const void *data;
    size_t bytes;
    ONNXTensorElementDataType type;
    int64_t shape[4];
    size_t axes;
} tensor;

static et_status run(const et_bundle *bundle, const tensor *inputs, size_t count, float *logits,
                     et_error *error) {
    const char *names[2], *output_name = "logits";
    OrtValue *values[2] = {NULL, NULL}, *output = NULL;
    OrtStatus *said = NULL;
    for (size_t i = 0; i < count && !said; i++) {
        names[i] = inputs[i].name;
        said = api->CreateTensorWithDataAsOrtValue(
            bundle->memory, (void *)inputs[i].data, /* which onnxruntime only reads */
            inputs[i].bytes, inputs[i].shape, inputs[i].axes, inputs[i].type, &values[i]);
    }
    if (!said)
        said = api->Run(bundle->session, NULL, names, (const OrtValue *const *)values, count,
                        &output_name, 1, &output);
    et_status status = check(said, ET_FAILED, "the graph cannot be run", error);
    if (!status) status = copy_logits(bundle, output, logits, error);
    if (output) api->ReleaseValue(output);
    for (size_t i = 0; i < count; i++)
        if (values[i]) api->ReleaseValue(values[i]);
    return status;
}

et_status et_run_pixels(const et_bundle *bundle, const uint8_t *rgb, size_t height, size_t width,
                        float *logits, et_error *error) {
    if (bundle->manifest.task != ET_IMAGES)
        return et_fail(error, ET_DATA, "the bundle takes token ids, not pixels");
    if (!height || !width || height > INT32_MAX / 3 / width)
        return et_fail(error, ET_DATA, "an image of %zu x %zu pixels is empty or too large", width,
                       height);
    tensor image = {"image",
                    rgb,
                    height * width * 3,
                    ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8,
                    {1, (int64_t)height, (int64_t)width, 3},
                    4};
    return run(bundle, &image, 1, logits, error);
}

et_status et_run_ids(const et_bundle *bundle, const int64_t *ids, size_t tokens, float *logits,
                     et_error *error) {
    size_t most = bundle->manifest.max_tokens;
    if (bundle->manifest.task != ET_TEXTS)
        return et_fail(error, ET_DATA, "the bundle takes pixels, not token ids");
    if (!tokens || tokens > most)
        return et_fail(error, ET_DATA, "expected 1 to %zu token ids, got %zu", most, tokens);
    int64_t *mask = malloc(tokens * sizeof *mask);
    if (!mask) return et_fail(error, ET_RESOURCE, "out of memory");
    for (size_t i = 0; i < tokens; i++) mask[i] = 1;
    tensor inputs[2];
    const void *data[2] = {ids, mask};
    const char *names[2] = {"input_ids", "attention_mask"};
    for (size_t i = 0; i < 2; i++)
        inputs[i] = (tensor){names[i],
                             data[i],
                             tokens * sizeof *ids,
                             ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64,
                             {1, (int64_t)tokens},
                             2};
    et_status status = run(bundle, inputs, 2, logits, error);
    free(mask);
    return status;
}

void et_softmax(const et_bundle *bundle, float *scores) {
    size_t count = et_label_count(bundle);
    double largest = (double)scores[et_best(scores, count)], sum = 0;
    double temperature = bundle->manifest.temperature;
    for (size_t i = 0; i < count; i++) sum += exp(((double)scores[i] - largest) / temperature);
    for (size_t i = 0; i < count; i++)
        scores[i] = (float)(exp(((double)scores[i] - largest) / temperature) / sum);
}

bool et_is_sure(const et_bundle *bundle, float score) {
    return (double)score >= bundle->manifest.threshold;
}

size_t et_best(const float *scores, size_t count) {
    size_t best = 0;
    for (size_t i = 1; i < count; i++)
        if (scores[i] > scores[best]) best = i;
    return best;
}
