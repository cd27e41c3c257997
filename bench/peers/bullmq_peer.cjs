// BullMQ in node: jobs are moved between lists by scripts, locked while they run, then removed.
"use strict";

const readline = require("node:readline");
const { Queue, Worker } = require("bullmq");

const { hostname: host, port } = new URL(process.env.BENCH_REDIS_URL);
const connection = { host, port: Number(port), maxRetriesPerRequest: null };
const queue = new Queue("bench", { connection });
const text = "x".repeat(189);

async function prepare(count) {
  for (let first = 0; first < count; first += 500) {
    const bulk = [];
    for (let number = first; number < Math.min(first + 500, count); number += 1) {
      bulk.push({ name: "job", data: { number, text }, opts: { removeOnComplete: true } });
    }
    await queue.addBulk(bulk);
  }
}

async function work(count) {
  let left = count;
  let finish;
  const finished = new Promise((resolve) => {
    finish = resolve;
  });
  const worker = new Worker("bench", async () => {}, { connection, concurrency: 200 });
  worker.on("completed", () => {
    left -= 1;
    if (left === 0) finish();
  });
  await finished;
  return worker;
}

async function main() {
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const [order, count] = line.split(" ");
    const began = process.hrtime.bigint();
    const cpuBefore = process.cpuUsage();
    const worker = order === "prepare" ? await prepare(Number(count)) : await work(Number(count));
    const seconds = Number(process.hrtime.bigint() - began) / 1e9;
    const cpu = process.cpuUsage(cpuBefore);
    if (worker) await worker.close();
    process.stdout.write(`${JSON.stringify({ seconds, cpu_s: (cpu.user + cpu.system) / 1e6 })}\n`);
  }
  process.exit(0);
}

main();
