// A Node program: celery-node and two task names, no code of agentq.
//
//   npm ci && BROKER_URL=redis://... node ask.mjs "Where is my order LF-1002?"
//
// On RabbitMQ it finds answers in Redis only (RESULT_URL), and the queue has to be a plain one.
import celery from "celery-node";

const url = process.env.BROKER_URL;
const client = celery.createClient(url, process.env.RESULT_URL ?? url, "agentq");
const request = { input: process.argv[2], workflow: process.env.WORKFLOW ?? "default" };

const sent = client.createTask("agentq.ask").applyAsync([], { request });
try {
  const { run_id, status, answer } = await sent.get(120_000);
  console.log(JSON.stringify({ run_id, status, answer }));
} catch (error) {
  console.error(`${error.exc_type ?? error.message}: ${error.exc_message ?? ""}`);
  process.exitCode = 1;
} finally {
  await client.disconnect();
}
