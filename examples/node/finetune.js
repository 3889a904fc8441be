// Fine-tunes a classifier from a CSV file, follows it to its end, and asks it:
//
//   npm install && npm run generate
//   node finetune.js MODEL reviews.csv 'a good film'
//
// MODEL is `projects/…/models/…`, or the path of a model folder on the server. SHARDYARD_ADDRESS, SHARDYARD_CA,
// SHARDYARD_TOKEN and SHARDYARD_PROJECT say which service, and who calls (reach.js).

import { randomUUID } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";
import { Code, ConnectError, createClient } from "@connectrpc/connect";

import { DatasetService } from "./gen/shardyard/v1/dataset_service_pb.js";
import { JobService } from "./gen/shardyard/v1/job_service_pb.js";
import { State } from "./gen/shardyard/v1/job_pb.js";
import { ModelService } from "./gen/shardyard/v1/model_service_pb.js";
import { PARENT, connect, explained, patiently } from "./reach.js";
import { upload } from "./upload.js";

async function main([model, file, ...texts]) {
  if (!model || !file) throw new Error("give a model, a CSV file with the columns text and label, and texts");
  const transport = await connect();
  const dataset = await upload(createClient(DatasetService, transport), PARENT, file);
  const jobs = createClient(JobService, transport);
  const request = { parent: PARENT, requestId: randomUUID(), job: { spec: specOf(model, dataset.name) } };
  const job = await patiently(() => jobs.createJob(request));
  console.log(`submitted ${job.name}`);
  let state = job.state;
  for await (const event of watch(jobs, job.name)) {
    console.log(`${event.sequence} ${line(event)}`);
    if (event.payload.case === "state") state = event.payload.value.to;
  }
  if (state !== State.SUCCEEDED) throw new Error(`${job.name} ended as ${State[state]}`);
  const ended = await jobs.getJob({ name: job.name });
  const instances = texts.map((text) => ({ input: { case: "text", value: text } }));
  const { predictions } = await createClient(ModelService, transport).predict({ model: ended.model, instances });
  predictions.forEach((each, at) => {
    const { label, scores } = each.output.value;
    console.log(`${label} ${Math.max(...scores.map((one) => one.score)).toFixed(3)} ${texts[at]}`);
  });
}

function specOf(model, dataset) {
  const source = model.startsWith("projects/") ? { case: "model", value: model } : { case: "uri", value: model };
  return {
    task: { case: "fineTuning", value: { task: { case: "textClassification", value: {} } } },
    model: { source },
    trainData: { source: { case: "dataset", value: dataset } },
    optimization: { duration: { case: "epochs", value: 2 } },
  };
}

// Every event once and in order: a stream that breaks is taken up again behind the last event that came.
async function* watch(jobs, name) {
  let after = 0n;
  for (;;) {
    try {
      for await (const batch of jobs.watchJob({ name, afterSequence: after })) {
        if (batch.afterSequence > after) throw new Error(`events ${after} to ${batch.afterSequence} are missing`);
        for (const event of batch.events.filter((each) => each.sequence > after)) yield event;
        if (batch.lastSequence > after) after = batch.lastSequence;
      }
      return; // A stream ends well only after the last event.
    } catch (error) {
      if (!(error instanceof ConnectError) || error.code !== Code.Unavailable) throw error;
      await sleep(1000);
    }
  }
}

function line(event) {
  const { case: kind, value } = event.payload;
  if (kind === "state") return `${State[value.from]} → ${State[value.to]}`;
  if (kind === "progress") return `step ${value.step}: loss ${value.loss.toFixed(4)}`;
  if (kind === "evaluation") return `evaluation: ${metrics(value)}`;
  return kind;
}

function metrics(evaluation) {
  return Object.entries(evaluation.metrics)
    .map(([name, value]) => `${name} ${value.toFixed(3)}`)
    .join(", ");
}

await main(process.argv.slice(2)).catch((error) => {
  console.error(explained(error));
  process.exitCode = 1;
});
