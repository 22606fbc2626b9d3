// What every client must be able to do, whatever its make. A check is a line; the exit code tells whether all passed.

const WITHIN_MS = 20_000;
let failed = 0;

export const TOKEN = process.env.CLIENTS_TOKEN;
export const URL_OF_MCP = new URL(`${process.env.CLIENTS_URL}/mcp`);
export const URL_OF_SSE = new URL(`${process.env.CLIENTS_URL}/sse`);
export const BRIDGE = JSON.parse(process.env.CLIENTS_BRIDGE);
export const TASKS = 'io.modelcontextprotocol/tasks';

export async function check(name, body) {
  try {
    await Promise.race([body(), late()]);
    console.log(`ok    ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAIL  ${name}: ${String(error).slice(0, 1000)}`);
  }
}

export function must(truth, shown) {
  if (!truth) throw new Error(`not so: ${JSON.stringify(shown)}`);
}

export function leave() {
  process.exit(failed ? 1 : 0);
}

function late() {
  return new Promise((_, reject) => {
    setTimeout(() => reject(new Error(`not within ${WITHIN_MS} ms`)), WITHIN_MS).unref();
  });
}

// `call(tool, arguments, onProgress)` answers with the result of the call.
export async function story(name, { list, call }) {
  const told = async (tool, given, onProgress) => {
    const result = await call(tool, given, onProgress);
    must(!result.isError, result);
    return result.structuredContent;
  };

  await check(`${name}: lists the tools`, async () => {
    const names = (await list()).tools.map((tool) => tool.name);
    must(names.includes('execute_task') && names.includes('stream_task_execution_events'), names);
  });

  await check(`${name}: a call that waits shows progress and has the result`, async () => {
    const seen = [];
    const given = { title: 'waited', role: 'steps', wait_ms: 15_000 };
    const answer = await told('execute_task', given, (progress) => seen.push(progress));
    must(answer.done && answer.status === 'completed' && answer.result.result.steps === 4, answer);
    must(seen.length > 0 && seen.every((each, index) => !index || each.progress > seen[index - 1].progress), seen);
  });

  await check(`${name}: a run is followed by cursor to its end`, async () => {
    const handle = await told('execute_task', { title: 'followed', role: 'steps' });
    const cursors = [];
    let page = { next_cursor: handle.cursor, done: false };
    while (!page.done) {
      const given = { task_id: handle.task_id, cursor: page.next_cursor, wait_ms: 5000, max_events: 5 };
      page = await told('stream_task_execution_events', given);
      cursors.push(...page.events.map((event) => event.cursor));
    }
    must(cursors.length > 5 && cursors.every((each, index) => !index || each > cursors[index - 1]), cursors);
    const result = await told('get_task_result', { task_id: handle.task_id });
    must(result.result.result.steps === 4, result);
  });

  await check(`${name}: a run is cancelled`, async () => {
    const handle = await told('execute_task', { title: 'cancelled', role: 'forever' });
    const answer = await told('cancel_task_execution', { task_id: handle.task_id, wait_ms: 10_000 });
    must(answer.success && answer.status === 'cancelled', answer);
  });

  await check(`${name}: an error has a code and a hint`, async () => {
    const result = await call('get_task_execution_status', { task_id: 'nothing-like-it' });
    must(result.isError && result.structuredContent.error_code === 'TASK_NOT_FOUND', result);
  });
}
