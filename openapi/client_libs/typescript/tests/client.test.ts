/** The client against a live server and a live worker, whose addresses are in the environment; nothing here plays their part. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import {
  cancelJob, connect, createJob, generate, getJob, health, isLast, listModels, OperationError, orThrow, plan, preprocess, runJob, watchJob,
  type Client, type GenerationRequest, type OpResult, type ProgressEvent,
} from 'ez-diffusion-client';

function fromEnvironment(name: string, what: string): string {
  const value = process.env[name];
  if (!value) throw new Error(`${name} must hold ${what}`);
  return value;
}

const url = fromEnvironment('DIFFUSION_WORKERS_URL', 'the address of a running server');
const endpoint = {
  baseUrl: fromEnvironment('RUNPOD_URL', 'the address of a queue'),
  endpointId: fromEnvironment('RUNPOD_ENDPOINT', 'the endpoint with a running worker'),
  apiKey: fromEnvironment('RUNPOD_KEY', 'the key of that endpoint'),
  pollInterval: 50,
};

const body: GenerationRequest = { model: 'shapes-sd15', prompt: 'a red circle on a white background', num_inference_steps: 4, seed: 7 };
const long: GenerationRequest = { ...body, num_inference_steps: 150, num_images: 8 };
const PNG = 'iVBORw0KGgo';
const server = connect({ baseUrl: url });
const runpod = connect({ runpod: endpoint });

function onlyImage(result: OpResult): string {
  assert.equal(result.status, 'success');
  assert.equal(result.generation?.images.length, 1);
  return result.generation?.images[0]?.image ?? '';
}

/** The compressed pixels of a PNG, without the receipt beside them. */
function pixels(image: string): string {
  const file = Buffer.from(image, 'base64');
  const parts: Buffer[] = [];
  for (let at = 8; at < file.length; at += 12 + file.readUInt32BE(at)) {
    if (file.toString('latin1', at + 4, at + 8) === 'IDAT') parts.push(file.subarray(at + 8, at + 8 + file.readUInt32BE(at)));
  }
  assert.ok(parts.length > 0);
  return Buffer.concat(parts).toString('base64');
}

async function failure(work: Promise<unknown>): Promise<OpResult> {
  const error = await work.then(() => assert.fail('it succeeded'), (reason: unknown) => reason);
  assert.ok(error instanceof OperationError, String(error));
  return error.result;
}

async function eventsOf(client: Client, request: GenerationRequest): Promise<ProgressEvent[]> {
  const job = await orThrow(createJob({ client, body: request }));
  const events: ProgressEvent[] = [];
  for await (const event of watchJob({ client, jobId: job.id })) events.push(event);
  return events;
}

test('the server says what it offers', async () => {
  const models = await orThrow(listModels({ client: server }));
  assert.ok(models.models.some((model) => model.name === 'shapes-sd15'));
  assert.ok((await orThrow(health({ client: server }))).version);
});

test('a dry run says what would be done', async () => {
  const result = await orThrow(plan({ client: server, body }));
  assert.deepEqual([result.plan?.task, result.plan?.seeds, result.plan?.num_inference_steps], ['text_to_image', [7], 4]);
});

test('an image becomes a control map', async () => {
  const image = onlyImage(await orThrow(generate({ client: server, body })));
  const result = await orThrow(preprocess({ client: server, body: { image, preprocessing: { name: 'canny', parameters: { low_threshold: 50, high_threshold: 100 } } } }));
  assert.ok(result.control_map?.image.startsWith(PNG));
  assert.deepEqual([result.control_map?.width, result.control_map?.height], [128, 128]);
});

test('server-sent events tell of every step, and the last one has the result', async () => {
  const events = await eventsOf(server, { ...body, preview_interval: 1 });
  const found = events.filter((event) => event.phase === 'denoise').map((event) => event.step ?? 0);
  assert.ok(found.length >= 1, JSON.stringify(events.map((event) => [event.phase, event.step])));
  assert.deepEqual(found, [...found].sort((a, b) => a - b));
  const last = events.at(-1);
  assert.equal(last?.phase, 'done');
  assert.ok(last?.result && onlyImage(last.result).startsWith(PNG));
});

test('a job that is not there is an error, and is asked for once', async () => {
  let asked = 0;
  const counting = connect({ baseUrl: url, fetch: (input, init) => (asked++, fetch(input, init)) });
  const watch = async () => {
    for await (const event of watchJob({ client: counting, jobId: 'nobody' })) assert.fail(event.phase);
  };
  assert.equal((await failure(watch())).status, 'not_found');
  assert.equal(asked, 2, 'its events, then itself');
});

test('events go on after the connection broke', async () => {
  let streams = 0;
  const breaking = connect({
    baseUrl: url,
    fetch: async (input, init) => {
      const request = new Request(input, init);
      if (request.url.endsWith('/events') && streams++ === 0) throw new TypeError('the connection broke');
      return fetch(request);
    },
  });
  const events = await eventsOf(breaking, body);
  assert.equal(streams, 2);
  assert.equal(events.at(-1)?.phase, 'done');
});

/** A server behind a proxy that spoils the first of the requests that `spoils` picks. */
function behindProxy(spoils: (request: Request) => boolean, spoil: (request: Request) => Promise<Response>): { client: Client; requests: Request[] } {
  const requests: Request[] = [];
  let spoiled = false;
  const through = async (input: RequestInfo | URL, init?: RequestInit) => {
    const request = new Request(input, init);
    if (!spoils(request)) return fetch(request);
    requests.push(request);
    if (spoiled) return fetch(request);
    spoiled = true;
    return spoil(request);
  };
  return { client: connect({ baseUrl: url, fetch: through }), requests };
}

const badGateway = async () => new Response('<html>502 Bad Gateway</html>', { status: 502, headers: { 'Content-Type': 'text/html' } });

/** The beginning of a stream, and then its end, as where a proxy closes idle or long connections. */
async function cut(request: Request): Promise<Response> {
  const response = await fetch(request);
  const reader = response.body!.getReader();
  const { value } = await reader.read();
  void reader.cancel();
  return new Response(Buffer.concat([value!, Buffer.from('id: 999\ndata: {"pha')]), response);
}

test('a stream that ends too early goes on after its last event', async () => {
  const { client, requests } = behindProxy((request) => request.url.endsWith('/events'), cut);
  const events = await eventsOf(client, { ...body, preview_interval: 1, num_inference_steps: 20 });
  assert.equal(requests.length, 2);
  assert.equal(requests[0]?.headers.get('last-event-id'), null);
  assert.match(requests[1]?.headers.get('last-event-id') ?? '', /^[0-9]{1,2}$/);
  assert.equal(events.filter(isLast).length, 1);
  const shown = events.map((event) => JSON.stringify(event));
  assert.equal(new Set(shown).size, shown.length, 'no event comes twice');
});

test('a single 502 for the events does not end a job', async () => {
  const { client, requests } = behindProxy((request) => request.url.endsWith('/events'), badGateway);
  assert.equal((await eventsOf(client, body)).at(-1)?.phase, 'done');
  assert.equal(requests.length, 2);
});

test('a single 502 for the job does not end it either, where its events cannot be had at all', async () => {
  const { client, requests } = behindProxy((request) => request.method === 'GET' && /jobs\/[^/]+$/.test(request.url), badGateway);
  const send = client.getConfig().fetch!;
  const withoutEvents = async (input: RequestInfo | URL, init?: RequestInit) => {
    const request = new Request(input, init);
    return request.url.endsWith('/events') ? badGateway() : send(request);
  };
  const job = await orThrow(createJob({ client: server, body }));
  let last: ProgressEvent | undefined;
  for await (const event of watchJob({ client: connect({ baseUrl: url, fetch: withoutEvents }), jobId: job.id, retries: 1 })) last = event;
  assert.equal(last?.phase, 'done');
  assert.ok(requests.length >= 2);
});

test('a single 502 does not keep a job from being cancelled', async () => {
  const { client, requests } = behindProxy((request) => request.method === 'DELETE', badGateway);
  const stopping = new AbortController();
  const running = runJob({ client, body: long, signal: stopping.signal, onProgress: () => stopping.abort() });
  assert.equal((await failure(running)).status, 'cancelled');
  assert.equal(requests.length, 2);
});

test('an abort is an AbortError, whatever it ends', async () => {
  const before = await runJob({ client: server, body, signal: AbortSignal.abort() }).catch((error: unknown) => error);
  assert.equal((before as Error).name, 'AbortError');
  const stopping = new AbortController();
  const running = orThrow(generate({ client: server, body: long, signal: stopping.signal }));
  setTimeout(() => stopping.abort(), 100);
  const during = await running.catch((error: unknown) => error);
  assert.ok(during instanceof OperationError);
  assert.deepEqual([during.name, during.result.status], ['AbortError', 'cancelled']);
  const late = await orThrow(generate({ client: server, body: long, signal: AbortSignal.timeout(100) })).catch((error: unknown) => error);
  assert.equal((late as Error).name, 'TimeoutError');
});

test('separators of lines in a prompt arrive in the events', async () => {
  const prompt = 'a red circle\u2028on\u2029white\u0085paper\r\nat\rnight';
  const result = await runJob({ client: server, body: { ...body, prompt } });
  assert.equal(result.generation?.plan.prompt, prompt);
});

test('a large event is read in time that grows with its size alone', async () => {
  const spent: number[] = [];
  for (const size of [2e6, 16e6]) {
    const event = `id: 1\ndata: ${JSON.stringify({ phase: 'done', message: 'x'.repeat(size) })}\n\n`;
    const pieces = event.match(/[^]{1,8192}/g)!.map((piece) => Buffer.from(piece));
    const stream = () => new ReadableStream({ pull: (controller) => (pieces.length ? controller.enqueue(pieces.shift()!) : controller.close()) });
    const local = connect({ baseUrl: url, fetch: async () => new Response(stream()) });
    const started = process.cpuUsage();
    for await (const told of watchJob({ client: local, jobId: 'any' })) assert.equal(told.message?.length, size);
    const { user, system } = process.cpuUsage(started);
    spent.push(user + system);
  }
  assert.ok(spent[1]! < 24 * spent[0]!, `eight times the size took ${spent[1]! / spent[0]!} times as long`);
});

test('a secret that no header can carry is refused, and never repeated', () => {
  for (const secret of ['secret-12\nSet-Cookie: x', 'secret-12é', 'secret-12\u0000', 'secret-12 3']) {
    const made = [() => connect({ baseUrl: url, token: secret }), () => connect({ runpod: { ...endpoint, apiKey: secret } })];
    for (const make of made) {
      assert.throws(make, (error: Error) => error instanceof RangeError && /character 10 /.test(error.message) && !error.message.includes('secret'));
    }
  }
});

test('a wrong secret is not repeated by the refusal', async () => {
  const client = connect({ baseUrl: 'http://127.0.0.1:9', token: 'secret-123' });
  await assert.rejects(orThrow(health({ client })), (error: Error) => !JSON.stringify([error, String(error), error.stack]).includes('secret-123'));
});

test('a server that is not there is an error, too', async () => {
  const nowhere = connect({ baseUrl: 'http://127.0.0.1:9' });
  const result = await failure(orThrow(health({ client: nowhere })));
  assert.match(result.message ?? '', /cannot be reached: check that it is running, and its address/);
});

for (const [name, client] of [['the server', server], ['a RunPod endpoint', runpod]] as const) {
  test(`${name}: an image, and the same one again`, async () => {
    const [first, second] = [await orThrow(generate({ client, body })), await runJob({ client, body })];
    assert.ok(onlyImage(first).startsWith(PNG));
    assert.equal(second.generation?.images[0]?.seed, 7);
    assert.deepEqual(pixels(onlyImage(second)), pixels(onlyImage(first)));
  });

  test(`${name}: mistakes name their fields`, async () => {
    const result = await failure(orThrow(generate({ client, body: { ...body, width: 100, strength: 0.5 } })));
    assert.ok(result.errors?.some((error) => error.field === 'width' && error.code === 'not_a_multiple'), JSON.stringify(result));
    assert.equal((await failure(runJob({ client, body: { ...body, model: 'nobody' } }))).status, 'unknown_model');
  });

  test(`${name}: an abort cancels the job`, async () => {
    const stopping = new AbortController();
    const phases = new Set<string>();
    const running = runJob({
      client, body: long, signal: stopping.signal,
      onProgress: (event) => (phases.add(event.phase), event.phase === 'denoise' && stopping.abort()),
    });
    assert.equal((await failure(running)).status, 'cancelled');
    assert.equal((await running.catch((error: unknown) => error) as Error).name, 'AbortError');
    assert.ok(phases.has('denoise') && !phases.has('done'));
  });

  test(`${name}: a job can be looked at and cancelled by its id`, async () => {
    const job = await orThrow(createJob({ client, body: long }));
    const path = { job_id: job.id };
    assert.ok(['queued', 'running'].includes((await orThrow(getJob({ client, path }))).state));
    await orThrow(cancelJob({ client, path }));
    let last: ProgressEvent | undefined;
    for await (const event of watchJob({ client, jobId: job.id })) last = event;
    assert.ok(last && isLast(last));
    assert.equal(last.phase, 'cancelled');
    assert.equal((await orThrow(getJob({ client, path }))).state, 'cancelled');
  });
}

test('RunPod: a wrong key is unauthorized, and what an endpoint does not offer is said', async () => {
  const stranger = connect({ runpod: { ...endpoint, apiKey: 'wrong' } });
  assert.equal((await failure(orThrow(generate({ client: stranger, body })))).status, 'unauthorized');
  assert.match((await failure(orThrow(listModels({ client: runpod })))).message ?? '', /no GET \/models/);
});

test('RunPod: steps come through the stream', async () => {
  const events = await eventsOf(runpod, body);
  assert.ok(events.some((event) => event.phase === 'denoise'), JSON.stringify(events.map((event) => event.phase)));
  assert.equal(events.filter(isLast).length, 1);
});

test('RunPod: a single 502 neither ends nor cancels a job', async () => {
  for (const part of ['/status/', '/stream/']) {
    let spoiled = 0;
    const paths: string[] = [];
    const gateway = connect({
      runpod: endpoint,
      fetch: async (input, init) => {
        const request = new Request(input, init);
        paths.push(new URL(request.url).pathname);
        return request.url.includes(part) && spoiled++ === 0 ? badGateway() : fetch(request);
      },
    });
    assert.ok(onlyImage(await runJob({ client: gateway, body })).startsWith(PNG));
    assert.ok(spoiled >= 2, part);
    assert.ok(!paths.some((path) => path.includes('/cancel/')));
  }
});
