// A caller in another language. Reads {url, backend, calls: [{task, request}]} from standard input and prints what each gave.
import { readFileSync } from "node:fs";
import celery from "celery-node";

const job = JSON.parse(readFileSync(0, "utf8"));
const client = celery.createClient(job.url, job.backend, "agentq");

const sent = job.calls.map(({ task, request }) => client.createTask(task).applyAsync([], { request }));
const outcomes = await Promise.all(
  sent.map((result) =>
    result.get(60000, 50).then(
      (value) => ({ task_id: result.taskId, value }),
      (error) => ({ task_id: result.taskId, error: error.message, type: error.exc_type, said: error.exc_message }),
    ),
  ),
);
process.stdout.write(JSON.stringify(outcomes));
await client.disconnect();
