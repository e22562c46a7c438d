import type { Client } from './generated/client/index.js';
import { cancelJob, createJob, getJob, streamJobEvents, type GenerationRequest, type Job, type OpResult, type ProgressEvent } from './generated/index.js';
import { aborted, isTransient, OperationError, orThrow, type Answer } from './errors.js';

export interface WatchOptions {
  client: Client;
  jobId: string;
  /** Stops watching; the job keeps running */
  signal?: AbortSignal | undefined;
  /** Maximum consecutive retries after a broken connection or a response such as 502; default: 4 */
  retries?: number;
}

const LAST_PHASES: readonly string[] = ['done', 'failed', 'cancelled'];
const FIRST_RETRY_MS = 250;

/** Whether this is the last event of a job. */
export function isLast(event: ProgressEvent): boolean {
  return LAST_PHASES.includes(event.phase);
}

function pause(milliseconds: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    if (signal.aborted) return resolve();
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener('abort', () => (clearTimeout(timer), resolve()), { once: true });
  });
}

function eventOfJob(job: Job): ProgressEvent {
  const phases = { queued: 'queued', running: 'denoise', succeeded: 'done', failed: 'failed', cancelled: 'cancelled' } as const;
  const phase = phases[job.state];
  return { ...(LAST_PHASES.includes(phase) ? {} : job.progress), phase, job_id: job.id, result: job.result ?? null, message: job.result?.message ?? null };
}

/** Rechunk a byte stream at line ends: the generated reader rescans its whole buffer for each chunk. */
function wholeLines(): TransformStream<Uint8Array, Uint8Array> {
  let held: Uint8Array[] = [];
  const flush = (controller: TransformStreamDefaultController<Uint8Array>) => {
    const joined = new Uint8Array(held.reduce((size, part) => size + part.length, 0));
    let at = 0;
    for (const part of held) {
      joined.set(part, at);
      at += part.length;
    }
    held = [];
    if (joined.length) controller.enqueue(joined);
  };
  return new TransformStream({
    transform(part, controller) {
      held.push(part);
      if (part.includes(10)) flush(controller);
    },
    flush,
  });
}

async function inWholeLines(send: typeof fetch, input: RequestInfo | URL, init?: RequestInit): Promise<Response> {
  const { body, status, statusText, headers } = await send(input, init);
  return new Response(body?.pipeThrough(wholeLines()) ?? null, { status, statusText, headers });
}

/** Retry a repeatable call with backoff while its failures are transient. */
async function persistently<Data>(ask: () => Promise<Answer<Data>>, retries: number, signal: AbortSignal): Promise<NonNullable<Data>> {
  for (let attempt = 0; ; attempt++) {
    const answer = await ask();
    if (attempt >= retries || signal.aborted || !isTransient(answer)) return orThrow(answer);
    await pause(FIRST_RETRY_MS * 2 ** attempt, signal);
  }
}

/**
 * Stream the events of a job up to the last one, which carries the result. If the connection breaks or ends early, it reconnects
 * and resumes after the last event received; if that fails, it polls the job. Leaving the loop closes the connection but does not
 * cancel the job.
 */
export async function* watchJob({ client, jobId, signal, retries = 4 }: WatchOptions): AsyncGenerator<ProgressEvent, void, undefined> {
  const path = { job_id: jobId };
  const closing = new AbortController();
  const close = () => closing.abort();
  signal?.addEventListener('abort', close);
  if (signal?.aborted) close();
  const send = client.getConfig().fetch ?? fetch;
  let lastId: string | undefined;
  let failures = 0;
  let refused = false;
  const options = {
    client, path, signal: closing.signal, sseMaxRetryAttempts: 1,
    fetch: ((input, init) => inWholeLines(send, input, init)) as typeof fetch,
    onSseError: (error: unknown) => (refused = error instanceof Error && /^SSE failed: 4(?!08|29)/.test(error.message)),
    onSseEvent: ({ id }: { id?: string }) => ((lastId = id ?? lastId), (failures = 0)),
    sseSleepFn: (milliseconds: number) => pause(milliseconds, closing.signal),
  };
  try {
    while (!closing.signal.aborted && !refused && failures <= retries) {
      const { stream } = await streamJobEvents({ ...options, ...(lastId ? { headers: { 'Last-Event-ID': lastId } } : {}) });
      for await (const event of stream) {
        yield event;
        if (isLast(event)) return;
      }
      if (!refused) await pause(FIRST_RETRY_MS * 2 ** failures++, closing.signal);
    }
    while (!closing.signal.aborted) {
      const event = eventOfJob(await persistently(() => getJob({ client, path, signal: closing.signal }), retries, closing.signal));
      yield event;
      if (isLast(event)) return;
      await pause(1000, closing.signal);
    }
  } catch (error) {
    if (!closing.signal.aborted) throw error;
  } finally {
    signal?.removeEventListener('abort', close);
    close();
  }
}

export interface RunOptions {
  client: Client;
  body: GenerationRequest;
  onProgress?: ((event: ProgressEvent) => void) | undefined;
  /** Cancels the job */
  signal?: AbortSignal | undefined;
}

/** Cancel a job, with retries on transient failures. */
function cancelPersistently(client: Client, jobId: string): void {
  const ask = () => cancelJob({ client, path: { job_id: jobId } });
  persistently(ask, 4, new AbortController().signal).catch(() => undefined);
}

/**
 * Queue a request, report its progress, and wait for its result. Throws an OperationError on failure, named AbortError or TimeoutError
 * if `signal` cancelled the job.
 */
export async function runJob({ client, body, onProgress, signal }: RunOptions): Promise<OpResult> {
  if (signal?.aborted) throw aborted(signal.reason);
  const job = await orThrow(createJob({ client, body }));
  const cancel = () => cancelPersistently(client, job.id);
  signal?.addEventListener('abort', cancel);
  if (signal?.aborted) cancel();
  try {
    for await (const event of watchJob({ client, jobId: job.id })) {
      onProgress?.(event);
      if (!isLast(event)) continue;
      if (event.result?.status === 'success') return event.result;
      if (signal?.aborted && event.phase === 'cancelled') throw aborted(signal.reason, event.result ?? undefined);
      throw new OperationError(event.result ?? { status: event.phase === 'cancelled' ? 'cancelled' : 'internal_error', message: event.message ?? null });
    }
    throw new OperationError({ status: 'internal_error', message: 'the job ended without a result' });
  } finally {
    signal?.removeEventListener('abort', cancel);
  }
}
