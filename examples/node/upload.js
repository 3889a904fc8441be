// Uploads a file as a data set: a header, then its parts, each with its checksum.

import { createHash, randomUUID } from "node:crypto";
import { readFile } from "node:fs/promises";
import { basename } from "node:path";
import { Code, ConnectError } from "@connectrpc/connect";

const PART_BYTES = 1 << 20;

export async function upload(datasets, parent, path) {
  const content = await readFile(path);
  const sha256 = createHash("sha256").update(content).digest("hex");
  const file = { path: basename(path), sizeBytes: BigInt(content.length), sha256 };
  const id = `d-${sha256.slice(0, 32)}`; // The same content has the same name, and is sent once.

  async function* parts() {
    const header = { parent, resourceId: id, requestId: randomUUID(), files: [file] };
    yield { message: { case: "header", value: header } };
    for (let at = 0; at < content.length; at += PART_BYTES) {
      const data = content.subarray(at, at + PART_BYTES);
      yield { message: { case: "chunk", value: { offset: BigInt(at), data, crc32c: crc32c(data) } } };
    }
  }
  try {
    return await datasets.createDataset(parts());
  } catch (error) {
    if (ConnectError.from(error).code !== Code.AlreadyExists) throw error;
    return datasets.getDataset({ name: `${parent}/datasets/${id}` });
  }
}

const TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let value = byte;
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0x82f63b78 : value >>> 1;
  return value;
});

function crc32c(data) {
  let value = 0xffffffff;
  for (const byte of data) value = TABLE[(value ^ byte) & 0xff] ^ (value >>> 8);
  return (value ^ 0xffffffff) >>> 0;
}
