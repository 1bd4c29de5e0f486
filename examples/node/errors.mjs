// What goes wrong, with the exit codes of the edgetune command line.

export const FAILED = 1; // onnxruntime cannot run the graph
export const CONFIG = 2; // called wrongly, or no suitable onnxruntime here
export const INTEGRITY = 6; // a file is not what the manifest says, or an answer is off

export class BundleError extends Error {
  /** @param {number} code one of the above */
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

/** Return text that may come from a hostile file on one line, without control characters. */
export function printable(text) {
  return text.replace(/\s+/g, " ").replace(/[\u0000-\u001f\u007f-\u009f]/g, "?");
}
