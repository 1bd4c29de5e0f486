// A bundle: its manifest, its goldens, its graph. docs/bundle-format.md describes the files.

import { createHash } from "node:crypto";
import { createReadStream, lstatSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { pipeline } from "node:stream/promises";

import { BundleError, CONFIG, FAILED, INTEGRITY } from "./errors.mjs";
import { hasArray, openNpz, readArray } from "./npz.mjs";

const MAX_MANIFEST_BYTES = 4 * 2 ** 20;
const MAX_GOLDENS_BYTES = 256 * 2 ** 20;
const MAX_LABELS = 65536;
const MAX_GOLDENS = 1024;
const FILE_NAME = /^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$/;
const LEVELS = { off: "disabled", basic: "basic", extended: "extended", all: "all" };
const INPUTS = {
  "image-classification": { image: "uint8" },
  "text-classification": { input_ids: "int64", attention_mask: "int64" },
};

/**
 * Read a bundle's manifest and check size and SHA-256 of every file that it lists.
 * @param {string} folder
 * @throws {BundleError} the folder is no bundle, or is damaged
 */
export async function readManifest(folder) {
  const manifest = parseManifest(join(folder, "manifest.json"));
  checkManifest(manifest);
  for (const [name, entry] of Object.entries(manifest.files)) await checkFile(folder, name, entry);
  return manifest;
}

/**
 * Open the bundle's graph.
 * @param {boolean} wasm run it by onnxruntime-web instead of onnxruntime-node
 * @returns {Promise<(feeds: object) => Promise<Float32Array>>} the logits of one sample's inputs
 */
export async function openGraph(folder, manifest, wasm) {
  const ort = await importOnnxruntime(wasm);
  checkVersion(manifest.compatibility, wasm ? ort.env.versions.web : ort.env.versions.node);
  const options = sessionOptions(manifest.session);
  const path = join(folder, "model.onnx");
  let session;
  if (wasm) {
    ort.env.wasm.numThreads = manifest.session.intra_op_threads;
    const weights = { path: "weights.bin", data: readFileSync(join(folder, "weights.bin")) };
    options.executionProviders = ["wasm"];
    options.externalData = [weights];
    session = await guard(INTEGRITY, "model.onnx", () =>
      ort.InferenceSession.create(readFileSync(path), options),
    );
  } else {
    session = await guard(INTEGRITY, "model.onnx", () => ort.InferenceSession.create(path, options));
  }
  return async (feeds) => {
    const tensors = Object.fromEntries(
      Object.entries(feeds).map(([name, [type, data, shape]]) => [
        name,
        new ort.Tensor(type, data, shape),
      ]),
    );
    const outputs = await guard(FAILED, "the graph cannot be run", () =>
      session.run(tensors, ["logits"]),
    );
    const { logits } = outputs;
    const shape = [1, manifest.labels.length];
    if (logits.type !== "float32" || String(logits.dims) !== String(shape)) {
      throw new BundleError(INTEGRITY, `model.onnx: the logits are not float32 (${shape})`);
    }
    return logits.data;
  };
}

/**
 * Read the bundle's goldens.
 * @returns {{feeds: object, logits: Float32Array}[]} the graph's inputs, as name -> [type, data,
 *   shape], and the logits expected of them
 */
export function readGoldens(folder, manifest) {
  const npz = openNpz(readFileSync(join(folder, "goldens.npz")));
  const { count } = manifest.goldens;
  const labels = manifest.labels.length;
  const logits = readArray(npz, "logits", "<f4");
  if (String(logits.shape) !== String([count, labels])) {
    refuse("goldens.npz", `logits: expected the shape (${count}, ${labels})`);
  }
  const read = manifest.task === "image-classification" ? readPixels : readIds;
  return Array.from({ length: count }, (_, i) => ({
    feeds: read(npz, i, manifest.options.max_length),
    logits: logits.data.subarray(i * labels, (i + 1) * labels),
  }));
}

/**
 * Return the answer that a bundle's logits are: softmax(logits / T), T as the manifest states it.
 * @param {Float32Array} logits
 * @returns {{label: string, score: number, abstained: boolean}} abstained: whether the score is
 *   below the manifest's threshold, so that the label is no more than a best guess
 */
export function classify(logits, manifest) {
  const temperature = manifest.calibration?.temperature ?? 1;
  const best = logits.reduce((top, logit, i) => (logit > logits[top] ? i : top), 0);
  const sum = logits.reduce((s, x) => s + Math.exp((x - logits[best]) / temperature), 0);
  const score = 1 / sum;
  const abstained = !(score >= (manifest.abstention?.threshold ?? 0));
  return { label: manifest.labels[best], score, abstained };
}

function readPixels(npz, index) {
  const { shape, data } = readArray(npz, `input_${index}`, "|u1");
  if (shape.length !== 3 || shape[2] !== 3 || data.length === 0) {
    refuse("goldens.npz", `input_${index}: expected the shape (height, width, 3)`);
  }
  return { image: ["uint8", data, [1, ...shape]] };
}

function readIds(npz, index, most) {
  const name = `ids_${index}`;
  if (!hasArray(npz, name)) {
    refuse(
      "goldens.npz",
      `has no ${name}: it was written by an edgetune that stored texts only; export the bundle again`,
    );
  }
  const { shape, data } = readArray(npz, name, "<i8");
  if (shape.length !== 1 || data.length === 0 || data.length > most) {
    refuse("goldens.npz", `${name}: expected the shape (tokens,), 1 to ${most} of them`);
  }
  const mask = new BigInt64Array(data.length).fill(1n);
  return {
    input_ids: ["int64", data, [1, data.length]],
    attention_mask: ["int64", mask, [1, data.length]],
  };
}

async function importOnnxruntime(wasm) {
  const name = wasm ? "onnxruntime-web" : "onnxruntime-node";
  // its telemetry opens a network connection; it reads this when it is loaded
  process.env.ORT_DISABLE_TELEMETRY = "1";
  try {
    return await import(name);
  } catch (error) {
    throw new BundleError(CONFIG, `${name} cannot be loaded (npm install): ${error.message}`);
  }
}

function sessionOptions(session) {
  return {
    executionProviders: ["cpu"],
    intraOpNumThreads: session.intra_op_threads,
    interOpNumThreads: 1,
    graphOptimizationLevel: LEVELS[session.graph_optimization],
    enableCpuMemArena: session.arena ?? true, // older manifests do not name it
    logSeverityLevel: 4, // what goes wrong comes back as an exception
    extra: {
      "session.intra_op.allow_spinning": session.allow_spinning ? "1" : "0",
      ...session.config,
    },
  };
}

function checkVersion(needs, version) {
  const same = (other) => compareVersions(version, other) === 0;
  if (compareVersions(version, needs.onnxruntime_min) < 0) {
    const least = needs.onnxruntime_min;
    throw new BundleError(CONFIG, `the bundle needs onnxruntime ${least} or newer, found ${version}`);
  }
  if (needs.onnxruntime_excluded.some(same)) {
    throw new BundleError(
      CONFIG,
      `onnxruntime ${version} is known not to work on this bundle's device; use another version`,
    );
  }
}

function compareVersions(a, b) {
  const [x, y] = [a, b].map((version) => version.split(".").map((n) => Number.parseInt(n, 10) || 0));
  for (let i = 0; i < 3; i++) {
    const difference = (x[i] ?? 0) - (y[i] ?? 0);
    if (difference !== 0) return difference;
  }
  return 0;
}

function parseManifest(path) {
  try {
    if (lstatSync(path).size > MAX_MANIFEST_BYTES) refuse(path, "is too large");
    return JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(readFileSync(path)));
  } catch (error) {
    if (error instanceof BundleError) throw error;
    return refuse(path, error.message);
  }
}

function checkManifest(m) {
  const where = "manifest.json";
  const need = (good, message) => good || refuse(where, message);
  need(isObject(m), "expected a JSON object");
  need(m.schema_version === 1, "bundle schema is not 1, which is the one this program reads");
  need(
    isStrings(m.labels) && m.labels.length >= 1 && m.labels.length <= MAX_LABELS,
    `labels: expected a list of 1 to ${MAX_LABELS} strings`,
  );
  need(
    m.calibration === undefined || isWithin(m.calibration?.temperature, 0.001, 1000),
    "calibration: temperature: expected 0.001 to 1000",
  );
  need(
    m.abstention === undefined || isWithin(m.abstention?.threshold, 0, 1),
    "abstention: threshold: expected 0 to 1",
  );
  if (typeof m.task !== "string" || !Object.hasOwn(INPUTS, m.task)) {
    throw new BundleError(CONFIG, `${where}: task '${m.task}' is not known to this program`);
  }
  const inputs = tensorTypes(m.inputs);
  const stated = INPUTS[m.task];
  need(
    inputs?.size === Object.keys(stated).length &&
      Object.entries(stated).every(([name, dtype]) => inputs.get(name) === dtype) &&
      tensorTypes(m.outputs)?.get("logits") === "float32",
    "inputs and outputs are not those of its task",
  );
  if (m.task === "text-classification") {
    need(isWhole(m.options?.max_length, 1, 2 ** 20), "options: max_length: expected 1 or more");
  }
  const s = m.session;
  need(isWhole(s?.intra_op_threads, 1, 1024), "session: intra_op_threads: expected 1 to 1024");
  need(typeof s.allow_spinning === "boolean", "session: allow_spinning: expected true or false");
  need(["boolean", "undefined"].includes(typeof s.arena), "session: arena: expected true or false");
  need(
    typeof s.graph_optimization === "string" && Object.hasOwn(LEVELS, s.graph_optimization),
    "session: graph_optimization is not known",
  );
  need(
    isObject(s.config) && isStrings(Object.values(s.config)),
    "session: config: expected an object of strings",
  );
  need(isStrings(s.execution_providers), "session: execution_providers: expected strings");
  if (!s.execution_providers.includes("CPUExecutionProvider")) {
    throw new BundleError(
      CONFIG,
      `${where}: session: execution_providers: this program runs on the CPUExecutionProvider, which` +
        " the bundle does not name",
    );
  }
  const c = m.compatibility;
  need(
    typeof c?.onnxruntime_min === "string" && isStrings(c.onnxruntime_excluded),
    "compatibility: onnxruntime_min or onnxruntime_excluded is malformed",
  );
  need(isWhole(m.goldens?.count, 0, MAX_GOLDENS), `goldens: count: expected 0 to ${MAX_GOLDENS}`);
  need(
    Number.isFinite(m.goldens.tolerance) && m.goldens.tolerance >= 0,
    "goldens: tolerance: expected 0 or more",
  );
  need(isObject(m.files), "files: expected an object");
  for (const name of ["model.onnx", "weights.bin", "goldens.npz"]) {
    need(Object.hasOwn(m.files, name), `lists no ${name}`);
  }
  need(!(m.files["goldens.npz"]?.size > MAX_GOLDENS_BYTES), "goldens.npz is too large");
}

async function checkFile(folder, name, entry) {
  if (!FILE_NAME.test(name) || name === "manifest.json") {
    refuse("manifest.json", `'${name}' is no name of a bundle's file`);
  }
  if (!isWhole(entry?.size, 0, Number.MAX_SAFE_INTEGER) || typeof entry.sha256 !== "string") {
    refuse("manifest.json", `${name}: size or sha256 is malformed`);
  }
  const path = join(folder, name);
  const found = lstatSync(path, { throwIfNoEntry: false });
  if (!found?.isFile()) refuse(path, "expected a file, found none");
  if (found.size !== entry.size) {
    refuse(path, `expected ${entry.size} bytes, got ${found.size}; the bundle is damaged, copy it again`);
  }
  const hash = createHash("sha256");
  await pipeline(createReadStream(path), hash);
  const sha256 = hash.digest("hex");
  if (sha256 !== entry.sha256) {
    const [stated, got] = [entry.sha256, sha256].map((hex) => hex.slice(0, 12));
    refuse(path, `expected SHA-256 ${stated}..., got ${got}...; the bundle is damaged, copy it again`);
  }
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const isStrings = (value) => Array.isArray(value) && value.every((v) => typeof v === "string");
const isWithin = (value, low, high) => Number.isFinite(value) && value >= low && value <= high;
const isWhole = (value, low, high) => Number.isInteger(value) && value >= low && value <= high;

function tensorTypes(specs) {
  if (!Array.isArray(specs) || !specs.every(isObject)) return null;
  return new Map(specs.map((spec) => [spec.name, spec.dtype]));
}

async function guard(code, doing, act) {
  try {
    return await act();
  } catch (error) {
    throw new BundleError(code, `${doing}: onnxruntime: ${error.message ?? error}`);
  }
}

function refuse(where, message) {
  throw new BundleError(INTEGRITY, `${where}: ${message}`);
}
