// The TypeScript SDK, version 1: the revisions before 2026, over stdio, streamable HTTP and SSE.

import { Client } from '@modelcontextprotocol/sdk/client/index.js';
import { SSEClientTransport } from '@modelcontextprotocol/sdk/client/sse.js';
import { StdioClientTransport } from '@modelcontextprotocol/sdk/client/stdio.js';
import { StreamableHTTPClientTransport } from '@modelcontextprotocol/sdk/client/streamableHttp.js';
import { ElicitRequestSchema } from '@modelcontextprotocol/sdk/types.js';
import { BRIDGE, TOKEN, URL_OF_MCP, URL_OF_SSE, check, leave, must, story } from './story.mjs';

const FIRST_WITH_ELICITATION = '2025-06-18';
const ASKS = { title: 'asks', role: 'asks', wait_ms: 15_000 };
const requestInit = { headers: { Authorization: `Bearer ${TOKEN}` } };
const stdio = () => new StdioClientTransport({ command: BRIDGE[0], args: BRIDGE.slice(1), env: process.env });
const http = () => new StreamableHTTPClientTransport(URL_OF_MCP, { requestInit });
const sse = () => new SSEClientTransport(URL_OF_SSE, { requestInit });

await speak('stdio', '2024-11-05', stdio());
await speak('stdio', '2025-11-25', stdio());
await speak('http', '2025-03-26', http());
await speak('http', '2025-06-18', http());
await speak('http', '2025-11-25', http());
await speak('sse', '2024-11-05', sse());
leave();

async function speak(name, revision, transport) {
  const who = `sdk 1 ${name} ${revision}`;
  const elicits = revision >= FIRST_WITH_ELICITATION;
  const client = new Client({ name: 'sdk1', version: '1' }, { capabilities: elicits ? { elicitation: {} } : {} });
  const call = async (tool, given) => (await client.callTool({ name: tool, arguments: given })).structuredContent;
  let asked = 0;
  if (elicits) {
    client.setRequestHandler(ElicitRequestSchema, () => {
      asked += 1;
      return { action: 'accept', content: {} };
    });
  }

  await check(`${who}: connects`, async () => {
    const answered = propose(transport, revision);
    await client.connect(transport);
    must((await answered) === revision, await answered);
  });
  await story(who, {
    list: () => client.listTools(),
    call: (tool, given, onprogress) =>
      client.callTool({ name: tool, arguments: given }, undefined, onprogress && { onprogress }),
  });
  if (elicits) {
    await check(`${who}: a question comes by elicitation`, async () => {
      const answer = await call('execute_task', ASKS);
      must(asked === 1 && answer.status === 'completed', { asked, answer });
    });
  } else {
    await check(`${who}: a question comes in the answer, and is answered by a tool`, async () => {
      const { task_id, inputs, status } = await call('execute_task', ASKS);
      must(status === 'paused' && inputs.length === 1, { inputs, status });
      const answer = await call('answer_task_input', { task_id, action: 'accept', wait_ms: 15_000 });
      must(answer.status === 'completed', answer);
    });
  }
  await client.close();
}

// The SDK always proposes its newest revision; this one is what goes out instead. Resolves to what the server takes.
function propose(transport, revision) {
  const send = transport.send.bind(transport);
  return new Promise((resolve) => {
    transport.send = (message, options) => {
      if (message.method !== 'initialize') return send(message, options);
      const onmessage = transport.onmessage;
      transport.onmessage = (answer, extra) => {
        if (answer.id === message.id) resolve(answer.result?.protocolVersion);
        onmessage(answer, extra);
      };
      return send({ ...message, params: { ...message.params, protocolVersion: revision } }, options);
    };
  });
}
