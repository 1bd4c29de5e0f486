// verify_bundle BUNDLE - replay a bundle's goldens with onnxruntime's C++ interface.
//
// The manifest and the goldens are read by the C files of ../c. ORT_LIB in the environment is the
// path of libonnxruntime.so, where the dynamic loader does not find it by itself. Exit status: 0
// if every logit is within the manifest's tolerance, else that of ../c/error.h.

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#define ORT_API_MANUAL_INIT  // the interface comes out of dlopen, not out of the linker
#include <onnxruntime_cxx_api.h>

#include "goldens.h"
#include "manifest.h"

namespace {

constexpr int kOrtApi = 17;  // onnxruntime 1.17 has it, and every later one

struct Failure : std::runtime_error {
    Failure(et_status s, const std::string& what) : std::runtime_error(what), status(s) {}
    et_status status;
};

void check(et_status status, const et_error& error) {
    if (status) throw Failure(status, error.text);
}

// A C record that is freed at the end of its scope.
template <class Record, void (*Free)(Record*)>
struct Owned : Record {
    Owned() : Record{} {}
    ~Owned() { Free(this); }
    Owned(const Owned&) = delete;
    Owned& operator=(const Owned&) = delete;
};

// Load onnxruntime, refuse a version that cannot run the bundle, and hand its interface to Ort.
void load_onnxruntime(const et_manifest& manifest) {
    setenv("ORT_DISABLE_TELEMETRY", "1", 1);  // it is read when the library is loaded
    const char* path = std::getenv("ORT_LIB");
    void* library = dlopen(path && *path ? path : "libonnxruntime.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        throw Failure(ET_CONFIG, std::string("onnxruntime cannot be loaded: ") + dlerror());
    auto get = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(library, "OrtGetApiBase"));
    if (!get) throw Failure(ET_CONFIG, std::string("onnxruntime cannot be loaded: ") + dlerror());
    et_error error;
    check(et_check_version(&manifest, get()->GetVersionString(), &error), error);
    const OrtApi* api = get()->GetApi(kOrtApi);
    if (!api) throw Failure(ET_CONFIG, "expected onnxruntime 1.17 or newer");
    Ort::InitApi(api);
}

Ort::SessionOptions session_options(const et_manifest& manifest) {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(manifest.threads);
    options.SetInterOpNumThreads(1);
    options.SetGraphOptimizationLevel(
        static_cast<GraphOptimizationLevel>(manifest.graph_optimization));
    // what goes wrong comes back as an exception; logged too, it would be there twice
    options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_FATAL);
    if (!manifest.arena) options.DisableCpuMemArena();
    options.AddConfigEntry("session.intra_op.allow_spinning", manifest.allow_spinning ? "1" : "0");
    for (auto entry = manifest.config->first; entry; entry = entry->next)
        options.AddConfigEntry(entry->key, entry->string);
    return options;
}

Ort::Session open_session(const Ort::Env& env, const et_manifest& manifest) try {
    const std::string path = std::string(manifest.folder) + "/model.onnx";
    return {env, path.c_str(), session_options(manifest)};
} catch (const Ort::Exception& error) {
    throw Failure(ET_INTEGRITY, std::string("model.onnx: onnxruntime: ") + error.what());
}

// Return the logits of one sample. A tensor is a view: what it shows must outlive the run.
std::vector<float> run(Ort::Session& session, const et_manifest& manifest, et_golden& golden) {
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    std::vector<int64_t> mask(golden.tokens, 1);
    std::vector<const char*> names;
    std::vector<Ort::Value> inputs;
    if (manifest.task == ET_IMAGES) {
        const std::array<int64_t, 4> shape = {1, static_cast<int64_t>(golden.height),
                                              static_cast<int64_t>(golden.width), 3};
        names = {"image"};
        inputs.push_back(Ort::Value::CreateTensor<uint8_t>(
            memory, golden.pixels, golden.height * golden.width * 3, shape.data(), shape.size()));
    } else {
        const std::array<int64_t, 2> shape = {1, static_cast<int64_t>(golden.tokens)};
        names = {"input_ids", "attention_mask"};
        for (int64_t* values : {golden.ids, mask.data()})
            inputs.push_back(Ort::Value::CreateTensor<int64_t>(memory, values, golden.tokens,
                                                               shape.data(), shape.size()));
    }
    const char* wanted = "logits";
    const auto outputs = session.Run(Ort::RunOptions{nullptr}, names.data(), inputs.data(),
                                     inputs.size(), &wanted, 1);
    const auto info = outputs[0].GetTensorTypeAndShapeInfo();
    const std::vector<int64_t> expected = {1, static_cast<int64_t>(manifest.label_count)};
    if (info.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || info.GetShape() != expected)
        throw Failure(ET_INTEGRITY, "model.onnx: the logits are not float32 (1, labels)");
    const float* logits = outputs[0].GetTensorData<float>();
    return {logits, logits + manifest.label_count};
}

void report(const et_manifest& manifest, size_t index, const std::vector<float>& logits,
            double difference) {
    const auto best = std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (float logit : logits)
        sum += std::exp((static_cast<double>(logit) - *best) / manifest.temperature);
    const double score = 1 / sum;
    std::string label = manifest.labels[best - logits.begin()];
    et_printable(label.data());
    std::printf("golden %zu: label %s score %.2f%s, largest difference %.2g\n", index,
                label.c_str(), score, score >= manifest.threshold ? "" : " (abstained)", difference);
    if (difference <= manifest.tolerance) return;
    et_error error;
    check(et_fail(&error, ET_INTEGRITY,
                  "golden %zu: a logit is %.4g from the stored one, allowed %.4g; this device does"
                  " not answer as the exporter did",
                  index, difference, manifest.tolerance),
          error);
}

void verify(const char* folder) {
    et_error error;
    Owned<et_manifest, et_manifest_free> manifest;
    check(et_manifest_read(&manifest, folder, &error), error);
    load_onnxruntime(manifest);
    Ort::Env env(ORT_LOGGING_LEVEL_FATAL, "edgetune");
    Ort::Session session = open_session(env, manifest);
    Owned<et_goldens, et_goldens_free> goldens;
    check(et_goldens_read(&goldens, &manifest, &error), error);
    for (size_t i = 0; i < manifest.golden_count; i++) {
        Owned<et_golden, et_golden_free> golden;
        check(et_golden_read(&goldens, i, &golden, &error), error);
        const auto logits = run(session, manifest, golden);
        report(manifest, i, logits, et_golden_difference(&goldens, i, logits.data()));
    }
    std::printf("%zu goldens, every logit within %.4g\n", manifest.golden_count,
                manifest.tolerance);
}

int fail(et_status status, std::string text) {
    et_printable(text.data());
    std::fprintf(stderr, "verify_bundle: %s\n", text.c_str());
    return status;
}

}  // namespace

int main(int count, char** arguments) try {
    if (count != 2) {
        std::fprintf(stderr, "usage: verify_bundle BUNDLE\n");
        return ET_CONFIG;
    }
    verify(arguments[1]);
    return ET_OK;
} catch (const Failure& failure) {
    return fail(failure.status, failure.what());
} catch (const Ort::Exception& error) {
    return fail(ET_FAILED, std::string("onnxruntime: ") + error.what());
} catch (const std::bad_alloc&) {
    return fail(ET_RESOURCE, "out of memory");
}
