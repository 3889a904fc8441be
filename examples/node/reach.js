// How the service is reached, by the variables that the SDK and the command line read, too:
//
//   SHARDYARD_ADDRESS     host:port of the service [127.0.0.1:7400]
//   SHARDYARD_CA          TLS: the service's authority, a PEM file, or `system` for those that Node.js knows
//   SHARDYARD_TOKEN       who calls; without TLS it is sent to this machine only
//   SHARDYARD_TOKEN_FILE  a file with the token, read again for every call, if SHARDYARD_TOKEN is not set
//   SHARDYARD_PROJECT     the project [default]

import { readFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import { Code, ConnectError } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";

// An empty variable is one that is not set.
const { SHARDYARD_CA: CA, SHARDYARD_TOKEN: TOKEN, SHARDYARD_TOKEN_FILE: TOKEN_FILE } = process.env;
const ADDRESS = process.env.SHARDYARD_ADDRESS || "127.0.0.1:7400";
const ON_THIS_MACHINE = /^(localhost|127(\.\d+){3}|\[::1\]):\d+$/;

export const PARENT = `projects/${process.env.SHARDYARD_PROJECT || "default"}`;

export async function connect() {
  if (!/^[^/]+:\d+$/.test(ADDRESS)) throw new Error(`SHARDYARD_ADDRESS is ${ADDRESS}; give HOST:PORT alone`);
  if ((TOKEN || TOKEN_FILE) && !CA && !ON_THIS_MACHINE.test(ADDRESS)) {
    throw new Error(
      `${ADDRESS} is not on this machine and the connection is not encrypted: the token would be readable on the ` +
        "way; set SHARDYARD_CA to the service's authority, or to `system`",
    );
  }
  const authorise = (next) => async (request) => {
    const token = TOKEN || (await readFile(TOKEN_FILE, "utf8")).trim();
    request.header.set("authorization", `Bearer ${token}`);
    return next(request);
  };
  return createGrpcTransport({
    baseUrl: `${CA ? "https" : "http"}://${ADDRESS}`,
    interceptors: TOKEN || TOKEN_FILE ? [authorise] : [],
    nodeOptions: CA && CA !== "system" ? { ca: await readFile(CA) } : {},
  });
}

// While the service is busy it asks for another try, or its own deadline passes: what is sent again with the same request id is accepted once.
export async function patiently(call) {
  for (let tries = 1; ; tries++) {
    try {
      return await call();
    } catch (error) {
      const isBusy = [Code.Unavailable, Code.DeadlineExceeded].includes(error.code);
      const isAsked = error instanceof ConnectError && isBusy && error.details.length > 0;
      if (!isAsked || tries === 20) throw error;
      await sleep(3000);
    }
  }
}

// An error in words. Those of the service name the next step themselves; those of the connection need it added.
export function explained(error) {
  if (!(error instanceof ConnectError)) return error.message;
  const cause = error.cause?.code ?? "";
  if (/CERT|VERIFY|SIGNATURE/.test(cause)) {
    return `the certificate of ${ADDRESS}: ${error.rawMessage}; is SHARDYARD_CA its authority, and the name right?`;
  }
  if (/^(EPROTO|ERR_SSL)/.test(cause)) return `${ADDRESS} does not speak TLS; leave SHARDYARD_CA out if that is meant`;
  if (cause === "ERR_HTTP2_ERROR") return `${ADDRESS} does not speak gRPC; is it the address of \`--listen\`?`;
  const isBroken = /ECONNRE|ENOTFOUND|EAI_AGAIN/.test(cause) || (error.code === Code.Canceled && !error.details.length);
  if (!isBroken) return error.message;
  const tls = CA ? "" : " Set SHARDYARD_CA if the service has TLS.";
  return `no service at ${ADDRESS}: ${error.rawMessage}; is the address right?${tls}`;
}
