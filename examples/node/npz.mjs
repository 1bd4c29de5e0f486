// Arrays of a file that numpy.savez wrote: a zip of .npy files, not compressed.
//
// The file may be hostile; every offset is checked, by hand or by Buffer's own bounds checks.

import { BundleError, INTEGRITY } from "./errors.mjs";

// signatures of APPNOTE.TXT, PKWARE's description of zip, 4.3.7, 4.3.12 and 4.3.16
const LOCAL = 0x04034b50;
const CENTRAL = 0x02014b50;
const END = 0x06054b50;
const END_SIZE = 22;
const MAX_COMMENT = 65535;
const MAX_MEMBERS = 8192;

const DTYPES = {
  "<f4": { size: 4, read: (view, at) => view.getFloat32(at, true), array: Float32Array },
  "<i8": { size: 8, read: (view, at) => view.getBigInt64(at, true), array: BigInt64Array },
  "|u1": { size: 1, read: (view, at) => view.getUint8(at), array: Uint8Array },
};

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, i) => {
  let value = i;
  for (let bit = 0; bit < 8; bit++) value = (value >>> 1) ^ (value & 1 ? 0xedb88320 : 0);
  return value;
});

/**
 * Return the members of a zip file: name -> where its directory says that it is.
 * @param {Buffer} bytes the whole file
 * @throws {BundleError} it is no such file
 */
export function openNpz(bytes) {
  const guarded = () => {
    const end = findEnd(bytes);
    const count = bytes.readUInt16LE(end + 10);
    if (count > MAX_MEMBERS) refuse(`has ${count} members, expected at most ${MAX_MEMBERS}`);
    const members = new Map();
    let at = bytes.readUInt32LE(end + 16);
    for (let i = 0; i < count; i++) {
      if (bytes.readUInt32LE(at) !== CENTRAL) refuse("has a malformed directory");
      const nameSize = bytes.readUInt16LE(at + 28);
      const name = bytes.toString("latin1", at + 46, at + 46 + nameSize);
      if (members.has(name)) refuse(`has ${name} twice`);
      members.set(name, {
        flags: bytes.readUInt16LE(at + 8),
        method: bytes.readUInt16LE(at + 10),
        crc: bytes.readUInt32LE(at + 16),
        packed: bytes.readUInt32LE(at + 20),
        size: bytes.readUInt32LE(at + 24),
        local: bytes.readUInt32LE(at + 42),
      });
      at += 46 + nameSize + bytes.readUInt16LE(at + 30) + bytes.readUInt16LE(at + 32);
    }
    return { bytes, members };
  };
  return within(guarded, "is cut off or has a malformed directory");
}

/** Return whether the file has an array of that name. */
export function hasArray(npz, name) {
  return npz.members.has(`${name}.npy`);
}

/**
 * Read the array `name`, whose elements must be of `dtype`: "<f4", "<i8" or "|u1".
 * @returns {{shape: number[], data: Float32Array | BigInt64Array | Uint8Array}}
 */
export function readArray(npz, name, dtype) {
  const npy = within(() => contents(npz, name), `${name} lies outside of the file`);
  const [header, start] = within(() => headerOf(npy), `${name} is no npy array`);
  const found = parseHeader(header);
  if (!found) refuse(`${name} has a malformed header`);
  if (found.dtype !== dtype) {
    refuse(`${name}: expected elements of type ${dtype}, got ${found.dtype}`);
  }
  const { size, read, array } = DTYPES[dtype];
  const elements = found.shape.reduce((product, length) => product * length, 1);
  if (npy.length - start !== elements * size) {
    refuse(`${name}: its ${npy.length - start} bytes do not fill its shape`);
  }
  const view = new DataView(npy.buffer, npy.byteOffset + start, npy.length - start);
  return { shape: found.shape, data: array.from({ length: elements }, (_, i) => read(view, i * size)) };
}

function findEnd(bytes) {
  for (let comment = 0; comment <= MAX_COMMENT; comment++) {
    const at = bytes.length - END_SIZE - comment;
    if (at < 0) break;
    if (bytes.readUInt32LE(at) === END && bytes.readUInt16LE(at + 20) === comment) return at;
  }
  return refuse("is no npz file, or is cut off");
}

// sizes are the directory's: numpy.savez leaves 2^32 - 1 in the local headers
function contents({ bytes, members }, name) {
  const member = members.get(`${name}.npy`);
  if (!member) refuse(`has no ${name}`);
  if (member.flags & 1) refuse(`${name} is encrypted`);
  if (member.method !== 0 || member.packed !== member.size) {
    refuse(`${name} is compressed, as in bundles of an early edgetune; export it again`);
  }
  if (bytes.readUInt32LE(member.local) !== LOCAL) throw new RangeError();
  const names = bytes.readUInt16LE(member.local + 26) + bytes.readUInt16LE(member.local + 28);
  const start = member.local + 30 + names;
  if (start + member.size > bytes.length) throw new RangeError();
  const found = bytes.subarray(start, start + member.size);
  if (crc32(found) !== member.crc) refuse(`${name} is damaged (CRC-32)`);
  return found;
}

function headerOf(npy) {
  if (npy.toString("latin1", 0, 6) !== "\x93NUMPY") throw new RangeError();
  const [start, size] = npy[6] === 1 ? [10, npy.readUInt16LE(8)] : [12, npy.readUInt32LE(8)];
  if (start + size > npy.length) throw new RangeError();
  return [npy.toString("latin1", start, start + size), start + size];
}

// {'descr': '<f4', 'fortran_order': False, 'shape': (4, 17), }: the keys as numpy sorts them (NEP 1)
function parseHeader(text) {
  const found =
    /^\{'descr': '([^']{1,16})', 'fortran_order': False, 'shape': \(((?:\d{1,12}, ?)*(?:\d{1,12})?)\),? *\} *\n?$/.exec(
      text,
    );
  if (!found) return null;
  const shape = found[2].split(",").filter((length) => length.trim() !== "");
  return { dtype: found[1], shape: shape.map(Number) };
}

function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = (crc >>> 8) ^ CRC_TABLE[(crc ^ byte) & 0xff];
  return ~crc >>> 0;
}

function refuse(message) {
  throw new BundleError(INTEGRITY, `goldens.npz: ${message}`);
}

// run `read`; where it reads outside of the file, refuse that with `message`
function within(read, message) {
  try {
    return read();
  } catch (error) {
    if (error instanceof RangeError) refuse(message);
    throw error;
  }
}
