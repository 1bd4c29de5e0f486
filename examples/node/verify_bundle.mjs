// node verify_bundle.mjs [--wasm] BUNDLE - replay a bundle's goldens with onnxruntime.
//
// Exit status: 0 if every logit is within the manifest's tolerance, else one of errors.mjs.

import { classify, openGraph, readGoldens, readManifest } from "./bundle.mjs";
import { BundleError, CONFIG, INTEGRITY, printable } from "./errors.mjs";

async function verify(folder, wasm) {
  const manifest = await readManifest(folder);
  const { tolerance } = manifest.goldens;
  const run = await openGraph(folder, manifest, wasm);
  for (const [index, golden] of readGoldens(folder, manifest).entries()) {
    const logits = await run(golden.feeds);
    const difference = largestDifference(logits, golden.logits);
    const { label, score, abstained } = classify(logits, manifest);
    const answer = `label ${printable(label)} score ${score.toFixed(2)}`;
    console.log(
      `golden ${index}: ${answer}${abstained ? " (abstained)" : ""}, largest difference` +
        ` ${short(difference, 2)}`,
    );
    if (!(difference <= tolerance)) {
      throw new BundleError(
        INTEGRITY,
        `golden ${index}: a logit is ${short(difference)} from the stored one, allowed` +
          ` ${short(tolerance)}; this device does not answer as the exporter did`,
      );
    }
  }
  console.log(`${manifest.goldens.count} goldens, every logit within ${short(tolerance)}`);
}

function largestDifference(logits, stored) {
  let largest = 0;
  for (let i = 0; i < stored.length; i++) {
    const difference = Math.abs(logits[i] - stored[i]);
    if (Number.isNaN(difference)) return Infinity;
    largest = Math.max(largest, difference);
  }
  return largest;
}

const short = (value, digits = 4) => String(Number(value.toPrecision(digits)));

const folders = process.argv.slice(2).filter((argument) => argument !== "--wasm");
try {
  if (folders.length !== 1) {
    throw new BundleError(CONFIG, "usage: node verify_bundle.mjs [--wasm] BUNDLE");
  }
  await verify(folders[0], process.argv.includes("--wasm"));
} catch (error) {
  if (!(error instanceof BundleError)) throw error;
  console.error(`verify_bundle: ${printable(error.message)}`);
  process.exitCode = error.code;
}
