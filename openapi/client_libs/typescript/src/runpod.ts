import type { ErrorCode, Job, JobState, OpResult, OpStatus, ProgressEvent } from './generated/index.js';
import { isOpResult } from './errors.js';
import { bearer } from './token.js';

/** Strip trailing slashes; a regular expression would take quadratic time. */
export function withoutSlash(address: string): string {
  let end = address.length;
  while (address[end - 1] === '/') end -= 1;
  return address.slice(0, end);
}

export interface RunpodEndpoint {
  endpointId: string;
  apiKey: string;
  /** https://api.runpod.ai/v2 by default */
  baseUrl?: string;
  /** Polling interval in milliseconds; default: 500 */
  pollInterval?: number;
}

type RunpodStatus = 'IN_QUEUE' | 'IN_PROGRESS' | 'COMPLETED' | 'FAILED' | 'CANCELLED' | 'TIMED_OUT';
type RunpodJob = { id: string; status: RunpodStatus; output?: unknown; error?: unknown };
type RunpodStream = { status: RunpodStatus; stream?: { output: unknown }[] };

const STATES: Record<RunpodStatus, JobState> = {
  IN_QUEUE: 'queued', IN_PROGRESS: 'running', COMPLETED: 'succeeded', FAILED: 'failed', CANCELLED: 'cancelled', TIMED_OUT: 'failed',
};
const HTTP_STATUS: Partial<Record<OpStatus, number>> = {
  success: 200, internal_error: 500, model_unavailable: 503, out_of_memory: 503, timed_out: 504, queue_full: 429, unauthorized: 401, not_found: 404,
};
const RETRIES = 4;
const DEFAULT_BASE_URL = 'https://api.runpod.ai/v2';

function json(body: unknown, status = 200): Response {
  return new Response(JSON.stringify(body), { status, headers: { 'Content-Type': 'application/json' } });
}

/** Names that are both an operation status and an error code. */
type Failing = Extract<OpStatus, ErrorCode>;

function failed(status: Failing, message: string): OpResult {
  return { status, message, errors: [{ code: status, message }] };
}

function isEvent(value: unknown): value is ProgressEvent {
  return typeof value === 'object' && value !== null && typeof (value as ProgressEvent).phase === 'string';
}

/** The result in a worker's output: itself a result, an event that carries one, or a list that ends with either. */
function resultIn(output: unknown): OpResult | undefined {
  for (const item of [output].flat().reverse()) {
    if (isEvent(item) && item.result) return item.result;
    if (isOpResult(item)) return item;
  }
  return undefined;
}

/** The result of a failed job: RunPod keeps only its error, which holds the result as JSON written by the worker. */
function resultInError(error: unknown): OpResult | undefined {
  if (typeof error !== 'string') return undefined;
  try {
    const told: unknown = JSON.parse(error);
    return isOpResult(told) ? told : undefined;
  } catch {
    return undefined; // plain text, of RunPod itself
  }
}

function resultOf(job: RunpodJob): OpResult | undefined {
  const found = resultIn(job.output) ?? resultInError(job.error);
  if (found || STATES[job.status] === 'queued' || STATES[job.status] === 'running') return found;
  if (job.status === 'CANCELLED') return failed('cancelled', 'the job was cancelled');
  if (job.status === 'TIMED_OUT') return failed('timed_out', 'the endpoint stopped the job: its execution timeout is over');
  return failed('internal_error', typeof job.error === 'string' && job.error ? job.error : 'the worker returned no result');
}

function jobOf(job: RunpodJob): Job {
  const result = resultOf(job);
  const state = result && result.status !== 'success' ? (result.status === 'cancelled' ? 'cancelled' : 'failed') : STATES[job.status];
  const progress = state === 'running' && isEvent(job.output) ? job.output : null;
  return { id: job.id, state, progress, result: result ?? null };
}

function lastEvent(job: Job): ProgressEvent {
  const phases = { succeeded: 'done', failed: 'failed', cancelled: 'cancelled', queued: 'queued', running: 'denoise' } as const;
  return { phase: phases[job.state], job_id: job.id, message: job.result?.message ?? null, result: job.result ?? null };
}

/** RunPod's protocol, for one endpoint. */
class Endpoint {
  private readonly root: string;

  private readonly authorization: { Authorization: string };

  constructor(private readonly endpoint: RunpodEndpoint, private readonly send: typeof fetch) {
    this.authorization = bearer(endpoint.apiKey, 'apiKey');
    this.root = `${withoutSlash(endpoint.baseUrl ?? DEFAULT_BASE_URL)}/${encodeURIComponent(endpoint.endpointId)}`;
  }

  /** A GET, retried with backoff after a lost connection or a transient refusal, since the job keeps running. */
  private async ask<Answer>(path: string, signal?: AbortSignal): Promise<Answer> {
    for (let attempt = 0; ; attempt++) {
      try {
        return await this.call<Answer>('GET', path, undefined, signal);
      } catch (error) {
        const lasting = error instanceof Refusal && !error.transient;
        if (lasting || attempt >= RETRIES || signal?.aborted) throw error;
      }
      await this.pause(signal, 2 ** attempt);
    }
  }

  private async call<Answer>(method: 'GET' | 'POST', path: string, body?: unknown, signal?: AbortSignal): Promise<Answer> {
    const headers = { ...this.authorization, 'Content-Type': 'application/json' };
    const response = await this.send(`${this.root}${path}`, { method, headers, ...(body === undefined ? {} : { body: JSON.stringify(body) }), ...(signal ? { signal } : {}) });
    const text = await response.text();
    if (response.status === 401 || response.status === 403) throw new Refusal('unauthorized', 'RunPod refused the API key');
    if (response.status === 404) throw new Refusal('not_found', 'RunPod knows no such endpoint or job');
    if (response.status === 429) throw new Refusal('queue_full', 'RunPod takes no more requests at the moment', true);
    if (!response.ok) throw new Refusal('internal_error', `RunPod answered ${response.status}: ${text.slice(0, 200)}`, response.status >= 500);
    return JSON.parse(text) as Answer;
  }

  start(input: unknown, signal?: AbortSignal): Promise<RunpodJob> {
    return this.call('POST', '/run', { input }, signal);
  }

  status(id: string, signal?: AbortSignal): Promise<RunpodJob> {
    return this.ask(`/status/${encodeURIComponent(id)}`, signal);
  }

  cancel(id: string): Promise<RunpodJob> {
    return this.call('POST', `/cancel/${encodeURIComponent(id)}`);
  }

  pause(signal: AbortSignal | undefined, times = 1): Promise<void> {
    return new Promise((resolve, reject) => {
      if (signal?.aborted) return reject(signal.reason);
      const timer = setTimeout(resolve, times * (this.endpoint.pollInterval ?? 500));
      signal?.addEventListener('abort', () => (clearTimeout(timer), reject(signal.reason)), { once: true });
    });
  }

  /** Events as the worker streams them, then the last one with the result. */
  async *events(id: string, signal: AbortSignal): AsyncGenerator<ProgressEvent> {
    let told = '';
    while (true) {
      const { stream } = await this.ask<RunpodStream>(`/stream/${encodeURIComponent(id)}`, signal);
      for (const { output } of stream ?? []) if (isEvent(output) && !output.result) yield { ...output, job_id: id };
      const job = jobOf(await this.status(id, signal));
      if (job.state !== 'queued' && job.state !== 'running') return yield lastEvent(job);
      const news: ProgressEvent = job.progress ? { ...job.progress, job_id: id } : { phase: job.state === 'queued' ? 'queued' : 'load', job_id: id };
      const text = JSON.stringify(news);
      if (text !== told && !stream?.length && (job.progress || !told)) yield news;
      told = text;
      await this.pause(signal);
    }
  }
}

/** A request refused by RunPod itself, before it reached a worker. */
class Refusal extends Error {
  constructor(readonly status: Failing, message: string, readonly transient = false) {
    super(message);
  }
}

function eventStream(endpoint: Endpoint, id: string, signal: AbortSignal): Response {
  const stopping = new AbortController();
  const events = endpoint.events(id, AbortSignal.any([signal, stopping.signal]));
  const encoder = new TextEncoder();
  const body = new ReadableStream<Uint8Array>({
    async pull(controller) {
      try {
        const { done, value } = await events.next();
        if (done) controller.close();
        else controller.enqueue(encoder.encode(`data: ${JSON.stringify(value)}\n\n`));
      } catch (error) {
        controller.error(error);
      }
    },
    cancel: () => stopping.abort(new DOMException('the stream was closed', 'AbortError')),
  });
  return new Response(body, { headers: { 'Content-Type': 'text/event-stream' } });
}

async function generated(endpoint: Endpoint, input: unknown, signal: AbortSignal): Promise<Response> {
  const { id } = await endpoint.start(input, signal);
  try {
    while (true) {
      const job = await endpoint.status(id, signal);
      const result = resultOf(job);
      if (result && STATES[job.status] !== 'running') return json(result, HTTP_STATUS[result.status] ?? 422);
      await endpoint.pause(signal);
    }
  } catch (error) {
    if (signal.aborted) await endpoint.cancel(id).catch(() => undefined); // nobody is waiting for it anymore
    throw error;
  }
}

async function answer(endpoint: Endpoint, request: Request): Promise<Response> {
  const path = new URL(request.url).pathname;
  const [, id, events] = /^\/jobs\/([^/]+)(\/events)?$/.exec(path) ?? [];
  const jobId = id && decodeURIComponent(id);
  if (jobId && events && request.method === 'GET') return eventStream(endpoint, jobId, request.signal);
  if (jobId && request.method === 'GET') return json(jobOf(await endpoint.status(jobId, request.signal)));
  if (jobId && request.method === 'DELETE') {
    await endpoint.cancel(jobId);
    return json(jobOf(await endpoint.status(jobId)));
  }
  if (path === '/jobs' && request.method === 'POST') return json(jobOf(await endpoint.start(await request.json(), request.signal)), 202);
  if (path === '/generate' && request.method === 'POST') return generated(endpoint, await request.json(), request.signal);
  return json(failed('not_found', `a RunPod endpoint has no ${request.method} ${path}: it offers /generate and /jobs`), 404);
}

/**
 * A fetch that carries the calls of this package to a RunPod endpoint: POST /generate and POST /jobs become /run, GET /jobs/{id}
 * becomes /status, its events become /stream, and DELETE becomes /cancel.
 */
export function runpodFetch(endpoint: RunpodEndpoint, send: typeof fetch = (input, init) => fetch(input, init)): typeof fetch {
  const spoken = new Endpoint(endpoint, send);
  return async (input, init) => {
    try {
      return await answer(spoken, new Request(input, init));
    } catch (error) {
      if (error instanceof Refusal) return json(failed(error.status, error.message), HTTP_STATUS[error.status] ?? 502);
      throw error;
    }
  };
}
