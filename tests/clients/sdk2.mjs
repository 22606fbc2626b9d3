// The TypeScript SDK, version 2, and its package for tasks: 2025-11-25 and 2026-07-28, over stdio and streamable HTTP.

import { Client, StreamableHTTPClientTransport } from '@modelcontextprotocol/client';
import { StdioClientTransport } from '@modelcontextprotocol/client/stdio';
import { createTaskSessionFromClient, resultFromTaskOutcome } from '@modelcontextprotocol/ext-tasks/client';
import { BRIDGE, TASKS, TOKEN, URL_OF_MCP, check, leave, must, story } from './story.mjs';

const REVISIONS = { legacy: '2025-11-25', auto: '2026-07-28' };
const requestInit = { headers: { Authorization: `Bearer ${TOKEN}` } };
const transports = {
  stdio: () => new StdioClientTransport({ command: BRIDGE[0], args: BRIDGE.slice(1), env: process.env }),
  http: () => new StreamableHTTPClientTransport(URL_OF_MCP, { requestInit }),
};

function makeClient(mode, extensions) {
  const capabilities = { elicitation: { form: {} }, ...(extensions && { extensions }) };
  const info = { name: 'sdk2', version: '1' };
  const client = new Client(info, { versionNegotiation: { mode }, capabilities });
  return { client, info, capabilities };
}

// The SDK refuses the result type of tasks, so their package wants a way past it: the same transport, by ids of our own.
function dispatchOver(transport) {
  const waiting = new Map();
  const onwards = transport.onmessage;
  let last = 0;
  transport.onmessage = (message, extra) => {
    const answer = waiting.get(message.id);
    if (!answer || message.method) return onwards?.(message, extra);
    waiting.delete(message.id);
    answer(message.error ? { kind: 'error', error: message } : { kind: 'result', result: message.result });
  };
  return (request) => {
    const id = `raw-${(last += 1)}`;
    const answer = new Promise((resolve) => waiting.set(id, resolve));
    return transport.send({ ...request, jsonrpc: '2.0', id }).then(() => answer);
  };
}

for (const [name, open] of Object.entries(transports)) {
  for (const [mode, revision] of Object.entries(REVISIONS)) {
    const { client } = makeClient(mode);
    let asked = 0;
    client.setRequestHandler('elicitation/create', () => {
      asked += 1;
      return { action: 'accept', content: {} };
    });
    const who = `sdk 2 ${name} ${revision}`;
    await check(`${who}: connects`, async () => {
      await client.connect(open());
      must(client.getNegotiatedProtocolVersion() === revision, client.getNegotiatedProtocolVersion());
    });
    await story(who, {
      list: () => client.listTools(),
      call: (tool, given, onprogress) => client.callTool({ name: tool, arguments: given }, onprogress && { onprogress }),
    });
    await check(`${who}: a question comes by elicitation`, async () => {
      const given = { title: 'asks', role: 'asks', wait_ms: 15_000 };
      const { structuredContent: answer } = await client.callTool({ name: 'execute_task', arguments: given });
      must(asked === 1 && answer.status === 'completed', { asked, answer });
    });
    await client.close();
  }
  await tasks(`tasks ${name}`, open);
}
leave();

async function taskSession(endpointId, transport, onInputRequest) {
  const { client, info, capabilities } = makeClient('auto', { [TASKS]: {} });
  await client.connect(transport);
  const session = createTaskSessionFromClient(client, {
    endpointId,
    rawDispatch: dispatchOver(transport),
    v2RequestFraming: { protocolVersion: REVISIONS.auto, clientInfo: info, clientCapabilities: capabilities },
    onInputRequest,
  });
  const close = async () => {
    await session.close();
    await client.close();
  };
  return { session, close };
}

async function tasks(name, open) {
  let asked = 0;
  const { session, close } = await taskSession(name, open(), () => {
    asked += 1;
    return Promise.resolve({ action: 'accept', content: {} });
  });
  const start = (role) => session.callTool('execute_task', { title: name, role });

  await check(`${name}: a call is a task, and its end is the result`, async () => {
    const execution = await start('steps');
    must(execution.kind === 'task', execution.kind);
    const { outcome } = await execution.settle();
    must(resultFromTaskOutcome(outcome).structuredContent.result.result.steps === 4, outcome);
  });
  await check(`${name}: a handle is taken up over another connection`, async () => {
    let kept;
    await (await start('steps')).handoff((reference) => {
      kept = JSON.stringify(reference);
    });
    const later = await taskSession(name, open());
    const { outcome } = await (await later.session.resumeTask(JSON.parse(kept))).settle();
    await later.close();
    must(outcome.status === 'completed', outcome);
  });
  await check(`${name}: who listens hears of a task until its end`, async () => {
    const { client } = makeClient('auto', { [TASKS]: {} });
    const seen = [];
    const ended = new Promise((resolve) => {
      client.fallbackNotificationHandler = async ({ method, params }) => {
        if (method !== 'notifications/tasks') return;
        seen.push(params.status);
        if (params.status === 'completed') resolve();
      };
    });
    await client.connect(open());
    const { handle } = await start('steps');
    const subscription = await client.listen({ taskIds: [handle.taskId] });
    await ended;
    await subscription.close();
    await client.close();
    must(seen.at(-1) === 'completed' && seen.filter((each) => each === 'completed').length === 1, seen);
  });
  await check(`${name}: a question is answered by an update`, async () => {
    const { outcome } = await (await start('asks')).settle();
    must(asked === 1 && outcome.status === 'completed', { asked, outcome });
  });
  await check(`${name}: a task is cancelled`, async () => {
    const execution = await start('forever');
    await execution.cancel();
    const { outcome } = await execution.settle();
    must(outcome.status === 'cancelled', outcome);
  });
  await close();
}
